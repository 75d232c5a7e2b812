"""Dropout in a comparison: left out where values are compared, and its draws compared between ranks."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["Draw", "alike", "recorded_draws", "without_dropout"]


@dataclass(frozen=True)
class Draw:
    """One call of dropout on one rank. module: that was entered last before it. inputs, kept: digests of the local
    values that came in and of those that were kept.
    """

    module: str
    inputs: str
    kept: str


@contextlib.contextmanager
def without_dropout() -> Iterator[None]:
    """`torch.nn.functional.dropout`, which `nn.Dropout` calls, keeps everything."""

    def keep(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return input

    with patch.object(F, "dropout", keep):
        yield


@contextlib.contextmanager
def recorded_draws(parts: Sequence[nn.Module]) -> Iterator[list[Draw]]:
    """The draws of a step of these modules, of recomputations too, in their order."""
    draws: list[Draw] = []
    real, entered = F.dropout, [""]

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return real(input, p, training, inplace)
        factor = real(input.detach() * 0 + 1, p, True)  # as many numbers are drawn as by itself
        draws.append(Draw(entered[0], _digest(input), _digest(factor != 0)))
        return input * factor

    def enter(name: str) -> None:
        entered[0] = name

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: enter(name))
        for part in parts
        for name, module in part.named_modules()
        if name
    ]
    try:
        with patch.object(F, "dropout", dropout):
            yield draws
    finally:
        for hook in hooks:
            hook.remove()


def _digest(tensor: Tensor) -> str:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return hashlib.sha256(local.detach().contiguous().numpy().tobytes()).hexdigest()


def alike(draws: Sequence[Sequence[Draw]]) -> tuple[int, int, str] | None:
    """Two ranks, and the module, whose draws are wrong: alike for different values, or different for the same values.

    draws: of ranks that run the same modules in the same order.
    """
    for of_call in zip(*draws, strict=False):
        for i, first in enumerate(of_call):
            for j, second in enumerate(of_call[i + 1 :], i + 1):
                if (first.inputs == second.inputs) != (first.kept == second.kept):
                    return i, j, first.module
    return None
