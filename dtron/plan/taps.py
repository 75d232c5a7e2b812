"""Marks in the autograd graph: where the backward of a module begins and where it ends."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtron.plan.recorder import Recorder

__all__ = ["tap"]


class _Mark(torch.autograd.Function):
    """The tensor unchanged; `reached` is called when its gradient is known."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reached: Callable[[], None]) -> Tensor:
        ctx.reached = reached
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.reached()
        return gradient, None


def mark(tensor: Any, reached: Callable[[], None]) -> Any:
    """`tensor`, whose gradient calls `reached`; as it is where there will be none."""
    if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
        return _Mark.apply(tensor, reached)
    return tensor


def tap(recorder: Recorder, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, a module's forward, during which and during whose backward `recorder` knows the module's name."""

    def begin_backward() -> None:
        recorder.backward_module = name

    def end_backward() -> None:
        recorder.backward_module = ""

    def tapped(first: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.forward_modules.append(name)
        try:
            out = run(mark(first, end_backward), *args, **kwargs)
        finally:
            recorder.forward_modules.pop()
        return mark(out, begin_backward)

    return tapped
