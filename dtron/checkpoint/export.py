"""A checkpoint of dtron as a folder of Hugging Face: safetensors with an index, config.json, the tokenizer.

The files are shared out over the ranks. Each reads the tensors of its files from the checkpoint, whatever layout wrote
them, and holds no more than one file in memory. The folder gets its name when all of it is there.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dtron.checkpoint import hf
from dtron.checkpoint.files import ASSETS, MANIFEST
from dtron.checkpoint.load import from_rank_0
from dtron.checkpoint.place import Place
from dtron.checkpoint.save import reason
from dtron.errors import UserError

__all__ = ["FILE_BYTES", "ExportDtype", "assets_of", "check_out", "export"]

FILE_BYTES = 5 * 10**9  # of one safetensors file, as transformers has it
ExportDtype = Literal["float32", "bfloat16", "float16"]


def assets_of(folder: Place) -> dict[str, bytes]:
    """The files beside the weights: config.json, the tokenizer and their like."""
    return {name: (folder / name).read() for name in folder.names() if name in ASSETS}


def check_out(out: Path, force: bool, key: str = "the output folder") -> None:
    """UserError unless `out` can be made: it is not there, or may be replaced and is a model's folder."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise UserError(f"{key} {out} is there already, and nothing is overwritten: name another, or use --force")
    names = os.listdir(out) if out.is_dir() and not out.is_symlink() else []
    inner = [name for name in names if (out / name).is_dir()]
    if inner or (names and MANIFEST not in names and not hf.is_hf(names)):
        what = f"it holds the folder {inner[0]}" if inner else "it holds no weights"
        raise UserError(f"{key} {out} is not just a model's folder ({what}), so --force does not replace it")


def export(
    checkpoint: Place,
    out: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: ExportDtype | None,
    say: Callable[[str], None],
    *,
    force: bool = False,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the weights and assets of `checkpoint`, whose config.json is among them, to the folder `out`; on all ranks.

    shapes: of the model that config.json describes, by `model.<parameter>`. dtype: of the weights; None: as they are.
    file_bytes: most bytes of a file of several tensors.
    UserError on all ranks where the checkpoint does not fit its config.json, and where the disk refuses.
    """
    partial = out.with_name(f"{out.name}.partial")
    plan = from_rank_0(lambda: _begin(checkpoint, out, partial, shapes, dtype, force, file_bytes))
    rank, world = dist.get_rank(), dist.get_world_size()
    problem = ""
    for number in range(rank, len(plan), world):
        try:
            _write_file(checkpoint, partial / _file_name(number, len(plan)), plan[number])
        except (Exception, CheckpointException) as error:  # safetensors' errors derive from nothing else
            problem = reason(error)
            break
        except BaseException:  # Ctrl-C
            shutil.rmtree(partial, ignore_errors=True)
            raise
        say(f"{number + 1} of {len(plan)} files written")
    problems: list[str] = [""] * world
    dist.all_gather_object(problems, problem)
    found = next(filter(None, problems), "")

    def finish() -> None:
        try:
            if found:
                raise UserError(f"{checkpoint} could not be written to {out}: {found}; make room, or name another disk")
            _finish(checkpoint, out, partial, plan, force)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk is to have its space back
            raise

    from_rank_0(finish)


Plan = list[dict[str, tuple[tuple[int, ...], torch.dtype]]]  # of each file: name of ours -> shape, dtype


def _begin(
    checkpoint: Place,
    out: Path,
    partial: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: ExportDtype | None,
    force: bool,
    file_bytes: int,
) -> Plan:
    """Check everything, make the folder, and share out the tensors over files, in the order of the model."""
    check_out(out, force)
    saved = checkpoint.reader().read_metadata().state_dict_metadata
    there = {
        name: entry for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata) and _is_weight(name)
    }
    hf.check_fits(checkpoint, {name: tuple(entry.size) for name, entry in there.items()}, shapes)
    plan: Plan = [{}]
    filled = 0
    for name, shape in shapes.items():
        kind = getattr(torch, dtype) if dtype else there[name].properties.dtype
        size = torch.Size(shape).numel() * kind.itemsize
        if filled and filled + size > file_bytes:
            plan.append({})
            filled = 0
        plan[-1][name] = shape, kind
        filled += size
    try:
        if partial.exists():  # of an attempt that was killed
            check_out(partial, force=True)
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error}") from None
    return plan


def _is_weight(name: str) -> bool:
    return name.startswith("model.")


def _file_name(number: int, of: int) -> str:
    return hf.SINGLE if of == 1 else f"model-{number + 1:05}-of-{of:05}.safetensors"


def _write_file(checkpoint: Place, file: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads by itself, and means to
        dcp.load(state, storage_reader=checkpoint.reader(), no_dist=True)
    save_file({hf.their_name(name): tensor for name, tensor in state.items()}, file, metadata={"format": "pt"})


def _finish(checkpoint: Place, out: Path, partial: Path, plan: Plan, force: bool) -> None:
    """On rank 0, when all files are written: what lies beside the weights, and the folder's name."""
    for name, content in assets_of(checkpoint).items():
        (partial / name).write_bytes(content)
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    kinds = {str(dtype).removeprefix("torch.") for tensors in plan for _, dtype in tensors.values()}
    config["torch_dtype"] = sorted(kinds, key=lambda kind: kind != "float32")[0]
    config.pop("dtype", None)  # its newer name
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(plan) > 1:
        sizes = [torch.Size(shape).numel() * dtype.itemsize for tensors in plan for shape, dtype in tensors.values()]
        names = [(hf.their_name(name), i) for i, tensors in enumerate(plan) for name in tensors]
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {name: _file_name(i, len(plan)) for name, i in names},
        }
        (partial / hf.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if missing := [i for i in range(len(plan)) if not (partial / _file_name(i, len(plan))).is_file()]:
        raise UserError(
            f"{_file_name(missing[0], len(plan))}, which another rank has written, cannot be seen from rank 0: the "
            "output needs a folder that all machines share"
        )
    if force and out.exists():
        shutil.rmtree(out)
    partial.rename(out)
