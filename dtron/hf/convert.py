"""`dtron convert`: a folder of Hugging Face or torchtitan to a checkpoint, a checkpoint to a folder of Hugging Face."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dtron.checkpoint import hf, hf_folder
from dtron.checkpoint.export import FILE_BYTES, ExportDtype, check_out, export, replacing
from dtron.checkpoint.files import Manifest, Progress
from dtron.checkpoint.load import fitting_entries, is_torchtitan, verify_on_all_ranks
from dtron.checkpoint.save import first_error, reason, write_checkpoint
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError
from dtron.hf.read import Found, find_model, folder_at, one_rank
from dtron.hf.torchtitan import find_torchtitan, read_torchtitan
from dtron.models.llama import Llama

__all__ = ["convert"]


def convert(
    source: str,
    to: str,
    dtype: ExportDtype | None,
    max_file_gb: float | None,
    config: str | None,
    *,
    force: bool,
    say: Callable[[str], None],
) -> None:
    """Turn the model at `source` into the other form, in the new folder `to`.

    dtype: of exported weights; None: as they are. max_file_gb: most GB of an exported file of several tensors.
    config: for torchtitan's folders, a config.json of Hugging Face or its folder.
    UserError where `source` is no model that can be converted, or `to` cannot be made.
    """
    if "://" in to:
        raise UserError(f"DST {to} is a URL; expected a local folder")
    folder = folder_at(source)
    from_titan = is_torchtitan(folder)
    if config is not None and not from_titan:
        raise UserError(f"--config is for the folders of torchtitan, which {folder} is not; leave it out")
    found = find_torchtitan(folder, config) if from_titan else find_model(source)
    out = Path(to).expanduser().resolve()
    local = found.path.local
    if local is not None and (out.is_relative_to(local.resolve()) or local.resolve().is_relative_to(out)):
        raise UserError(f"DST {out} and SRC {found.path} lie in one another; choose another DST")
    if max_file_gb is not None and not 0 < max_file_gb < math.inf:
        raise UserError(f"--max-file-gb is {max_file_gb}; expected a positive number")
    if found.kind != "dtron" and (dtype or max_file_gb):
        raise UserError(
            "--dtype and --max-file-gb are for exports; a checkpoint keeps the dtype of SRC: leave them out"
        )
    check_out(out, force, "DST")
    with torch.device("meta"):
        model = Llama(found.config)
    n = sum(p.numel() for p in model.parameters())
    whose = "Hugging Face" if found.kind == "hf" else found.kind
    say(f"{found.path}: {n / 1e6:,.1f}M parameters, {whose}")
    if found.warning:
        say(found.warning)
    with one_rank():
        if found.kind != "dtron":
            tensors = _map(found.path, model) if found.kind == "hf" else _read(found.path, model)
            with_state = any(name.startswith("optimizer.") for name in tensors)
            _write(tensors, Manifest(Progress(model_only=not with_state), {}), found, out, force)
            use = f'checkpoint.initial_load_path = "{out}", model.hf_config_path = "{out}"'
            if with_state:
                use += "; for the optimizer state too checkpoint.initial_load_model_only = false"
        else:
            verify_on_all_ranks(found.path)
            shapes = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
            file_bytes = int((max_file_gb or FILE_BYTES / 1e9) * 1e9)
            export(found.path, out, shapes, dtype, say, force=force, file_bytes=file_bytes)
            use = f'transformers.AutoModelForCausalLM.from_pretrained("{out}")'
    say(f"in {out}; to use it: {use}")


def _map(folder: StoragePath, model: Llama) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, mapped from disk: each is read when it is written."""
    entries, _ = fitting_entries(folder, model)
    names = {f"model.{name}" for name, _ in model.named_parameters()}
    return hf.tensors_of(hf_folder.local(folder), {name: entry for name, entry in entries.items() if name in names})


def _read(folder: StoragePath, model: Llama) -> dict[str, Tensor]:
    with _user_errors(f"{folder} cannot be read", "copy it again"):
        return read_torchtitan(folder, model)


def _write(tensors: dict[str, Tensor], manifest: Manifest, found: Found, out: Path, force: bool) -> None:
    """Write a checkpoint as the folder `out`, one tensor after the other."""
    with _user_errors(f"{out} could not be written", "make room, or name another disk"), replacing(out, force) as new:
        write_checkpoint(StoragePath.at(new / "checkpoint"), tensors, manifest, found.assets)
        for file in (new / "checkpoint").iterdir():
            file.rename(new / file.name)
        (new / "checkpoint").rmdir()


@contextlib.contextmanager
def _user_errors(what: str, hint: str) -> Iterator[None]:
    """DCP's error as a UserError, or as the KeyboardInterrupt that it was."""
    try:
        yield
    except CheckpointException as error:  # which is no Exception
        if any(isinstance(failure, KeyboardInterrupt) for failure, _ in error.failures.values()):
            raise KeyboardInterrupt from None
        if isinstance(first := first_error(error), UserError):
            raise first from None
        raise UserError(f"{what}: {reason(error)}; {hint}") from None
