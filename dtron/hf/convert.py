"""`dtron convert`: a folder of Hugging Face to a checkpoint, and a checkpoint to a folder of Hugging Face."""

import argparse
import shutil
from pathlib import Path

import torch

from dtron.checkpoint import hf
from dtron.checkpoint.export import FILE_BYTES, check_out, export
from dtron.checkpoint.files import Manifest, Progress
from dtron.checkpoint.load import fitting_entries, verify_on_all_ranks
from dtron.checkpoint.place import Place
from dtron.checkpoint.save import write_checkpoint
from dtron.errors import UserError
from dtron.hf.read import Found, find_model, one_rank
from dtron.models.llama import Llama

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turn a folder of Hugging Face (safetensors) into a checkpoint of dtron, or a checkpoint into such a folder; "
        "which of the two, SRC tells. Weights keep their values and dtype unless --dtype names another."
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="a checkpoint, a run's folder (its newest checkpoint), or a Hugging Face folder")
    add("out", metavar="DST", help="folder to make")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the exported weights; without it: as they are")
    add(
        "--max-file-gb",
        type=float,
        default=FILE_BYTES / 1e9,
        help="size of exported files, in GB (default: %(default)s)",
    )
    add("--force", action="store_true", help="replace DST where it is a model's folder already")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """UserError where SRC is no model that can be converted, or DST cannot be made."""
    found = find_model(given.source)
    out = Path(given.out).expanduser().resolve()
    local = found.place.local
    if local is not None and (out.is_relative_to(local.resolve()) or local.resolve().is_relative_to(out)):
        raise UserError(f"DST {out} and SRC {found.place} lie in one another; name another DST")
    if given.max_file_gb <= 0:
        raise UserError(f"--max-file-gb is {given.max_file_gb}; expected a positive number")
    check_out(out, given.force, "DST")
    with torch.device("meta"):
        model = Llama(found.config)
    n = sum(p.numel() for p in model.parameters())
    print(f"{found.place}: {n / 1e6:,.1f}M parameters, {'Hugging Face' if found.kind == 'hf' else 'dtron'}", flush=True)
    with one_rank():
        if found.kind == "hf":
            if given.dtype:
                raise UserError("--dtype is for what is exported; a checkpoint keeps the dtype of the folder")
            _import(found, model, out, given.force)
            use = f"checkpoint.initial_load_path = {out}, model.hf_config_path = {out}"
        elif found.kind == "dtron":
            shapes = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
            verify_on_all_ranks(found.place)
            file_bytes = int(given.max_file_gb * 1e9)
            export(found.place, out, shapes, given.dtype, _say, force=given.force, file_bytes=file_bytes)
            use = f'transformers.AutoModelForCausalLM.from_pretrained("{out}")'
        else:
            raise UserError(
                f"{found.place} is torchtitan's, which is not converted; train.py starts from it by "
                "checkpoint.initial_load_path, and what it saves can be converted"
            )
    _say(f"in {out}; to use it: {use}")


def _say(line: str) -> None:
    print(line, flush=True)


def _import(found: Found, model: Llama, out: Path, force: bool) -> None:
    """Write the tensors of a folder, one after the other as they are mapped from disk, as a checkpoint."""
    folder = hf.local(found.place)
    entries = fitting_entries(found.place, model)
    names = {f"model.{name}" for name, _ in model.named_parameters()}
    tensors = hf.tensors_of(folder, {name: entry for name, entry in entries.items() if name in names})
    new = out.with_name(f"{out.name}.new") if out.exists() else out
    try:
        write_checkpoint(Place.at(new), tensors, Manifest(Progress(model_only=True), {}), found.assets)
    except OSError as error:
        raise UserError(f"{out} could not be written: {error}") from None
    if new != out:
        assert force
        shutil.rmtree(out)
        new.rename(out)
