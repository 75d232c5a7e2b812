"""Which module is at work, in forward and backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtron.plan.recorder import Recorder

__all__ = ["tap"]


def tap(recorder: Recorder, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, a module's forward, during which and during whose backward `recorder` knows the module's name."""

    def begin_backward(_: Tensor) -> None:
        recorder.backward_module = name

    def end_backward(_: Tensor) -> None:
        recorder.backward_module = ""

    def tapped(first: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.forward_modules.append(name)
        try:
            out = run(first, *args, **kwargs)
        finally:
            recorder.forward_modules.pop()
        if out is not first:  # else nothing is computed
            _on_gradient(first, end_backward)
            _on_gradient(out[0] if isinstance(out, tuple) else out, begin_backward)
        return out

    return tapped


def _on_gradient(tensor: Any, reached: Callable[[Tensor], None]) -> None:
    if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
        tensor.register_hook(reached)
