"""Ring attention as one operator, in which a compiler does not look. Private APIs of torch's ring, 2.11 and 2.13.

Traced into a compiled block, the messages are those that the rank's own graph is left with: what a rank does not use is
dropped from its graph alone, and with `alltoall` among three or more ranks the others wait for it. In an operator each
rank sends what it sends in eager mode, in the same order.
"""

from typing import Any

import torch
from torch import Tensor

from dtron import compat
from dtron.compat import cp_impl, planning

__all__ = ["OPERATORS", "ring_attention"]

_SEQUENCE = 2  # dimension of q, k, v [B, heads, S, D]


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None, group: str) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default if q.is_cuda else compat.cpu_flash_attention
    out, lse, *_ = cp_impl._templated_ring_attention(
        planning.group_called(group), _SEQUENCE, flash, q, k, v, is_causal=True, scale=scale
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    flash: Any = compat.cpu_flash_attention_backward
    more: dict[str, Any] = {}
    if q.is_cuda:  # the random state of a dropout that there is none of
        flash = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        more = {"cum_seq_q": None, "cum_seq_k": None, "max_q": q.size(2), "max_k": k.size(2)}
        more |= {"philox_seed": state, "philox_offset": state[:0]}
    grads = cp_impl._templated_ring_attention_backward(
        planning.group_called(group), _SEQUENCE, flash, grad, "grad_out", q, k, v, out, lse, True,
        dropout_p=0.0, scale=scale, **more,
    )  # fmt: skip
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].clone()  # the last two are parts of one message


@torch.library.custom_op("dtron::ring_attention", mutates_args=())
def ring_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, group: str) -> tuple[Tensor, Tensor]:
    """q [B, H, S, D], k and v [B, K, S, D] of this rank -> [B, H, S, D] and the scores' log-sum-exp [B, H, S].

    group: name of the process group over which the sequence is split.
    """
    return _forward(q, k, v, scale, group)


@torch.library.custom_op("dtron::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from those of the output."""
    return _backward(grad, q, k, v, out, lse, scale, group)


@ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, group: str) -> tuple[Tensor, Tensor]:
    b, h, s, d = q.shape
    return q.new_empty(b, s, h, d).transpose(1, 2), q.new_empty(b, h, s, dtype=torch.float32)


@ring_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *qkv, ctx.scale, ctx.group = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *ring_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.group), None, None


ring_attention.register_autograd(_differentiate, setup_context=_save)

# What each does, for who must see it.
OPERATORS: dict[Any, Any] = {
    torch.ops.dtron.ring_attention: _forward,
    torch.ops.dtron.ring_attention_backward: _backward,
}
