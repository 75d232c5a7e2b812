"""Which files of a Hugging Face folder hold its weights, and which folder a path means.

model.safetensors                  all tensors; or
model-00001-of-00030.safetensors   some of them, and
model.safetensors.index.json       which file holds which
pytorch_model.bin                  and so on: the same, as torch.save writes it
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError

__all__ = ["INDEX", "MERGE", "SINGLE", "check_foreign", "files_of", "folder_meant", "is_hf", "local"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The order in which transformers looks for them.
WEIGHTS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
MERGE = (
    "merge it first: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER), "
    "and name that folder"
)
# What other files with weights are, by the end of their names.
FOREIGN = {
    ".gguf": "weights of llama.cpp",
    ".pth": "weights of Meta's or a training's own format",
    ".pt": "weights of a training's own format",
    ".ckpt": "weights of a training's own format",
    ".msgpack": "weights of Flax",
    ".h5": "weights of TensorFlow",
    ".onnx": "a graph of ONNX",
}


def is_hf(names: list[str]) -> bool:
    """Whether the folder with these files is one of Hugging Face."""
    return any(
        re.fullmatch(r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?", n.lower()) for n in names
    )


def local(folder: StoragePath) -> Path:
    """UserError where a folder is behind a URL: safetensors are read through memory maps."""
    if (path := folder.local) is None:
        raise UserError(f"{folder}: Hugging Face folders are read from local disks only; copy it to one")
    return path


def files_of(folder: Path) -> tuple[str, dict[str, str], list[str]]:
    """Name of the index (or empty), tensor -> file by that index (or empty), names of the files with weights."""
    there = {name.lower(): name for name in sorted(os.listdir(folder), reverse=True)}  # written on systems without case

    def actual(name: str) -> str:
        return name if (folder / name).is_file() else there.get(name.lower(), name)

    for single, index in WEIGHTS:
        if (folder / actual(single)).is_file():
            return "", {}, [actual(single)]
        if (folder / actual(index)).is_file():
            weight_map = {tensor: actual(file) for tensor, file in _weight_map(folder / actual(index)).items()}
            return actual(index), weight_map, sorted(set(weight_map.values()))
    loose = [name for lower, name in there.items() if lower.endswith(".safetensors")]
    if len(loose) == 1 and not re.search(r"-of-\d+", loose[0]):
        return "", {}, loose
    what = ", the index of the others there" if loose else ""
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}{what}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map does not give names of files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = "safetensors" if ".safetensors" in index.name.lower() else "torch.save"
        raise UserError(f"{index} is no index of {kind} files: {error!r}") from None
    return weight_map


def check_foreign(where: Any, names: list[str]) -> None:
    """UserError for a folder with these files that holds an adapter, or weights of another format, but no model."""
    if "adapter_config.json" in names and not is_hf([name for name in names if not name.startswith("adapter_")]):
        raise UserError(f"{where} is a LoRA adapter (it has adapter_config.json), not a whole model; {MERGE}")
    for name in names:
        what = next((what for ending, what in FOREIGN.items() if name.lower().endswith(ending)), "")
        if what and not is_hf(names):
            raise UserError(
                f"{where}: {name} holds {what}, which are not read; expected a Hugging Face folder with safetensors: "
                "download one, or convert it with transformers (save_pretrained)"
            )


def folder_meant(given: str) -> str:
    """The folder of the model that a path or URL means: of a file with weights its folder, of a cache its snapshot.

    UserError where that is not plain. Anything else is returned as it is.
    """
    path = Path(given).expanduser()
    if "://" in given or not path.exists():
        return given
    if path.is_file():
        return str(_folder_of_file(path))
    if (path / "snapshots").is_dir() and (path.name.startswith("models--") or (path / "refs").is_dir()):
        return str(_snapshot(path))
    return given


def _folder_of_file(path: Path) -> Path:
    check_foreign(path.parent, [path.name])
    inside = path.parent
    if path.name == "config.json":
        return inside
    if not is_hf([path.name]) or path.name.startswith("adapter_"):
        raise UserError(f"{path} is no checkpoint but a file; expected the folder of one (perhaps {inside})")
    index, _, files = files_of(inside)
    if path.name not in (index, *files):
        raise UserError(
            f"{path} is not among the weights of {inside}, which are {', '.join(files[:3])}; name the folder "
            f"for those, or put {path.name} with a config.json into a folder of its own"
        )
    return inside


def _snapshot(cache: Path) -> Path:
    """Of a folder of the hub's cache (models--OWNER--NAME), the snapshot that `main` is, or the only one."""
    main = cache / "refs" / "main"
    if main.is_file() and (snapshot := cache / "snapshots" / main.read_text(encoding="utf-8").strip()).is_dir():
        return snapshot
    snapshots = sorted(path for path in (cache / "snapshots").iterdir() if path.is_dir())
    if len(snapshots) != 1:
        there = ", ".join(map(str, snapshots)) or "none"
        raise UserError(f"{cache} is a cache of the hub with several snapshots or none; name one of them: {there}")
    return snapshots[0]
