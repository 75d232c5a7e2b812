"""Names in a config -> the code they stand for. Modules in job.custom_import add to it.

from dtron.registry import register
register("dataset", "mine", my_dataset)
"""

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from dtron.config.sections import Config, Dataset, Optimizer
from dtron.config.torchtitan import said_of
from dtron.data.build import build_by_path, names_a_place, stdlib
from dtron.errors import UserError
from dtron.models.families import FAMILIES
from dtron.models.flops import attention_flops_per_token
from dtron.models.hf import to_hf_config
from dtron.models.init import llama_init_std
from dtron.models.llama import Llama
from dtron.models.loss import cross_entropy
from dtron.models.spec import ModelSpec
from dtron.optim.adamw import AdamW
from dtron.optim.muon import Muon
from dtron.parallel.float8 import FLOAT8, to_float8
from dtron.parallel.tensor import llama_plan

__all__ = ["Kind", "cross_entropy", "find_dataset", "import_custom", "look_up", "register"]

Kind = Literal["model", "dataset", "loss", "optimizer", "converter"]


def _adam(cls: Any) -> Callable[..., torch.optim.Optimizer]:
    def make(groups: list[dict[str, Any]], c: Optimizer) -> torch.optim.Optimizer:
        if c.state_dtype != "float32":
            return AdamW(groups, c.lr, (c.beta1, c.beta2), c.eps, getattr(torch, c.state_dtype))
        loop = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
        return cls(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, **loop[c.implementation])

    return make


def _sgd(groups: list[dict[str, Any]], c: Optimizer) -> torch.optim.Optimizer:
    # torch has no fused SGD for sharded tensors (2.13); foreach is the fastest there is.
    return torch.optim.SGD(groups, lr=c.lr, momentum=c.beta1, foreach=c.implementation != "for-loop")


def _muon(groups: list[dict[str, Any]], c: Optimizer) -> torch.optim.Optimizer:
    m = c.muon
    peak = c.lr if m.lr is None else m.lr
    groups = [group | {"initial_lr": peak} for group in groups]
    return Muon(groups, peak, m.momentum, m.nesterov, m.ns_steps, m.adjust_lr_fn, getattr(torch, c.state_dtype))


# kind -> name -> code. Signatures: model: ModelSpec. dataset: as `dtron.data.build.stdlib`, giving a SequenceDataset.
# loss: (logits [B, S, V], labels [B, S]) -> loss of every token [B, S].
# optimizer: (param groups, optimizer section) -> torch Optimizer; Muon's groups are of matrices alone.
# converter: (meta model, config) -> model, before any parallelism.
_REGISTRY: dict[Kind, dict[str, Any]] = {
    "model": {
        name: ModelSpec(
            flavors,
            Llama,
            llama_init_std,
            attention_flops_per_token,
            llama_plan,
            True,
            to_hf_config,
            True,
            lambda config: config.variant,
        )  # fmt: skip
        for name, flavors in FAMILIES.items()
    },
    "dataset": {"stdlib": stdlib},
    "loss": {"cross_entropy": cross_entropy},
    "optimizer": {"AdamW": _adam(torch.optim.AdamW), "Adam": _adam(torch.optim.Adam), "SGD": _sgd, "Muon": _muon},
    "converter": dict.fromkeys(FLOAT8, to_float8),
}


def register(kind: Kind, name: str, code: Any) -> None:
    """Make `name` usable in a config. ValueError if another piece of code has the name."""
    known = _REGISTRY[kind].setdefault(name, code)
    if known is not code:
        raise ValueError(f"a {kind} named {name!r} is registered already: {known}")


TokenLoss = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[list[dict[str, Any]], Optimizer], torch.optim.Optimizer]
Converter = Callable[[nn.Module, Config], nn.Module]


@overload
def look_up(kind: Literal["model"], name: str, key: str) -> ModelSpec: ...
@overload
def look_up(kind: Literal["loss"], name: str, key: str) -> TokenLoss: ...
@overload
def look_up(kind: Literal["optimizer"], name: str, key: str) -> MakeOptimizer: ...
@overload
def look_up(kind: Literal["converter"], name: str, key: str) -> Converter: ...
@overload
def look_up(kind: Literal["dataset"], name: str, key: str) -> Callable[..., Any]: ...
def look_up(kind: Kind, name: str, key: str) -> Any:
    """The code behind `name`; `key` is the config key that named it, for the message."""
    names = _REGISTRY[kind]
    if name not in names:
        near = get_close_matches(name.lower(), {known.lower(): known for known in names}, 1)
        hint = f"did you mean {next(known for known in names if known.lower() == near[0])!r}? " if near else ""
        what = said_of(key, name) or " is unknown"
        raise UserError(f"{key} = {name!r}{what}; {hint}known: {', '.join(sorted(names)) or 'none'}")
    return names[name]


def find_dataset(section: Dataset, key: str) -> Any:
    """The builder of the data set a section names: a registered one, or that of something local or on the hub."""
    if section.dataset not in _REGISTRY["dataset"] and names_a_place(section):
        return build_by_path
    if section.dataset_path and section.dataset not in _REGISTRY["dataset"]:
        raise UserError(f"{key}_path = {section.dataset_path!r} is no file or folder here, and no hub name owner/name")
    try:
        return look_up("dataset", section.dataset, key)
    except UserError as error:
        here = Path(section.dataset)
        siblings = [str(path) for path in here.parent.glob("*")] if len(here.parts) > 1 else []
        near = get_close_matches(str(here), siblings, 1)
        hint = f" ({near[0]} is near)" if near else ""
        raise UserError(f"{error}; nor is it a file or folder here{hint}, or a hub name such as owner/name") from None


def import_custom(modules: list[str]) -> None:
    """Import the modules of job.custom_import; the working directory counts as a place to find them. UserError."""
    if modules and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the user's module does
            raise UserError(f"job.custom_import: cannot import {name!r}: {type(error).__name__}: {error}") from error
