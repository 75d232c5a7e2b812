"""`dtron convert`: a folder of Hugging Face to a checkpoint, and a checkpoint to a folder of Hugging Face."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from dtron.checkpoint import hf
from dtron.checkpoint.export import FILE_BYTES, ExportDtype, check_out, export, replacing
from dtron.checkpoint.files import Manifest, Progress
from dtron.checkpoint.load import fitting_entries, verify_on_all_ranks
from dtron.checkpoint.save import reason, write_checkpoint
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError
from dtron.hf.read import Found, find_model, one_rank
from dtron.models.llama import Llama

__all__ = ["convert"]


def convert(
    source: str,
    to: str,
    dtype: ExportDtype | None,
    max_file_gb: float | None,
    *,
    force: bool,
    say: Callable[[str], None],
) -> None:
    """Turn the model at `source` into the other form, in the new folder `to`.

    dtype: of exported weights; None: as they are. max_file_gb: most GB of an exported file of several tensors.
    UserError where `source` is no model that can be converted, or `to` cannot be made.
    """
    if "://" in to:
        raise UserError(f"DST {to} is a URL; expected a local folder")
    found = find_model(source)
    out = Path(to).expanduser().resolve()
    local = found.place.local
    if local is not None and (out.is_relative_to(local.resolve()) or local.resolve().is_relative_to(out)):
        raise UserError(f"DST {out} and SRC {found.place} lie in one another; name another DST")
    if max_file_gb is not None and not 0 < max_file_gb < math.inf:
        raise UserError(f"--max-file-gb is {max_file_gb}; expected a positive number")
    if found.kind == "torchtitan":
        raise UserError(
            f"{found.place} is torchtitan's, which is not converted; train.py starts from it by "
            "checkpoint.initial_load_path, and what it saves can be converted"
        )
    if found.kind == "hf" and (dtype or max_file_gb):
        raise UserError("--dtype and --max-file-gb are for what is exported; a checkpoint keeps the folder's dtype")
    check_out(out, force, "DST")
    with torch.device("meta"):
        model = Llama(found.config)
    n = sum(p.numel() for p in model.parameters())
    say(f"{found.place}: {n / 1e6:,.1f}M parameters, {'Hugging Face' if found.kind == 'hf' else 'dtron'}")
    with one_rank():
        if found.kind == "hf":
            _import(found, model, out, force)
            use = f'checkpoint.initial_load_path = "{out}", model.hf_config_path = "{out}"'
        else:
            verify_on_all_ranks(found.place)
            shapes = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
            file_bytes = int((max_file_gb or FILE_BYTES / 1e9) * 1e9)
            export(found.place, out, shapes, dtype, say, force=force, file_bytes=file_bytes)
            use = f'transformers.AutoModelForCausalLM.from_pretrained("{out}")'
    say(f"in {out}; to use it: {use}")


def _import(found: Found, model: Llama, out: Path, force: bool) -> None:
    """Write the tensors of a folder, one after the other as they are mapped from disk, as a checkpoint."""
    folder = hf.local(found.place)
    entries = fitting_entries(found.place, model)
    names = {f"model.{name}" for name, _ in model.named_parameters()}
    tensors = hf.tensors_of(folder, {name: entry for name, entry in entries.items() if name in names})
    manifest = Manifest(Progress(model_only=True), {})
    try:
        with replacing(out, force) as new:
            write_checkpoint(StoragePath.at(new / "checkpoint"), tensors, manifest, found.assets)
            for file in (new / "checkpoint").iterdir():
                file.rename(new / file.name)
            (new / "checkpoint").rmdir()
    except CheckpointException as error:  # DCP's own error is no Exception
        if any(isinstance(failure, KeyboardInterrupt) for failure, _ in error.failures.values()):
            raise KeyboardInterrupt from None
        raise UserError(f"{out} could not be written: {reason(error)}; make room, or name another disk") from None
