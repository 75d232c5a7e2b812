"""Loading: which checkpoint a run resumes from, whether it is what was written, and its tensors into any layout.

How a checkpoint meets another layout: tensors are saved as DTensors under the plain model's names
(`save.named_tensors`), so DCP's index knows which part of the whole tensor each file holds. To load, this rank's
tensors of the layout at hand are given to DCP under the same names; it reads into them the parts that overlap. No
tensor is gathered. Everything else, the step and the samples consumed, is in the manifest, the same for every layout.
"""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from dtron.checkpoint import hf
from dtron.checkpoint.files import (
    MANIFEST,
    DamagedError,
    Manifest,
    find_damage,
    holds_checkpoints,
    quarantine,
    read_manifest,
    steps_in,
)
from dtron.checkpoint.save import named_tensors
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError
from dtron.parallel.compose import ParallelModel
from dtron.ranks.agree import from_all_ranks, from_rank_0, raise_first_problem, warn_on_rank_0

__all__ = [
    "Kind",
    "check_excluded",
    "check_source",
    "find_good",
    "fitting_entries",
    "is_torchtitan",
    "kind_of",
    "load",
    "load_initial",
    "newest_without_state",
    "resumable_steps",
    "verify_on_all_ranks",
]

METADATA = ".metadata"
Kind = Literal["dtron", "hf"]  # of a checkpoint: whose


def check_source(checkpoint: StoragePath) -> None:
    """UserError unless weights can be loaded from `checkpoint`: one of dtron's or Hugging Face's."""
    key = "checkpoint.initial_load_path"
    try:
        names = checkpoint.names()
        if not names:
            raise UserError(f"{key}: there is no folder {checkpoint}, or it is empty")
        if (kind := kind_of(checkpoint)) is None:
            inside = [name for name in names if name.startswith("step-")]
            hint = f"; did you mean {checkpoint / inside[-1]}?" if inside else ""
            raise UserError(
                f"{key}: {checkpoint} is no checkpoint, it has neither {MANIFEST} nor {METADATA}, nor safetensors{hint}"
            )
        if kind == "dtron":
            read_manifest(checkpoint)
        if kind == "hf":
            hf.entries_of(hf.local(checkpoint))
    except OSError as error:
        raise UserError(f"{key}: {checkpoint} cannot be read: {error}") from None


def kind_of(checkpoint: StoragePath) -> Kind | None:
    """Whose weights lie there. UserError for DCP files that are not dtron's, torchtitan's with what to do."""
    names = checkpoint.names()
    if MANIFEST in names:
        return "dtron"
    if is_torchtitan(checkpoint):
        raise UserError(
            f"{checkpoint} is a checkpoint of torchtitan, which is not read as it is; convert it, and name the new "
            f"folder in its place: dtron convert {checkpoint} NEW_FOLDER --config CONFIG_JSON_OF_THE_MODEL"
        )
    if METADATA in names:
        raise UserError(f"{checkpoint} is neither a checkpoint of dtron (it has no {MANIFEST}) nor one of torchtitan")
    return "hf" if hf.is_hf(names) else None


def is_torchtitan(checkpoint: StoragePath) -> bool:
    """Whether torchtitan saved a Llama there, as its tensors' names show. UserError if DCP's index is damaged."""
    names = checkpoint.names()
    if METADATA not in names or MANIFEST in names:
        return False
    try:
        saved = checkpoint.reader().read_metadata().state_dict_metadata
    except Exception as error:  # a pickle that is damaged may raise anything
        raise UserError(f"{checkpoint / METADATA} cannot be read: {type(error).__name__}: {error}") from None
    return not {"tok_embeddings.weight", "model.tok_embeddings.weight"}.isdisjoint(saved)


def load_initial(
    checkpoint: StoragePath,
    model: ParallelModel,
    optimizers: list[torch.optim.Optimizer] | None,
    exclude: Sequence[str],
    whole: nn.Module,
) -> None:
    """What a fresh run starts with, from another run of dtron, verified first, or from Hugging Face.

    whole: the plain model, on meta.
    UserError on all ranks if the checkpoint is damaged or does not fit.
    """
    if from_rank_0(lambda: kind_of(checkpoint)) != "hf":
        verify_on_all_ranks(checkpoint)
        load(checkpoint, model, optimizers, exclude)
        return

    def excluded(name: str) -> bool:
        return _is_excluded(name, exclude)

    def read(tensors: dict[str, Tensor]) -> None:
        dcp.load(tensors, storage_reader=hf.Reader(hf.local(checkpoint), entries))

    if optimizers:
        raise UserError(f"{checkpoint} holds no optimizer state; set checkpoint.initial_load_model_only = true")
    hint = "choose the dimensions of its config.json: model.hf_config_path, and no keys that override it"
    entries = from_rank_0(lambda: fitting_entries(checkpoint, whole, excluded, hint))
    _fill(checkpoint, model, optimizers, exclude, read)


def fitting_entries(
    checkpoint: StoragePath,
    whole: nn.Module,
    excluded: Callable[[str], bool] = lambda name: False,
    hint: str = "its config.json is of another model",
) -> dict[str, hf.Entry]:
    """What a Hugging Face folder holds. UserError if it is not all there, or not this model's."""
    folder = hf.local(checkpoint)
    entries = hf.entries_of(folder)
    expected = {f"model.{name}": tuple(p.shape) for name, p in whole.named_parameters()}
    hf.check_fits(checkpoint, {name: entry.shape for name, entry in entries.items()}, expected, excluded, hint)
    hf.check_tied(folder, entries, tied=hf.HEAD not in expected)
    return entries


def resumable_steps(folder: StoragePath) -> list[int]:
    """Steps that a run may resume from, or would have: all but those with weights only. Descending."""
    steps = []
    for step in reversed(steps_in(folder)):
        try:
            resumable = not read_manifest(folder / f"step-{step}").progress.model_only
        except DamagedError:
            resumable = True  # reported when it is its turn
        if resumable:
            steps.append(step)
    return steps


def find_good(folder: StoragePath, load_step: int, keep: bool) -> Manifest | None:
    """On all ranks: the newest checkpoint in `folder` that is as it was written; None if there is none at all.

    One that is damaged is named, and the one before it is looked at; once a good one is found, the damaged ones are set
    aside unless `keep`, so that their steps can be saved anew. UserError if none is good but there were some, if the
    one that `load_step` asks for (-1: the newest) is not, and if one cannot be read.
    """
    steps = from_rank_0(lambda: resumable_steps(folder))
    if load_step != -1:
        if load_step not in steps:
            there = ", ".join(map(str, reversed(steps))) or "none"
            raise UserError(
                f"{folder} has no checkpoint of step {load_step} with optimizer state; set checkpoint.load_step to one "
                f"that is there ({there}), or to -1 for the newest"
            )
        steps = [load_step]
    damaged: list[StoragePath] = []
    for step in steps:
        checkpoint = folder / f"step-{step}"
        try:
            manifest = verify_on_all_ranks(checkpoint)
        except DamagedError as error:
            if load_step != -1:
                raise
            warn_on_rank_0(f"{error}; going back to the checkpoint before it")
            damaged.append(checkpoint)
            continue
        for checkpoint in [] if keep else damaged:
            target = from_rank_0(lambda: quarantine(checkpoint))  # noqa: B023 - called at once
            warn_on_rank_0(f"{checkpoint} is kept as {target.name}")
        return manifest
    only_damaged: bool = from_rank_0(lambda: holds_checkpoints(folder) and not steps_in(folder))
    if damaged or only_damaged:
        raise UserError(
            f"no checkpoint in {folder} is as it was written; nothing starts from scratch on its own: move the run "
            "folder away, or set another job.dump_folder"
        )
    return None


def newest_without_state(folder: StoragePath) -> int | None:
    """Step of the newest checkpoint that holds the weights only: the end of a run, which cannot be resumed."""
    for step in reversed(steps_in(folder)):
        try:
            if read_manifest(folder / f"step-{step}").progress.model_only:
                return step
        except DamagedError:
            continue
    return None


def verify_on_all_ranks(checkpoint: StoragePath) -> Manifest:
    """The manifest of a checkpoint whose files are as they were written. Each rank reads a share of them.

    DamagedError, naming the files, or UserError, if one cannot be read, on all ranks.
    """
    manifest = from_rank_0(lambda: read_manifest(checkpoint))
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        mine: tuple[list[str], str] = find_damage(checkpoint, sorted(manifest.files.items())[rank::world]), ""
    except OSError as error:
        mine = [], f"rank {rank}: {error}"
    found = from_all_ranks(mine)
    if unread := [error for _, error in found if error]:
        raise UserError(f"{checkpoint} cannot be read ({unread[0]}); try again when the storage answers")
    if problems := [problem for part, _ in found for problem in part]:
        more = f" and {len(problems) - 3} files more" if len(problems) > 3 else ""
        raise DamagedError(f"{checkpoint} is damaged: {'; '.join(problems[:3])}{more}")
    return manifest


def load(
    checkpoint: StoragePath,
    model: ParallelModel,
    optimizers: list[torch.optim.Optimizer] | None,
    exclude: Sequence[str] = (),
) -> None:
    """Read weights, and optimizer state unless None, into this layout, without the parameters that `exclude` names.

    UserError on all ranks if the checkpoint does not fit.
    """
    reader = checkpoint.reader()

    def read(tensors: dict[str, Tensor]) -> None:
        _check_fits(checkpoint, reader, tensors)
        dcp.load(tensors, storage_reader=reader)

    _fill(checkpoint, model, optimizers, exclude, read)


def _fill(
    checkpoint: StoragePath,
    model: ParallelModel,
    optimizers: list[torch.optim.Optimizer] | None,
    exclude: Sequence[str],
    read: Callable[[dict[str, Tensor]], None],
) -> None:
    """Let `read` fill the tensors of this rank in place, by their layout-free names."""
    if optimizers:
        _create_state(optimizers)
    named = [(name, tensor) for name, tensor, _ in named_tensors(model, optimizers)]
    kept = [(name, tensor) for name, tensor in named if _is_excluded(name, exclude)]
    named = [(name, tensor) for name, tensor in named if not _is_excluded(name, exclude)]
    tensors = dict(reversed(named))  # of two copies of a tied parameter the first
    try:
        read(tensors)
    except (dcp.api.CheckpointException, OSError) as error:
        raise UserError(f"{checkpoint} cannot be read: {str(error).strip().splitlines()[-1]}") from error
    with torch.no_grad():
        for name, tensor in named:
            if tensors[name] is not tensor:
                tensor.copy_(tensors[name])
        for name, tensor in kept:
            if name.startswith("optimizer."):
                tensor.zero_()  # as it was before the step that made it


def check_excluded(patterns: Sequence[str], names: Sequence[str]) -> None:
    """UserError if a pattern names no parameter."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"checkpoint.exclude_from_loading: {pattern!r} fits no parameter; expected names or patterns such as "
                f"{names[-1]} or layers.0.*"
            )


def _is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """name: `model.<parameter>` or `optimizer.<parameter>.<state>`."""
    kind, _, parameter = name.partition(".")
    parameter = parameter.rpartition(".")[0] if kind == "optimizer" else parameter
    return any(fnmatch.fnmatch(parameter, pattern) for pattern in patterns)


def _check_fits(checkpoint: StoragePath, reader: Any, tensors: dict[str, Tensor]) -> None:
    """UserError on all ranks if any rank's tensors are not all in the checkpoint, each in its shape."""
    saved = reader.read_metadata().state_dict_metadata
    problem = ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[0].startswith("optimizer."), item[0])):
        if name not in saved:
            problem = f"it has no {name}"
            if name.startswith("optimizer."):
                problem += " (set checkpoint.initial_load_model_only = true to take the weights alone)"
        elif tuple(saved[name].size) != tuple(tensor.shape):
            problem = f"{name} is {list(saved[name].size)} there and {list(tensor.shape)} in this model"
        if problem:
            break
    raise_first_problem(
        problem,
        lambda found: (
            f"{checkpoint} does not fit this model: {found}; change the model's dimensions, or leave the parameter out "
            "by checkpoint.exclude_from_loading where it is an initial_load_path"
        ),
    )


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
