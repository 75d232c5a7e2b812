"""Another forward for a module, without an object of its own in each block.

A function that is an attribute of an instance is another object in every block. A compiled block is guarded by it, so
that Dynamo compiles each block anew, and after eight it gives up (`recompile_limit`). A class is the same in all.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

__all__ = ["replace_forward"]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give `module` a class of which `forward(module, ...)` is the method.

    forward: a function of a file, not one made for this module; what differs between modules is in their attributes.
    """
    module.__class__ = _subclass(type(module), forward)  # type: ignore[arg-type]


@cache
def _subclass(base: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    members = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), members)
