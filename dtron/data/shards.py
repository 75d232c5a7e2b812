"""Prepared tokens on disk: a folder of shards, memory-mapped, in which damage is always noticed.

    manifest.json          what was prepared, and of every shard its counts and checksums; written last
    tokenizer.json         beside tokenizer_config.json, as `transformers` reads them
    shard-00000.tokens     the ids, little-endian uint16 or uint32: documents one after another, special tokens included
    shard-00000.documents  where each document ends, in tokens from the start of the shard: uint64
    shard-00000.crc32      a checksum of every 64 KiB of the tokens: uint32

The shards are one run of tokens; no document spans two of them.
"""

import array
import contextlib
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtron.data.tokenizer import tokenizer_fingerprint
from dtron.errors import UserError
from dtron.files import sync_folder

__all__ = ["JOURNAL", "MANIFEST", "Shard", "ShardWriter", "TokenStore", "is_prepared", "open_store"]

FORMAT = 1
MANIFEST, JOURNAL = "manifest.json", "prepare.json"  # of a finished folder, and of one in the making
SUFFIXES = ("tokens", "documents", "crc32")
BLOCK = 1 << 16  # bytes of tokens under one checksum
OPEN_SHARDS = 128  # memory-mapped at a time: each holds two of the process's file descriptors


@dataclass(frozen=True)
class Shard:
    """What the manifest says about a shard."""

    name: str
    tokens: int
    documents: int
    sha256: str  # of .tokens
    documents_crc32: int  # of .documents
    blocks_crc32: int  # of .crc32

    def sizes(self, itemsize: int) -> dict[str, int]:
        """Bytes of each of its files."""
        size = self.tokens * itemsize
        return dict(zip(SUFFIXES, (size, 8 * self.documents, 4 * -(-size // BLOCK)), strict=True))


class ShardWriter:
    """Writes one shard under names that end in .partial until `finish`. Raises OSError where it cannot."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._name = folder, f"shard-{number:05d}"
        self._tokens = self._partial("tokens").open("wb")
        self._ends, self._crcs = array.array("Q"), array.array("I")
        self._sha256, self._block = hashlib.sha256(), bytearray()
        self.n_tokens = 0

    def _partial(self, suffix: str) -> Path:
        return self._folder / f"{self._name}.{suffix}.partial"

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Documents one after another: their tokens, and the number of tokens of each."""
        self._ends.frombytes((self.n_tokens + np.cumsum(lengths, dtype=np.uint64)).tobytes())
        self.n_tokens += len(tokens)
        content = tokens.tobytes()
        self._tokens.write(content)
        self._sha256.update(content)
        self._block += content
        whole = len(self._block) // BLOCK * BLOCK
        with memoryview(self._block) as view:
            self._crcs.extend(zlib.crc32(view[at : at + BLOCK]) for at in range(0, whole, BLOCK))
        del self._block[:whole]

    def abort(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):  # of a full disk, once more
            self._tokens.close()
        for suffix in SUFFIXES:
            self._partial(suffix).unlink(missing_ok=True)

    def finish(self) -> Shard:
        """Everything on the disk, under its own name."""
        if self._block:
            self._crcs.append(zlib.crc32(self._block))
        ends = np.frombuffer(self._ends, np.uint64).astype("<u8").tobytes()
        crcs = np.frombuffer(self._crcs, np.uint32).astype("<u4").tobytes()
        self._tokens.flush()
        os.fsync(self._tokens.fileno())
        self._tokens.close()
        for suffix, content in (("documents", ends), ("crc32", crcs)):
            with self._partial(suffix).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for suffix in SUFFIXES:
            os.replace(self._partial(suffix), self._folder / f"{self._name}.{suffix}")
        sync_folder(self._folder)
        sha256 = self._sha256.hexdigest()
        return Shard(self._name, self.n_tokens, len(self._ends), sha256, zlib.crc32(ends), zlib.crc32(crcs))


def is_prepared(folder: Path | str) -> bool:
    """Whether a folder is one of `dtron prepare`, finished or not."""
    return any((Path(folder) / name).is_file() for name in (MANIFEST, JOURNAL))


def open_store(folder: Path | str) -> "TokenStore":
    """The tokens of a finished folder; reads its manifest and tokenizer, and of the shards nothing but their sizes.

    Raises UserError for a folder that is not prepared, not finished, truncated, or has another tokenizer.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder} has format {manifest['format']}, this dtron reads {FORMAT}: prepare it again")
        shards = [Shard(**entry) for entry in manifest["shards"]]
        store = TokenStore(folder, manifest, shards)
        text = store.tokenizer_json.read_text(encoding="utf-8")
        found = tokenizer_fingerprint(text, manifest["eos"], store.begins_with, store.ends_with)
    except FileNotFoundError as error:
        if (folder / JOURNAL).is_file() and not (folder / MANIFEST).is_file():
            raise UserError(f"{folder} is not finished: give the same `dtron prepare` again to resume") from error
        raise UserError(f"{error.filename} is missing: name a folder made by `dtron prepare`, or prepare it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} cannot be read ({error!r}): copy it again, or prepare it again") from error
    for shard in shards:
        for suffix, size in shard.sizes(store.dtype.itemsize).items():
            path = folder / f"{shard.name}.{suffix}"
            actual = path.stat().st_size if path.is_file() else None
            if actual != size:
                is_now = "is missing" if actual is None else f"has {actual} bytes"
                raise UserError(f"{path} {is_now}, expected {size} bytes: copy it again, or prepare the data again")
    if found != store.tokenizer_fingerprint:
        raise UserError(
            f"{store.tokenizer_json} is not the tokenizer that {folder} was prepared with: its fingerprint is "
            f"{found[:12]}, the manifest has {store.tokenizer_fingerprint[:12]}; put the right one back"
        )
    return store


@dataclass
class _OpenShard:
    tokens: np.ndarray  # memory-mapped, as are the ends
    ends: np.ndarray
    crcs: np.ndarray
    checked: np.ndarray  # [blocks] bool: found whole by this process


class TokenStore:
    """One run of `n_tokens` tokens in `n_documents` documents, memory-mapped; see `open_store`.

    dtype: of the tokens. eos_id: the end-of-text token. begins_with, ends_with: ids around every document's text; data
    of versions that did not record them have the end-of-text token alone. fingerprint: of the content, from the shards'
    checksums. source: what was prepared. recipe: what shaped it. skipped: documents of the source that could not be
    used. Every 64 KiB that a process touches are checked the first time: what is damaged raises UserError and is never
    returned.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: list[Shard]) -> None:
        self.folder, self.shards = folder, shards
        self.source, self.recipe = manifest["source"], manifest["recipe"]
        self.skipped = int(manifest.get("skipped", 0))
        self.vocab_size, self.eos_id = int(manifest["vocab_size"]), int(manifest["eos_id"])
        self.add_special_tokens = bool(manifest.get("add_special_tokens", False))
        self.begins_with: list[int] = manifest.get("begins_with", [])
        self.ends_with: list[int] = manifest.get("ends_with", [self.eos_id])
        self.tokenizer_json, self.tokenizer_fingerprint = folder / "tokenizer.json", manifest["tokenizer"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.fingerprint = hashlib.sha256(" ".join(shard.sha256 for shard in shards).encode()).hexdigest()
        self._first = np.cumsum([0, *(shard.tokens for shard in shards)])  # [shards + 1] tokens before each
        self.n_tokens, self.n_documents = int(self._first[-1]), sum(shard.documents for shard in shards)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()  # the most recently used last
        self._checked: dict[int, np.ndarray] = {}  # outlives the maps of a shard

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return open_store, (self.folder,)  # a map would be pickled as all of its content

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), as `dtype`. IndexError outside [0, n_tokens]."""
        parts = [self._shard_tokens(number, a, b) for number, a, b in self._spans(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin among the tokens [start, stop): their positions in the run, ascending, int64."""
        found = [np.empty(0, np.int64)]
        for number, a, b in self._spans(start, stop):
            ends, first = self._shard(number).ends, self._first[number]
            if a == 0:
                found.append(np.array([first]))
            # Where one ends the next begins.
            low, high = np.searchsorted(ends, np.array([max(a, 1), b], np.uint64))
            found.append(ends[low:high].astype(np.int64) + first)
        return np.concatenate(found)

    def document(self, number: int) -> tuple[int, int]:
        """Where a document's tokens start, and end after its EOS, in the run. IndexError outside [0, n_documents)."""
        if not 0 <= number < self.n_documents:
            raise IndexError(f"document {number} of {self.n_documents}")
        before = np.cumsum([0, *(shard.documents for shard in self.shards)])
        shard = int(np.searchsorted(before, number, side="right")) - 1
        ends, first, i = self._shard(shard).ends, int(self._first[shard]), number - int(before[shard])
        return first + (int(ends[i - 1]) if i else 0), first + int(ends[i])

    def document_lengths(self, shard: int) -> np.ndarray:
        """Tokens of each document of a shard, with its EOS, int64."""
        return np.diff(self._shard(shard).ends.astype(np.int64), prepend=0)

    def verify(self) -> None:
        """Check every block of every shard. Raises UserError for the first that is damaged."""
        for number, shard in enumerate(self.shards):
            step = BLOCK // self.dtype.itemsize
            for at in range(0, shard.tokens, step):
                self._shard_tokens(number, at, min(at + step, shard.tokens))

    def _spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first token of it, end) of what makes up [start, stop)."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")
        if start == stop:
            return []
        low, high = np.searchsorted(self._first, [start, stop - 1], side="right") - 1
        first = self._first
        return [
            (number, int(max(start - first[number], 0)), int(min(stop, first[number + 1]) - first[number]))
            for number in range(int(low), int(high) + 1)
        ]

    def _shard_tokens(self, number: int, start: int, stop: int) -> np.ndarray:
        shard, size = self._shard(number), self.dtype.itemsize
        blocks = range(start * size // BLOCK, -(-stop * size // BLOCK))
        if not shard.checked[blocks.start : blocks.stop].all():
            content = shard.tokens.view(np.uint8)
            for block in blocks:
                if zlib.crc32(content[block * BLOCK : (block + 1) * BLOCK].data) != shard.crcs[block]:
                    raise self._damaged(number, "tokens", f" at bytes {block * BLOCK} to {(block + 1) * BLOCK - 1}")
                shard.checked[block] = True
        return shard.tokens[start:stop]

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard, path = self.shards[number], self.folder / self.shards[number].name
        try:
            tokens = np.memmap(f"{path}.tokens", self.dtype, "r", shape=(shard.tokens,)).view(np.ndarray)
            ends = np.memmap(f"{path}.documents", "<u8", "r", shape=(shard.documents,)).view(np.ndarray)
            crcs = np.fromfile(f"{path}.crc32", "<u4")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}.* cannot be read any more ({error}): copy the shard again") from error
        for suffix, content, crc in (("documents", ends, shard.documents_crc32), ("crc32", crcs, shard.blocks_crc32)):
            if zlib.crc32(content.data) != crc:
                raise self._damaged(number, suffix)
        checked = self._checked.setdefault(number, np.zeros(len(crcs), bool))
        while len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[number] = _OpenShard(tokens, ends, crcs, checked)
        return self._open[number]

    def _damaged(self, number: int, suffix: str, where: str = "") -> UserError:
        return UserError(
            f"{self.folder / self.shards[number].name}.{suffix} is damaged{where}: its checksum is not the one it was "
            "written with; copy the shard again, or prepare the data again into a new folder"
        )
