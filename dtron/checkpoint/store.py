"""Checkpoints with torch.distributed.checkpoint (DCP), under names that know no layout.

A run folder's `checkpoint/step-N` holds the tensors as DCP files, each rank writing its own shards, and
`dtron.json` with the scalars. Names are the plain model's: `model.<parameter>` and
`optimizer.<parameter>.<state>`, so any layout loads what any other saved; DCP cuts and joins the
shards. The second copy of a tied parameter is saved and loaded under the first one's name.
A folder gets its final name only when it is whole; what has another name is never read.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dtron.errors import UserError
from dtron.parallel.compose import ParallelModel

__all__ = ["Progress", "load", "newest", "read_progress", "save", "steps_in"]

PROGRESS_FILE = "dtron.json"


@dataclass
class Progress:
    """Where a run is: everything besides the tensors that a resume needs."""

    step: int = 0  # optimizer steps done
    consumed: int = 0  # samples of the data order taken
    tokens: int = 0  # consumed, in tokens
    global_batch_size: int = -1  # sequences a step
    attempt: int = 1  # 1 for a fresh run, one more after each resume
    model_only: bool = False
    data_fingerprint: str = ""  # of the training data, where the dataset has one
    streams: dict[str, Any] = field(default_factory=dict)  # places in sources that are tokenized on the way


def steps_in(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in `folder`, ascending."""
    steps = (p.name.removeprefix("step-") for p in folder.glob("step-*") if (p / PROGRESS_FILE).is_file())
    return sorted(int(step) for step in steps if step.isdecimal())


def damaged_in(folder: Path) -> list[Path]:
    """Folders named like a finished checkpoint that are none: something took files away after it was saved."""
    named = (p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal())
    return sorted(p for p in named if not (p / PROGRESS_FILE).is_file())


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that a run can resume from, one with optimizer state."""
    for step in reversed(steps_in(folder)):
        path = folder / f"step-{step}"
        if not read_progress(path).model_only:
            return path
    return None


def read_progress(path: Path) -> Progress:
    """The scalars of a checkpoint. UserError if it is none."""
    try:
        return Progress(**json.loads((path / PROGRESS_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is no dtron checkpoint: its {PROGRESS_FILE} is missing or unreadable ({error})"
        ) from None


def save(path: Path, model: ParallelModel, optimizers: list[torch.optim.Optimizer] | None, progress: Progress) -> None:
    """Write a checkpoint on all ranks; optimizers None: weights only. FileExistsError if there is one of that step."""
    partial = path.with_name(path.name + ".partial")
    if dist.get_rank() == 0:
        if path.exists():
            raise FileExistsError(f"{path} exists already; nothing is overwritten")
        shutil.rmtree(partial, ignore_errors=True)  # ours: a save that was killed
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(dict(reversed(list(_named(model, optimizers)))), checkpoint_id=str(partial))
    if dist.get_rank() == 0:
        with (partial / PROGRESS_FILE).open("w") as file:
            json.dump({**asdict(progress), "model_only": optimizers is None}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
    dist.barrier()


def load(path: Path, model: ParallelModel, optimizers: list[torch.optim.Optimizer] | None) -> None:
    """Read weights, and optimizer state unless None, into this layout. UserError if the checkpoint does not fit."""
    if optimizers:
        _create_state(optimizers)
    if not (path / ".metadata").is_file():
        raise UserError(f"{path} is damaged: its .metadata is missing; move it away to go on from the one before")
    named = list(_named(model, optimizers))
    tensors = dict(reversed(named))  # of two copies of a tied parameter the first
    try:
        dcp.load(tensors, checkpoint_id=str(path))
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} cannot be loaded into this model: {text[-1]}") from error
    with torch.no_grad():
        for name, tensor in named:
            if tensors[name] is not tensor:
                tensor.copy_(tensors[name])


def delete_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of `folder` (0: none), on rank 0."""
    if keep and dist.get_rank() == 0:
        for step in steps_in(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{step}")


def _named(model: ParallelModel, optimizers: list[torch.optim.Optimizer] | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor to save under its layout-free name; a tied parameter's copies have the same one."""
    for name, p in model.named_parameters():
        canonical = model.aliases.get(name, name)
        yield f"model.{canonical}", p.detach()
        for optimizer in optimizers or ():
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    yield f"optimizer.{canonical}.{key}", value


def _create_state(optimizers: list[torch.optim.Optimizer]) -> None:
    """Make the optimizers allocate their state, by a step that changes nothing: zero gradients, learning rate 0."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                if p.requires_grad:
                    p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
