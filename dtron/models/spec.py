"""What the trainer must know of a model besides its code: the seam for models from outside."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["ModelSpec", "meta_model"]


@dataclass(frozen=True)
class ModelSpec:
    """A model family.

    flavors: name -> config, a frozen dataclass with at least vocab_size, dim, n_layers, n_heads and n_kv_heads.
    build: config -> module. Its children are, in this order, those before the layers, `layers` (an
        nn.ModuleDict keyed "0", "1", ...) and those after; forward(x, positions) skips children that are None and
        takes token ids or, on a later pipeline stage, hidden states. No buffers: they would not survive meta.
    init_std: (parameter name, config) -> standard deviation of its initial values; None: ones.
    attention_flops: (config, seq_len) -> FLOPs per token of one layer's attention, forward and backward.
    hf_config: config -> the object of a Hugging Face config.json; None: such a model cannot be exported. Its
        parameters then have the names of Hugging Face's, without `model.` before those of the body.
    document_masks: whether forward also takes documents and keys, as Llama's does.
    standard_hidden_states: whether a layer's output on a rank is [B, S / cp / tp, dim] in mixed_precision_param.
        Pipeline stages then know what they receive; else they run the model once, first, and exchange shapes.
    tensor_plan: (loss_parallel) -> {module name with wildcards: ParallelStyle}; None: no tensor parallel.
    """

    flavors: dict[str, Any]
    build: Callable[[Any], nn.Module]
    init_std: Callable[[str, Any], float | None]
    attention_flops: Callable[[Any, float], float]
    tensor_plan: Callable[[bool], dict[str, Any]] | None = None
    document_masks: bool = False
    hf_config: Callable[[Any], dict[str, Any]] | None = None
    standard_hidden_states: bool = False


def meta_model(spec: ModelSpec, model_config: Any) -> nn.Module:
    """The whole model without memory. ValueError if it has buffers."""
    with torch.device("meta"):
        model = spec.build(model_config)
    if names := [name for name, _ in model.named_buffers()]:
        raise ValueError(
            f"the model has buffers ({', '.join(names)}); compute them in forward, meta loses their values"
        )
    return model
