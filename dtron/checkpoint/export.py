"""A checkpoint of dtron as a folder of Hugging Face: safetensors with an index, config.json, the tokenizer.

The files are shared out over the ranks. Each reads the tensors of its files from the checkpoint, whatever layout wrote
them, and holds no more than one file in memory. The folder gets its name when all of it is there.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dtron.checkpoint import hf, hf_folder
from dtron.checkpoint.files import ASSETS, WRITTEN
from dtron.checkpoint.hf_form import Form, form_of
from dtron.checkpoint.reader import reader_of
from dtron.checkpoint.save import first_error, reason
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError
from dtron.ranks.agree import from_rank_0, raise_first_problem

__all__ = ["FILE_BYTES", "ExportDtype", "assets_of", "check_out", "export", "replacing"]

FILE_BYTES = 5 * 10**9  # of one safetensors file, as transformers has it
ExportDtype = Literal["float32", "bfloat16", "float16"]


def assets_of(folder: StoragePath) -> dict[str, bytes]:
    """The files beside the weights: config.json, the tokenizer and their like."""
    return {name: (folder / name).read() for name in folder.names() if name in ASSETS}


def check_out(out: Path, force: bool, key: str = "the output folder") -> None:
    """UserError unless `out` can be made: it is not there, or empty, or may be replaced and holds a model alone."""
    if not out.exists() and not out.is_symlink():
        return
    folder = out.is_dir() and not out.is_symlink()
    if folder and not os.listdir(out):
        return
    if not force:
        raise UserError(f"{key} {out} is there already, and nothing is overwritten: name another, or use --force")
    foreign = [name for name in sorted(os.listdir(out)) if not _is_ours(name)] if folder else ["is no folder"]
    if foreign:
        what = f"it holds {foreign[0]}" if folder else "it is no folder"
        raise UserError(f"{key} {out} is not just a model ({what}), so --force does not replace it; move that away")


def _is_ours(name: str) -> bool:
    """Whether conversion writes files of this name."""
    return bool(WRITTEN.fullmatch(name) or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name))


@contextlib.contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A new folder beside `out`, which takes its place at the end, or is deleted where that is not reached.

    Its name is no one else's. What was in `out` is deleted last. UserError, as of `check_out`, for what has appeared
    there meanwhile.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    try:
        new.chmod(0o777 & ~_umask())  # mkdtemp keeps others out
        yield new
        check_out(out, force)
        _swap(new, out)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # a full disk is to have its space back
        raise


def _swap(new: Path, out: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{out.name}.old-", dir=out.parent))
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def export(
    checkpoint: StoragePath,
    out: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: ExportDtype | None,
    say: Callable[[str], None],
    *,
    force: bool = False,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the weights and assets of `checkpoint`, whose config.json is among them, to the folder `out`; on all ranks.

    say: may raise UserError, which ends the export. shapes: of the model that config.json describes, by
    `model.<parameter>`. dtype: of the weights; None: as they are.
    file_bytes: most bytes of a file of several tensors.
    UserError on all ranks where the checkpoint does not fit its config.json, and where the disk refuses.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    with contextlib.ExitStack() as stack:  # on rank 0 the folder is deleted if anything goes wrong, on any rank

        def begin() -> tuple[Path, Plan, Form]:
            file = checkpoint / "config.json"
            form = form_of(json.loads(file.read()), str(file))
            plan = _plan(checkpoint, out, shapes, form, dtype, force, file_bytes)
            return stack.enter_context(replacing(out, force)), plan, form

        partial, plan, form = from_rank_0(begin)
        problem = ""
        for number in range(rank, len(plan), world):
            try:
                _write_file(checkpoint, partial / _file_name(number, len(plan)), plan[number], form)
                say(f"{number + 1} of {len(plan)} files written")
            except (Exception, CheckpointException) as error:  # safetensors' errors derive from nothing else
                known = isinstance(first_error(error), UserError)
                problem = reason(error) + ("" if known else "; make room, or name another disk")
                break
        raise_first_problem(problem, lambda found: f"{checkpoint} could not be written to {out}: {found}")
        from_rank_0(lambda: _finish(checkpoint, partial, plan, form))


Plan = list[dict[str, tuple[tuple[int, ...], torch.dtype]]]  # of each file: name of ours -> shape, dtype


def _plan(
    checkpoint: StoragePath,
    out: Path,
    shapes: Mapping[str, tuple[int, ...]],
    form: Form,
    dtype: ExportDtype | None,
    force: bool,
    file_bytes: int,
) -> Plan:
    """Check everything, and share out the tensors over files, in the order of the model, what is fused together."""
    check_out(out, force)
    saved = reader_of(checkpoint).read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
    there = {name: entry for name, entry in tensors.items() if name.startswith("model.")}
    hf.check_fits(checkpoint, {name: tuple(entry.size) for name, entry in there.items()}, shapes)
    together: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for name, shape in shapes.items():
        kind = getattr(torch, dtype) if dtype else there[name].properties.dtype
        together.setdefault(form.their_names(name, shape)[0], {})[name] = shape, kind
    plan: Plan = [{}]
    filled = 0
    for tensors_in_one in together.values():
        size = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in tensors_in_one.values())
        if filled and filled + size > file_bytes:
            plan.append({})
            filled = 0
        plan[-1] |= tensors_in_one
        filled += size
    return plan


def _file_name(number: int, of: int) -> str:
    return hf_folder.SINGLE if of == 1 else f"model-{number + 1:05}-of-{of:05}.safetensors"


def _write_file(
    checkpoint: StoragePath, file: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], form: Form
) -> None:
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads by itself, and means to
        dcp.load(state, storage_reader=reader_of(checkpoint), no_dist=True)
    for name, tensor in state.items():
        if tensor.dtype == torch.float16 and not tensor.isfinite().all():
            raise UserError(f"{name} has values that float16 does not hold (above 65504, or not finite); use bfloat16")
    parts: dict[str, list[Tensor]] = {}  # those of a fused projection come in their order
    for name, tensor in state.items():
        for theirs, written_as in form.written(name, tensor).items():
            parts.setdefault(theirs, []).append(written_as)
    written = {name: form.join(name, of_one).contiguous() for name, of_one in parts.items()}
    save_file(written, file, metadata={"format": "pt"})


def _finish(checkpoint: StoragePath, partial: Path, plan: Plan, form: Form) -> None:
    """On rank 0, when all files are written: the files beside the weights, whose names are those of `form`."""
    for name, content in assets_of(checkpoint).items():
        (partial / name).write_bytes(content)
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    kinds = {str(dtype).removeprefix("torch.") for tensors in plan for _, dtype in tensors.values()}
    config["torch_dtype"] = sorted(kinds, key=lambda kind: kind != "float32")[0]
    config.pop("dtype", None)  # its newer name
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(plan) > 1:
        sizes = [
            (torch.Size(shape).numel() + len(form.beside(name))) * dtype.itemsize
            for tensors in plan
            for name, (shape, dtype) in tensors.items()
        ]
        names = [
            (theirs, i)
            for i, tensors in enumerate(plan)
            for name, (shape, _) in tensors.items()
            for theirs in form.their_names(name, shape)
        ]
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {name: _file_name(i, len(plan)) for name, i in names},
        }
        (partial / hf_folder.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if missing := [i for i in range(len(plan)) if not (partial / _file_name(i, len(plan))).is_file()]:
        raise UserError(
            f"{_file_name(missing[0], len(plan))}, which another rank has written, cannot be seen from rank 0: the "
            "output needs a folder that all machines share"
        )
