"""What a folder of checkpoints holds: manifests, which checkpoints are whole, which are deleted and when.

    checkpoint/step-40/__0_0.distcp ...   the tensors, as torch.distributed.checkpoint (DCP) writes them
                       .metadata          DCP's index of them
                       config.json ...    the model's dimensions and the tokenizer, in the form of Hugging Face
                       dtron.json         the manifest, written last: progress, size and CRC-32 of every file

A local checkpoint is written as `step-40.partial-ATTEMPT` and gets its name when all of it is on disk. Object stores
have no such rename: there a checkpoint exists once its manifest does. Nothing here talks to other ranks.
"""

import contextlib
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError

__all__ = [
    "ASSETS",
    "MANIFEST",
    "DamagedError",
    "Manifest",
    "Progress",
    "clean",
    "delete_old",
    "find_damage",
    "holds_checkpoints",
    "intact_assets",
    "read_manifest",
    "quarantine",
    "restore_assets",
    "steps_in",
]

MANIFEST = "dtron.json"
FORMAT = 1
# The files beside the weights of a Hugging Face model, which checkpoints carry unchanged.
ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
WRITTEN = re.compile(  # names of the files of a checkpoint
    r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|dtron\.json|" + "|".join(map(re.escape, ASSETS))
)


class DamagedError(UserError):
    """A checkpoint is not what was written; one that merely cannot be read now is another error."""


@dataclass
class Progress:
    """Where a run is: everything besides the tensors that a resume needs."""

    step: int = 0  # optimizer steps done
    consumed: int = 0  # samples of the data order taken
    tokens: int = 0  # consumed, in tokens
    global_batch_size: int = -1  # sequences a step
    steps: int = 0  # of the whole run, as configured: the learning rate may depend on it
    attempt: int = 1  # 1 for a fresh run, one more after each resume
    model_only: bool = False
    data_fingerprint: str = ""  # of the training data, where the dataset has one
    tokenizer_fingerprint: str = ""  # of the training data, likewise
    streams: dict[str, Any] = field(default_factory=dict)  # positions in sources that are tokenized on the fly
    skipped: int = 0  # steps that changed nothing, their gradient not finite or a spike
    skipped_in_a_row: int = 0
    norm_mean: float = 0.0  # running mean of the gradient norm, which spikes are measured against
    norm_weight: float = 0.0  # of the mean: 0 at the beginning, near 1 after many steps
    failed_saves: int = 0
    ledger: dict[str, Any] = field(default_factory=dict)  # what the wall time went to


@dataclass
class Manifest:
    """`files`: name -> (bytes, CRC-32)."""

    progress: Progress
    files: dict[str, tuple[int, int]]

    def to_json(self) -> bytes:
        body = {"format": FORMAT, "progress": asdict(self.progress), "files": self.files}
        return json.dumps({**body, "crc32": _checksum(body)}, indent=1).encode()


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def read_manifest(checkpoint: StoragePath) -> Manifest:
    """The manifest of a checkpoint. DamagedError if it is missing or damaged, UserError if it cannot be read."""
    try:
        body = json.loads((checkpoint / MANIFEST).read())
        written = body.pop("crc32")
        if written != _checksum(body):
            raise ValueError("its checksum does not fit")
        if body["format"] != FORMAT:
            raise ValueError(f"its format is {body['format']}, expected {FORMAT}")
        files = {name: (size, crc) for name, (size, crc) in body["files"].items()}
        return Manifest(Progress(**body["progress"]), files)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{checkpoint} is no whole checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise UserError(
            f"{checkpoint / MANIFEST} cannot be read: {error}; try again when the storage answers"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{checkpoint / MANIFEST} is damaged or not dtron's: {error}") from None


def steps_in(folder: StoragePath) -> list[int]:
    """Steps of everything in `folder` that is named like a finished checkpoint, ascending, whole or not."""
    named = {name: name.removeprefix("step-") for name in folder.names() if name.startswith("step-")}
    steps = sorted(int(step) for step in named.values() if step.isdecimal() and step == str(int(step)))
    return steps if folder.local else [step for step in steps if (folder / f"step-{step}" / MANIFEST).exists()]


def holds_checkpoints(folder: StoragePath) -> bool:
    """Whether a run has ever finished one here, whatever became of it."""
    return bool(steps_in(folder)) or any(
        step.isdecimal() and rest.startswith("damaged")
        for step, _, rest in (name.removeprefix("step-").partition(".") for name in folder.names())
    )


def find_damage(checkpoint: StoragePath, files: Iterable[tuple[str, tuple[int, int]]]) -> list[str]:
    """What is wrong with these files of a manifest, each with its name; nothing if all are as they were written.

    OSError if one cannot be read, which is no damage.
    """
    problems = []
    for name, (size, crc) in files:
        file = checkpoint / name
        try:
            found = file.size()
            if found != size:
                problems.append(f"{name} has {found} bytes of {size}")
            elif file.crc32() != crc:
                problems.append(f"{name} is not what was written (its checksum differs)")
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{name} is missing")
    return problems


def intact_assets(checkpoint: StoragePath) -> tuple[dict[str, bytes], list[str]]:
    """The files of `ASSETS` as the manifest has them, and the names of those that are nowhere.

    One that is lost or altered here is taken from another checkpoint beside it: those of a run all carry the same.
    """
    wanted = {name: of for name, of in read_manifest(checkpoint).files.items() if name in ASSETS}
    beside = [checkpoint.parent / f"step-{step}" for step in reversed(steps_in(checkpoint.parent))]
    found: dict[str, bytes] = {}
    for folder in (checkpoint, *beside):
        for name in wanted.keys() - found.keys():
            with contextlib.suppress(OSError):
                content = (folder / name).read()
                if (len(content), zlib.crc32(content)) == wanted[name]:
                    found[name] = content
    return found, sorted(wanted.keys() - found.keys())


def restore_assets(checkpoint: StoragePath) -> None:
    """Write the files of `ASSETS` that are missing again, where another checkpoint beside it has them."""
    lost = read_manifest(checkpoint).files.keys() & set(ASSETS) - set(checkpoint.names())
    for name, content in intact_assets(checkpoint)[0].items() if lost else ():
        if name in lost:
            (checkpoint / name).write(content)


def quarantine(checkpoint: StoragePath) -> StoragePath:
    """Rename a damaged checkpoint, so that its step can be saved again; nothing of it is deleted."""
    taken = set(checkpoint.parent.names())
    names = (f"{checkpoint.name}.damaged" + (f"-{i}" if i > 1 else "") for i in range(1, len(taken) + 2))
    target = checkpoint.parent / next(name for name in names if name not in taken)
    checkpoint.move(target)
    return target


def clean(folder: StoragePath) -> None:
    """Delete what a killed run left unfinished: checkpoints half written or half deleted."""
    for name in folder.names():
        step, _, rest = name.removeprefix("step-").partition(".")
        attempt = rest.removeprefix("partial-") if rest.startswith("partial-") else "x"
        unfinished = name.startswith("step-") and step.isdecimal() and (attempt.isdecimal() or rest == "deleting")
        if unfinished and all(WRITTEN.fullmatch(file) for file in (folder / name).names()):
            (folder / name).remove()


def delete_old(folder: StoragePath, keep_latest: int, keep_every: int) -> list[str]:
    """Delete all but the latest `keep_latest` (0: all are kept) and those of every `keep_every`-th step (0: no others).

    Only checkpoints that a run could resume from are counted, and deleted. One that holds a file dtron did not write
    stays. Returns a line about each that could not be deleted.
    """
    if not keep_latest:
        return []
    warnings, whole = [], []
    for step in steps_in(folder):
        try:
            manifest = read_manifest(folder / f"step-{step}")
        except DamagedError:
            continue  # kept, for whoever wants to inspect it
        if not manifest.progress.model_only:
            whole.append((step, manifest))
    for step, manifest in whole[:-keep_latest]:
        if keep_every and step % keep_every == 0:
            continue
        try:
            warnings += _delete(folder / f"step-{step}", manifest)
        except OSError as error:
            warnings.append(f"{folder}/step-{step} could not be deleted: {error}")
    return warnings


def _delete(checkpoint: StoragePath, manifest: Manifest) -> list[str]:
    """First out of sight, so that a kill in between leaves no half checkpoint under the name of a whole one."""
    if checkpoint.local and checkpoint.local.is_symlink():
        return [f"{checkpoint} is kept: it is a link, which dtron did not make"]
    files = [MANIFEST, *manifest.files]
    if foreign := sorted(set(checkpoint.names()) - set(files)):
        return [f"{checkpoint} is kept: it holds {foreign[0]}, which dtron did not write"]
    gone = checkpoint
    if checkpoint.local:
        gone = checkpoint.parent / f"{checkpoint.name}.deleting"
        checkpoint.move(gone)
    gone.remove_files(files)  # the manifest first: in an object store it is what makes a checkpoint
    if gone.local:
        gone.remove()
    return []
