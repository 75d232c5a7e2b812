"""AdamW with fp32 weights and moments of 16 bits: 8 bytes of weights and state per parameter in place of 12.

The arithmetic is fp32, and only what is kept from step to step is rounded. In bfloat16 two neighbouring numbers differ
by 2^-8 to 2^-7, and a moment moves by (1 - beta) of its distance to the new value: with a beta above 0.99 it would stay
where it is, hence `LARGEST_BETA`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["LARGEST_BETA", "AdamW", "first_chunk"]

LARGEST_BETA = 0.99
# Elements updated at a time in eager mode, each with about six temporaries of 4 bytes; on a CPU they stay in its cache.
CHUNK, CPU_CHUNK = 2**24, 2**16


def _update(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad_scale: Tensor, found_inf: Tensor, lr: Tensor,
    betas: tuple[Tensor, Tensor], corrections: tuple[Tensor, Tensor], eps: float, weight_decay: Tensor,
) -> None:  # fmt: skip
    """One step of a flat shard in place, clipped and skipped within. Compiled it is one pass over memory.

    All but eps are tensors, because numbers that change would compile it anew.
    """
    grad = grad / grad_scale
    mean = torch.lerp(exp_avg.float(), grad, 1 - betas[0])
    square = torch.lerp(exp_avg_sq.float(), grad * grad, 1 - betas[1])
    step = lr / corrections[0] * mean / ((square / corrections[1]).sqrt() + eps)
    skip = found_inf > 0
    p.copy_(torch.where(skip, p, p * (1 - lr * weight_decay) - step))
    exp_avg.copy_(torch.where(skip, exp_avg, mean.to(exp_avg.dtype)))
    exp_avg_sq.copy_(torch.where(skip, exp_avg_sq, square.to(exp_avg_sq.dtype)))


class AdamW(torch.optim.Optimizer):
    """Loshchilov and Hutter 2019 (arXiv 1711.05101), as `torch.optim.AdamW(fused=True)`, with moments of `state_dtype`.

    Its state has the names and shapes of torch's. `grad_scale` and `found_inf`, scalars on the device, are torch.amp's:
    gradients are divided by the one, and where the other is 1 a step changes nothing.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, state_dtype: torch.dtype
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._dtype = state_dtype
        self.update: Callable[..., None] = _in_chunks  # of a flat shard

    def compile(self, backend: str) -> None:
        """Make the update one pass over memory, by this backend of torch.compile."""
        self.update = torch.compile(_update, dynamic=True, fullgraph=True, backend=backend)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter with a gradient."""
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._step_group(group, parameters)

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        device = _local(parameters[0]).device

        def full(value: float) -> Tensor:  # a fill, which the host does not wait for
            return torch.full((), value, device=device)

        states = [self._state_of(p, device) for p in parameters]
        found = full(0.0) if self.found_inf is None else self.found_inf
        scale = full(1.0) if self.grad_scale is None else self.grad_scale
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, [1 - found] * len(steps))
        # At least 1: of a first step that is skipped, whose result is not taken.
        counts = torch.stack(steps).double().clamp(min=1)
        corrections = [(1 - beta**counts).float().unbind() for beta in group["betas"]]
        betas = tuple(full(beta) for beta in group["betas"])
        lr, decay = full(group["lr"]), full(group["weight_decay"])
        for i, (p, state) in enumerate(zip(parameters, states, strict=True)):
            assert p.grad is not None
            shards = [_local(t).view(-1) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
            if shards[0].numel():
                correction = corrections[0][i], corrections[1][i]
                self.update(*shards, scale, found, lr, betas, correction, group["eps"], decay)

    def _state_of(self, p: Tensor, device: torch.device) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(p, dtype=self._dtype)
        return state


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _in_chunks(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *scalars: Any) -> None:
    """The update in eager mode, whose temporaries would else be six times a matrix."""
    size = CPU_CHUNK if p.device.type == "cpu" else CHUNK
    for parts in zip(*(t.split(size) for t in (p, grad, exp_avg, exp_avg_sq)), strict=True):
        _update(*parts, *scalars)


def first_chunk(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *scalars: Any) -> None:
    """The beginning of the update on a GPU, for dry runs: every chunk takes and frees the same memory."""
    _update(p[:CHUNK], grad[:CHUNK], exp_avg[:CHUNK], exp_avg_sq[:CHUNK], *scalars)
