"""The training loop and its front door: `from dtron.train.trainer import Trainer`.

The package can also be called, as `dtron.train(config)`: that is `dtron.library.train`, of a floor above this one.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, config: Any, overrides: Any = None, *, ranks: int = 1, quiet: bool = False) -> Any:
        return importlib.import_module("dtron.library").train(config, overrides, ranks=ranks, quiet=quiet)


sys.modules[__name__].__class__ = _Callable
