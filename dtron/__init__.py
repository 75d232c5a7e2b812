"""dtron: pre-training of Llama-like models with every dimension of parallelism, on torch.distributed alone.

The public names, which `import dtron` does not import yet: docs/library.md has them with types and errors.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["Config", "Run", "UserError", "__version__", "load_config", "load_model", "train"]

_HOME = {
    "Config": "dtron.config",
    "Run": "dtron.library",
    "UserError": "dtron.errors",
    "load_config": "dtron.library",
    "load_model": "dtron.library",
}


def __getattr__(name: str) -> Any:
    if name == "train":  # a package too, which can be called
        return importlib.import_module("dtron.train")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dtron' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
