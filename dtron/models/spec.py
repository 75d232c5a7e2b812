"""What the trainer must know of a model besides its code: the seam for models from outside.

To add a model: write it for one device, build a `ModelSpec` of it and call `register("model", name, spec)` in a module
of job.custom_import (`dtron.registry`); then model.name names it. docs/extending.md explains each requirement, and
tests/extending/outside_model.py is a complete one. Another size of a Llama-like family is one line in
`dtron/models/families.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from dtron.models.moe import MoEConfig

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel.style import ParallelStyle

    from dtron.models.variants import Variant

__all__ = [
    "ModelConfig", "ModelSpec", "attended_tokens", "experts_of", "layers_of", "meta_model", "needs_masks",
]  # fmt: skip


class ModelConfig(Protocol):
    """The dimensions of a model that dtron reads, of any family: a frozen dataclass with these fields and its own."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...


@dataclass(frozen=True)
class ModelSpec:
    """A model family. The functions take the family's own config, one of `flavors` with the overrides applied.

    flavors: name -> config.
    build: config -> module. Its children are, in this order, those before the layers, `layers` (an
        nn.ModuleDict keyed "0", "1", ...) and those after; forward(x, positions) calls each, skips children that are
        None and takes token ids or, on a later pipeline stage, hidden states. A child's weights are gathered when it is
        called, so no other may use them, except as the same nn.Parameter. No buffers: they would not survive meta.
    init_std: (parameter name, config) -> standard deviation of its initial values; None: ones.
    attention_flops: (config, n) -> FLOPs per token of one layer's attention to n tokens, forward and backward; n is
        seq_len, or less of a layer with a window and of documents.
    tensor_plan: (loss_parallel) -> {module name with wildcards: ParallelStyle}; None: no tensor parallel.
    document_masks: whether forward also takes document_start and keys, as Llama's does. Under context parallel a config
        whose `needs_masks` is true needs them too.
    hf_config: config -> the object of a Hugging Face config.json; None: such a model cannot be exported. Its
        parameters then have the names of Hugging Face's, without `model.` before those of the body.
    standard_hidden_states: whether a layer's output on a rank is [B, S / cp / tp, dim] in mixed_precision_param.
        Pipeline stages then know what they receive; else they run the model once, first, and exchange shapes.
    logits_variant: config -> the `Variant` whose logits_multiplier and logits_softcap the model's logits have; given,
        the standard loss is made in chunks of them. The model's last child is then lm_head, an nn.Linear, and its
        forward returns `self.logits(h)`, which calls lm_head once and scales what it gives. None: the loss is given the
        whole logits.
    """

    flavors: Mapping[str, ModelConfig]
    build: Callable[[Any], nn.Module]
    init_std: Callable[[str, Any], float | None]
    attention_flops: Callable[[Any, float], float]
    tensor_plan: Callable[[bool], Mapping[str, "ParallelStyle"]] | None = None
    document_masks: bool = False
    hf_config: Callable[[Any], dict[str, Any]] | None = None
    standard_hidden_states: bool = False
    logits_variant: Callable[[Any], "Variant"] | None = None


def meta_model(spec: ModelSpec, model_config: ModelConfig) -> nn.Module:
    """The whole model without memory. ValueError if it has buffers."""
    with torch.device("meta"):
        model = spec.build(model_config)
    if names := [name for name, _ in model.named_buffers()]:
        raise ValueError(
            f"the model has buffers ({', '.join(names)}), whose values are lost on the meta device; compute them in "
            "forward"
        )
    return model


def experts_of(model_config: ModelConfig) -> MoEConfig | None:
    """The mixture of experts of a model of any family; None: it has none."""
    experts: MoEConfig | None = getattr(model_config, "moe", None)
    return experts


def attended_tokens(model_config: ModelConfig, seq_len: int) -> list[int]:
    """To how many tokens each layer attends at most: its `window(layer)`, if the config has such a method, or all."""
    window = getattr(model_config, "window", lambda layer: None)
    return [min(window(i) or seq_len, seq_len) for i in range(model_config.n_layers)]


def needs_masks(model_config: ModelConfig, seq_len: int) -> bool:
    """Whether a model of any family, at this length, needs more than the causal mask, so that the ring will not do.

    By the config's method of this name; without one it does not.
    """
    return bool(getattr(model_config, "needs_masks", lambda seq_len: False)(seq_len))


def layers_of(model: nn.Module) -> nn.ModuleDict:
    """The blocks of a model or a stage, by their number in the whole model."""
    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleDict)
    return layers
