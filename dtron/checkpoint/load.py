"""Loading: which checkpoint a run resumes from, whether it is what was written, and its tensors into any layout.

How a checkpoint meets another layout: tensors are saved as DTensors under the plain model's names
(`save.named_tensors`), so DCP's index knows which part of the whole tensor each file holds. To load, this rank's
tensors of the layout at hand are given to DCP under the same names; it reads into them the parts that overlap. No
tensor is gathered. Everything else, the step and the samples consumed, is in the manifest, the same for every layout.
"""

import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dtron.checkpoint import hf, hf_folder, hf_form
from dtron.checkpoint.files import (
    ASSETS,
    MANIFEST,
    DamagedError,
    Manifest,
    find_damage,
    holds_checkpoints,
    quarantine,
    read_manifest,
    restore_assets,
    steps_in,
)
from dtron.checkpoint.reader import METADATA, reader_of
from dtron.checkpoint.save import first_error, named_tensors, reason
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError
from dtron.parallel.compose import ParallelModel
from dtron.ranks.agree import from_all_ranks, from_rank_0, raise_first_problem, warn_on_rank_0

__all__ = [
    "Kind",
    "check_excluded",
    "check_source",
    "create_state",
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

log = logging.getLogger(__name__)

Kind = Literal["dtron", "hf"]  # of a checkpoint: whose


def check_source(checkpoint: StoragePath) -> None:
    """UserError unless weights can be loaded from `checkpoint`: one of dtron's or Hugging Face's."""
    key = "checkpoint.initial_load_path"
    try:
        names = checkpoint.names()
        if not names:
            raise UserError(f"{key}: there is no folder {checkpoint}, or it is empty")
        if (kind := kind_of(checkpoint)) is None:
            hf_folder.check_foreign(checkpoint, names)
            inside = [name for name in names if name.startswith("step-")]
            hint = f"; did you mean {checkpoint / inside[-1]}?" if inside else ""
            raise UserError(
                f"{key}: {checkpoint} is no checkpoint, it has neither {MANIFEST} nor {METADATA}, nor safetensors{hint}"
            )
        if kind == "dtron":
            read_manifest(checkpoint)
        if kind == "hf":
            hf.entries_of(hf_folder.local(checkpoint))
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
    if not hf_folder.is_hf(names):
        return None
    hf_folder.check_foreign(checkpoint, names)
    return "hf"


def is_torchtitan(checkpoint: StoragePath) -> bool:
    """Whether torchtitan saved a Llama there, as its tensors' names show. UserError if DCP's index is damaged."""
    names = checkpoint.names()
    if METADATA not in names or MANIFEST in names:
        return False
    saved = reader_of(checkpoint).read_metadata().state_dict_metadata
    return not {"tok_embeddings.weight", "model.tok_embeddings.weight"}.isdisjoint(saved)


def load_initial(
    checkpoint: StoragePath,
    model: ParallelModel,
    optimizers: list[torch.optim.Optimizer] | None,
    exclude: Sequence[str],
    whole: nn.Module,
    grow: bool = False,
) -> None:
    """What a fresh run starts with, from another run of dtron, verified first, or from Hugging Face.

    whole: the plain model, on meta. grow: embedding and head may have more rows than there are, which keep their
    initial values.
    UserError on all ranks if the checkpoint is damaged or does not fit.
    """
    if from_rank_0(lambda: kind_of(checkpoint)) != "hf":
        verify_on_all_ranks(checkpoint, needs_assets=False)
        load(checkpoint, model, optimizers, exclude, grow)
        return

    def excluded(name: str) -> bool:
        return _is_excluded(name, exclude)

    def read(tensors: dict[str, Tensor]) -> None:
        dcp.load(tensors, storage_reader=hf.Reader(hf_folder.local(checkpoint), entries, grown))

    if optimizers:
        raise UserError(f"{checkpoint} holds no optimizer state; set checkpoint.initial_load_model_only = true")
    hint = "choose the dimensions of its config.json: model.hf_config_path, and no keys that override it"
    entries, grown = from_rank_0(lambda: fitting_entries(checkpoint, whole, excluded, hint, grow))
    _log_grown(grown, {name: entries[name].shape for name in grown})
    _fill(checkpoint, model, optimizers, exclude, read)


def fitting_entries(
    checkpoint: StoragePath,
    whole: nn.Module,
    excluded: Callable[[str], bool] = lambda name: False,
    hint: str = "its config.json is of another model",
    grow: bool = False,
) -> tuple[dict[str, hf.Entry], dict[str, tuple[int, ...]]]:
    """What a Hugging Face folder holds, and the model's shapes of the tensors that have more rows in it, if `grow`.

    UserError if it is not all there, or not this model's.
    """
    folder = hf_folder.local(checkpoint)
    entries = hf.entries_of(folder)
    if not (folder / "config.json").is_file():
        log.warning("%s has no config.json; its weights are taken to have Llama's names and order of rows", folder)
    expected = {f"model.{name}": tuple(p.shape) for name, p in whole.named_parameters()}
    form, tied = hf_form.form_of_folder(folder), hf_form.HEAD not in expected
    if tied and hf.EMBEDDING not in entries and hf_form.HEAD in entries:  # some save the one under the other name
        entries[hf.EMBEDDING] = entries.pop(hf_form.HEAD)
    shapes = {name: entry.shape for name, entry in entries.items()}
    grown = {name: s for name, s in hf.grown_shapes(shapes, expected).items() if grow and not excluded(name)}

    def shown(name: str) -> str:
        return entries[name].stored if name in entries else form.their_names(name, expected[name])[0]

    hf.check_fits(checkpoint, shapes | grown, expected, excluded, hint, shown)
    hf.check_tied(folder, entries, tied)
    return entries, grown


def _log_grown(grown: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in grown.items():
        log.info(
            "%s has %d rows in the initial weights and %d here (model.vocab_size): the %d new ones keep their initial "
            "values", name.removeprefix("model."), shapes[name][0], shape[0], shape[0] - shapes[name][0],
        )  # fmt: skip


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
            manifest = verify_on_all_ranks(checkpoint, needs_assets=False)
        except DamagedError as error:
            if load_step != -1:
                raise
            warn_on_rank_0(f"{error}; going back to the checkpoint before it")
            damaged.append(checkpoint)
            continue
        for checkpoint in [] if keep else damaged:
            target = from_rank_0(lambda: quarantine(checkpoint))  # noqa: B023 - called at once
            warn_on_rank_0(f"{checkpoint} is kept as {target.name}")
        if not keep:
            from_rank_0(lambda: restore_assets(folder / f"step-{step}"))  # noqa: B023 - called at once
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


def verify_on_all_ranks(checkpoint: StoragePath, *, needs_assets: bool = True) -> Manifest:
    """The manifest of a checkpoint whose files are as they were written. Each rank reads a share of them.

    needs_assets: false where the tensors are enough; then a lost or altered config.json or tokenizer is a warning.
    DamagedError, naming the files, or UserError, if one cannot be read, on all ranks.
    """
    manifest = from_rank_0(lambda: read_manifest(checkpoint))
    rank, world = dist.get_rank(), dist.get_world_size()
    mine: tuple[list[str], list[str], str]
    files = sorted(manifest.files.items())[rank::world]
    spare = [] if needs_assets else [file for file in files if file[0] in ASSETS]
    try:
        needed = [file for file in files if file not in spare]
        mine = find_damage(checkpoint, needed), find_damage(checkpoint, spare), ""
    except OSError as error:
        mine = [], [], f"rank {rank}: {error}"
    found = from_all_ranks(mine)
    if unread := [error for *_, error in found if error]:
        raise UserError(f"{checkpoint} cannot be read ({unread[0]}); try again when the storage answers")
    if problems := [problem for part, _, _ in found for problem in part]:
        more = f" and {len(problems) - 3} files more" if len(problems) > 3 else ""
        raise DamagedError(f"{checkpoint} is damaged: {'; '.join(problems[:3])}{more}")
    if lesser := [problem for _, part, _ in found for problem in part]:
        warn_on_rank_0(
            f"{checkpoint}: {'; '.join(lesser)}; its tensors are whole, and no more is needed: the next checkpoint has "
            "the file again"
        )
    return manifest


def load(
    checkpoint: StoragePath,
    model: ParallelModel,
    optimizers: list[torch.optim.Optimizer] | None,
    exclude: Sequence[str] = (),
    grow: bool = False,
) -> None:
    """Read weights, and optimizer state unless None, into this layout, without the parameters that `exclude` names.

    grow: as in `load_initial`; the optimizer state of new rows is 0.
    UserError on all ranks if the checkpoint does not fit.
    """
    reader = reader_of(checkpoint)

    def read(tensors: dict[str, Tensor]) -> None:
        _check_fits(checkpoint, reader, tensors, grow)
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
    for optimizer in optimizers or ():
        create_state(optimizer)
    named = [(name, tensor) for name, tensor, _ in named_tensors(model, optimizers)]
    named = [(name, tensor) for name, tensor in named if not _is_excluded(name, exclude)]
    tensors = dict(reversed(named))  # of two copies of a tied parameter the first
    try:
        read(tensors)
    except (dcp.api.CheckpointException, OSError) as error:
        if isinstance(first := first_error(error), UserError):
            raise first from None
        raise UserError(f"{checkpoint} cannot be read: {reason(error)}") from error
    with torch.no_grad():
        for name, tensor in named:
            if tensors[name] is not tensor:
                tensor.copy_(tensors[name])


def check_excluded(patterns: Sequence[str], names: Sequence[str], key: str = "checkpoint.exclude_from_loading") -> None:
    """UserError if a pattern of the key names no parameter."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"{key}: {pattern!r} fits no parameter; expected names or patterns such as {names[-1]} or layers.0.*"
            )


def _is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """name: `model.<parameter>` or `optimizer.<parameter>.<state>`."""
    kind, _, parameter = name.partition(".")
    parameter = parameter.rpartition(".")[0] if kind == "optimizer" else parameter
    return any(fnmatch.fnmatch(parameter, pattern) for pattern in patterns)


def _check_fits(checkpoint: StoragePath, reader: Any, tensors: dict[str, Tensor], grow: bool) -> None:
    """UserError on all ranks if any rank's tensors are not all in the checkpoint, each in its shape.

    grow: the reader is told of the embedding and the head that have more rows here.
    """
    problem, saved = "", {}
    try:
        saved = reader.read_metadata().state_dict_metadata
    except (UserError, OSError) as error:
        problem = f"{error}"
    raise_first_problem(problem)
    if grow:
        _let_grow(reader, saved, tensors)
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[0].startswith("optimizer."), item[0])):
        if name not in saved:
            problem = f"it has no {name}"
            if name.startswith("optimizer."):
                problem += " (set checkpoint.initial_load_model_only = true to take the weights alone)"
        elif not isinstance(saved[name], TensorStorageMetadata):
            problem = f"{name} is no tensor there"
        elif name not in reader.grown and tuple(saved[name].size) != tuple(tensor.shape):
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


def _let_grow(reader: Any, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Tell `reader` of the embedding and the head that have more rows here, and of their optimizer state."""
    shapes = {name: tuple(entry.size) for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
    grown = hf.grown_shapes(shapes, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    _log_grown(grown, shapes)
    reader.grown = {
        name: torch.Size(grown[weight])
        for weight in grown
        for name, shape in shapes.items()
        if name == weight
        or (name.startswith(f"optimizer.{weight.removeprefix('model.')}.") and shape == shapes[weight])
    }


@torch.no_grad()
def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer allocate its state, all 0, by a step that changes nothing: zero gradients, learning rate 0."""
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
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()  # a count of steps, above all
