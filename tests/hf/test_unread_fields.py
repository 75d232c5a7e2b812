"""No field of a config.json that changes what transformers computes is passed over: it is read, or it is refused.

Every field of a model type is changed in turn. Where transformers' logits are then others, dtron must not read the same
model as before.
"""

from typing import Any

import pytest
import torch
from hf.models import PUBLISHED, config_json, random_model, tokens

from dtron.errors import UserError
from dtron.models.hf import hf_dimensions
from dtron.models.hf_types import TYPES

FIRST = {config["model_type"]: name for name, config in reversed(PUBLISHED.items())}
# Sizes that shapes show, and fields of training or generation; what is left is changed.
NOT_READ = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "attn_implementation", "initializer_range", "chunk_size_feed_forward",
    "pruned_heads", "tie_word_embeddings", "vocab_size", "pretraining_tp", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "_name_or_path", "_attn_implementation", "is_decoder", "add_cross_attention",
    "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip


def others(value: Any) -> list[Any]:
    """Values of another meaning."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, max(1, value // 2)]
    if isinstance(value, float):
        return [value * 1.5, value / 4 + 0.01]
    if isinstance(value, str):
        return ["gelu", "relu"] if value in ("silu", "gelu", "gelu_pytorch_tanh", "relu2") else []
    return [True, 4, 0.5] if value is None else []


def read(config: dict[str, Any]) -> Any:
    try:
        return hf_dimensions(config, "config.json")
    except UserError as error:
        return str(error)


@torch.no_grad()
def logits(name: str, **change: Any) -> torch.Tensor | None:
    """Of transformers; None where it does not take the change."""
    try:
        return random_model(name, **change)(tokens()).logits
    except Exception:
        return None


@pytest.mark.parametrize("kind", FIRST)
def test_no_field_is_passed_over(kind: str) -> None:
    name = FIRST[kind]
    base, fields = logits(name), type(random_model(name).config)().to_dict() | config_json(name)
    same, silent = read(config_json(name)), []
    assert base is not None and not isinstance(same, str)
    for field in sorted(fields.keys() - NOT_READ):
        if field.endswith(("_token_id", "_dropout")):
            continue
        for value in others(fields[field]):
            changed = logits(name, **{field: value})
            if changed is None or (changed.shape == base.shape and torch.allclose(changed, base, atol=1e-5)):
                continue
            if read(config_json(name, **{field: value})) == same:
                silent.append((field, value))
    assert silent == []


def test_every_type_is_looked_at() -> None:
    assert set(FIRST) == set(TYPES)
