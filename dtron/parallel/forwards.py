"""Another forward for a module, without an object of its own in each block.

A function that is an attribute of an instance is another object in every block. A compiled block is guarded by it, so
that Dynamo compiles each block anew, and after eight it gives up (`recompile_limit`). A class is the same in all.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

__all__ = ["Forward", "replace_forward"]

Forward = Callable[..., Any]


def replace_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> None:
    """Give `module` a class whose forward is `make(the forward of its present class)`, a function of the module, too.

    make: a function of a file, not one made for this module; what differs between modules is in their attributes.
    """
    module.__class__ = _subclass(type(module), make)  # type: ignore[arg-type]


@cache
def _subclass(base: type[nn.Module], make: Callable[[Forward], Forward]) -> type[nn.Module]:
    members = {"forward": make(base.forward), "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), members)
