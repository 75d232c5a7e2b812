"""Floating-point operations (FLOPs) per token: what MFU, the pipeline split and the benches count.

PaLM's convention (arXiv 2204.02311, appendix B): forward and backward cost 6 operations per matmul
parameter (the head once, the embedding look-up none) plus 12 * n_layers * n_heads * head_size *
seq_len for attention, counted in full although half of it is masked; recomputation is not counted.
A layer with a window counts min(window, seq_len) in place of seq_len; under document masks the length of the document a
token is in takes the place of seq_len, in the mean: what is done, by the same convention.
"""

from collections.abc import Sequence

from torch import nn

from dtron.models.llama import LlamaConfig
from dtron.models.moe import Experts

__all__ = ["active_parameters", "attention_flops_per_token", "flops_formula", "flops_per_token", "matmul_parameters"]


def matmul_parameters(module: nn.Module) -> int:
    """Weights that multiply a token's activations: every Linear, counted where it is used, tied or not.

    Of a mixture of experts those of the K experts that a token takes.
    """
    dense = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    return dense + sum(_active(m, matrices=True) for m in module.modules() if isinstance(m, Experts))


def active_parameters(module: nn.Module) -> int:
    """Parameters that one token uses: all, but of a mixture of experts only the K experts that it takes."""
    experts = [m for m in module.modules() if isinstance(m, Experts)]
    idle = sum(sum(p.numel() for p in m.parameters()) - _active(m) for m in experts)
    return sum(p.numel() for p in module.parameters()) - idle


def _active(experts: Experts, matrices: bool = False) -> int:
    """Parameters of the K experts that a token takes; of the matrices alone, without biases."""
    counted = (p for p in experts.parameters() if p.dim() == 3 or not matrices)
    return sum(p.numel() // p.size(0) for p in counted) * experts.top_k


def attention_flops_per_token(config: LlamaConfig, attended: float) -> float:
    """One block's attention scores and values for `attended` tokens, forward and backward."""
    return 12 * config.n_heads * config.head_size * attended


def flops_per_token(model: nn.Module, attention: Sequence[float]) -> float:
    """Forward and backward of the whole model, which may be on meta; attention: every layer's FLOPs per token."""
    return 6 * matmul_parameters(model) + sum(attention)


def flops_formula(length: str = "seq_len") -> str:
    """The sum of the two functions above in words; `length`: seq_len, or what takes its place."""
    return f"FLOPs per token = 6 x matmul parameters + 12 x layers x heads x head size x {length}"
