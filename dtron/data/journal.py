"""An unfinished folder of shards: its lock, and the journal of what is finished."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtron.data.encode import SourcePosition
from dtron.data.shards import FORMAT, JOURNAL, MANIFEST, Shard, open_store
from dtron.data.sources import Source
from dtron.data.tokenizer import TextEncoder
from dtron.errors import UserError
from dtron.files import acquire_lock, write_atomically

__all__ = ["InUseError", "Journal", "is_finished", "lock_folder"]

LOCK = "prepare.lock"


class InUseError(UserError):
    """Another process is preparing the folder."""


def is_finished(out: Path, recipe: dict[str, Any]) -> bool:
    """Whether this recipe's folder is whole. UserError if it holds anything but what this recipe made, or started."""
    if (out / MANIFEST).is_file():
        _check_recipe(out, open_store(out).recipe, recipe, "holds other data")
        return True
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder that does not exist yet")
    names = {path.name for path in out.iterdir() if path.suffix != ".partial"} if out.is_dir() else set()
    if names - {LOCK} and JOURNAL not in names:
        raise UserError(f"{out} is neither empty nor made by `dtron prepare`: name a folder that does not exist yet")
    return False


def _check_recipe(out: Path, there: dict[str, Any], requested: dict[str, Any], holds: str) -> None:
    if changed := [key for key in requested if there.get(key) != requested[key]]:
        values = ", ".join(f"{key} ({str(there.get(key))[:12]}, not {str(requested[key])[:12]})" for key in changed)
        hint = ", or the same but for special tokens (--no-add-special-tokens)" if "tokenizer" in changed else ""
        raise UserError(f"{out} {holds}; it has another {values}{hint}; name another folder, or delete this one")


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is created if needed. InUseError where one is in it."""
    out.mkdir(parents=True, exist_ok=True)
    with acquire_lock(
        out / LOCK, lambda owner: InUseError(f"{out} is being prepared by {owner}: wait for it, or stop it")
    ):
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                out.rmdir()


class Journal:
    """The finished shards of an unfinished folder, and the position in the source after them."""

    def __init__(self, out: Path, recipe: dict[str, Any]) -> None:
        self.out, self.recipe = out, recipe
        self.shards: list[Shard] = []
        self.position = SourcePosition()

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def has_no_text(self, encoder: TextEncoder) -> bool:
        """Whether there is nothing yet, or nothing but the special tokens around documents."""
        return self.tokens == self.documents * (len(encoder.begins_with) + len(encoder.ends_with))

    def load(self) -> None:
        """Read what an earlier run finished, and delete what it did not."""
        path = self.out / JOURNAL
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path} is damaged ({error}): delete the folder, or name another") from error
            if content["shards"]:
                _check_recipe(self.out, content["recipe"], self.recipe, "was started with other data")
                self.shards = [Shard(**entry) for entry in content["shards"]]
                self.position = SourcePosition(content["file"], content["state"], content.get("skipped", 0))
        finished = {shard.name for shard in self.shards}
        for file in self.out.iterdir():
            if file.name.startswith("shard-") and file.stem not in finished:
                file.unlink()
        self._save()

    def add(self, shard: Shard, position: SourcePosition) -> None:
        self.shards.append(shard)
        self.position = position
        self._save()

    def _save(self) -> None:
        shards = [asdict(shard) for shard in self.shards]
        content = {"recipe": self.recipe, "shards": shards, **self.position._asdict()}
        write_atomically(self.out / JOURNAL, json.dumps(content, indent=1), durable=True)

    def discard(self) -> None:
        """Leave nothing behind."""
        for path in self.out.glob("shard-*"):
            path.unlink()
        for name in (JOURNAL, "tokenizer.json", "tokenizer_config.json"):
            (self.out / name).unlink(missing_ok=True)

    def finish(self, encoder: TextEncoder, source: Source, skipped: int) -> None:
        """Write the manifest, and delete the journal. skipped: documents that could not be used."""
        manifest = {
            "format": FORMAT,
            "dtype": encoder.dtype.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "skipped": skipped,
            "vocab_size": encoder.vocab_size,
            "eos": encoder.eos,
            "eos_id": encoder.eos_id,
            "add_special_tokens": encoder.add_special_tokens,
            "begins_with": encoder.begins_with,
            "ends_with": encoder.ends_with,
            "tokenizer": encoder.fingerprint,
            "source": {"name": source.name, "files": source.n_files},
            "recipe": self.recipe,
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_atomically(self.out / MANIFEST, json.dumps(manifest, indent=1), durable=True)
        (self.out / JOURNAL).unlink()
