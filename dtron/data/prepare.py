"""From a source and a tokenizer to a folder of shards: in parallel, resumable, and never half-written.

The way of a document: the source's reader in this process -> batches of about a million characters -> a worker
process, batch i always worker i % n, and back in that order -> a shard under a .partial name -> the journal, which
names the finished shards and the place in the source after the last of them. So the folder's bytes depend neither on
the number of processes nor on how often the run was killed. The manifest comes last and takes the journal's place.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dtron.data.encode import Encoded, SourcePosition, TextBatch, encode_in_order
from dtron.data.shards import FORMAT, JOURNAL, MANIFEST, Shard, ShardWriter, TokenStore, open_store
from dtron.data.sources import Source, State
from dtron.data.tokenizer import TextEncoder, read_tokenizer, train_bpe
from dtron.errors import UserError
from dtron.files import acquire_lock, write_atomically

__all__ = ["Log", "build_once", "choose_encoder", "prepare", "prepare_cached"]

Log = Callable[[str], None]

LOCK = "prepare.lock"
SHARD_TOKENS = 1 << 26  # 128 MiB of uint16: what a killed run may lose
BATCH = 1 << 20  # characters sent to a worker at a time
BPE_TEXT = 32 << 20  # characters a BPE is trained on
IN_USE_S = 1.0
PROGRESS_S = 5.0


class InUseError(UserError):
    """Another process is at the folder."""


def prepare(
    source: Source,
    encoder: TextEncoder,
    out: Path | str,
    *,
    processes: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    log: Log,
) -> TokenStore:
    """Tokenize every document of `source` into the folder `out`; goes on where an earlier call was ended.

    processes: how many encode; with 1 it is this one, with as many threads as the library takes.
    shard_tokens: a shard ends with the document that brings it to so many tokens. log: prints progress.
    Raises UserError for an empty or unreadable source, a folder that holds something else or cannot be written.
    """
    out = Path(out)
    recipe = {"source": source.fingerprint, "tokenizer": encoder.fingerprint, "shard_tokens": shard_tokens}
    done = _finished(out, recipe)
    journal = _Journal(out, recipe)
    try:
        # A finished folder never changes, and may be read-only. One that is not may be finished by the time we have
        # the lock, and the journal, which its finisher deleted, would then say that none of its shards is finished.
        if not done:
            with _lock(out):
                done = _finished(out, recipe)
                if not done:
                    _fill(journal, source, encoder, processes, shard_tokens, log)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error}): {len(journal.shards)} shards with {journal.tokens:,} tokens are "
            "finished; make room or fix its permissions and give the same command again, it resumes after them"
        ) from error
    if done:
        log(f"{out} is prepared already: nothing to do")
    else:
        log(f"prepared {source.name}: {journal.documents:,} documents, {journal.tokens:,} tokens")
    return open_store(out)


def _fill(
    journal: "_Journal", source: Source, encoder: TextEncoder, processes: int, shard_tokens: int, log: Log
) -> None:
    """Tokenize from where the journal of an unfinished folder says, up to the manifest."""
    journal.load()
    try:
        if journal.shards:
            log(f"resuming after shard {len(journal.shards)}, {journal.tokens:,} tokens")
        encoder.save(journal.out)
        batches = _read(source, journal.file, journal.state)
        _write(journal, encode_in_order(batches, encoder, processes), shard_tokens, _Progress(log, journal, source))
        if journal.has_no_text:
            raise UserError(f"{source.name} is empty: {journal.documents} documents without any text in them")
        journal.finish(encoder, source)
    except BaseException:
        if journal.has_no_text:
            journal.discard()
        raise


def prepare_cached(source: Source, encoder: TextEncoder, cache_folder: Path | str, *, log: Log) -> TokenStore:
    """`prepare` into a folder of `cache_folder` named by what shapes it, unless it is there.

    A killed one goes on at the next call; one that another process is at is waited for.
    """
    recipe = hashlib.sha256(f"{FORMAT} {source.fingerprint} {encoder.fingerprint}".encode()).hexdigest()
    final = Path(cache_folder) / f"prepared-{recipe[:16]}"
    partial = final.with_name(f".partial-{final.name}")
    _make_cache(final.parent)
    while not final.is_dir():
        try:
            prepare(source, encoder, partial, log=log)
            os.replace(partial, final)
        except InUseError:
            log(f"waiting for another process, which is tokenizing {source.name}")
            time.sleep(IN_USE_S)
        except (OSError, UserError):
            if not final.is_dir():  # else another process was first and moved the folder: its content is the same
                raise
            shutil.rmtree(partial, ignore_errors=True)
    return open_store(final)


def build_once(final: Path, build: Callable[[Path], object]) -> None:
    """Have `build` fill a folder, unless it is there, and move it to `final` when it is whole.

    Processes that race are safe, merely wasteful: each builds in a folder of its own, the first to finish moves it
    into place, and a killed one leaves only a `.partial-` folder that nothing reads. UserError where it cannot.
    """
    if final.is_dir():
        return
    partial = final.with_name(f".partial-{final.name}-{uuid.uuid4().hex[:8]}")
    _make_cache(final.parent)
    try:
        partial.mkdir()
        build(partial)
        os.replace(partial, final)
    except OSError:
        if not final.is_dir():  # else another process was first: its content is the same
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("permission denied")
    except OSError as error:
        raise UserError(
            f"job.cache_folder = {str(folder)!r} cannot be written ({error}): name a folder that can"
        ) from error


def choose_encoder(source: Source, tokenizer: str, cache_folder: Path | str) -> TextEncoder:
    """`bpe:N`: a byte-level BPE of N tokens, trained on the source's first 32M characters; else `read_tokenizer`."""
    if match := re.fullmatch(r"bpe:(\d+)", tokenizer):
        return train_bpe(_first_texts(source), int(match[1]))
    return read_tokenizer(tokenizer, cache_folder, "--tokenizer")


def _first_texts(source: Source) -> Iterator[str]:
    left = BPE_TEXT
    for batch in _read(source, 0, None):
        for text in batch.texts:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


# --- what is there already


def _finished(out: Path, recipe: dict[str, Any]) -> bool:
    """UserError if the folder holds anything but what this recipe made, or began to make."""
    if (out / MANIFEST).is_file():
        _check_recipe(out, open_store(out).recipe, recipe, "holds other data")
        return True
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder that does not exist yet")
    names = {path.name for path in out.iterdir() if path.suffix != ".partial"} if out.is_dir() else set()
    if names - {LOCK} and JOURNAL not in names:
        raise UserError(f"{out} is not empty, and nothing that dtron prepares: name a folder that does not exist yet")
    return False


def _check_recipe(out: Path, there: dict[str, Any], asked: dict[str, Any], holds: str) -> None:
    if changed := [key for key in asked if there.get(key) != asked[key]]:
        values = ", ".join(f"{key} (there {str(there.get(key))[:12]}, asked {str(asked[key])[:12]})" for key in changed)
        raise UserError(f"{out} {holds}; other than asked for: {values}; name another folder, or delete this one")


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keep a second process out of the folder, made if need be; UserError for the second."""
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


class _Journal:
    """The finished shards of a folder in the making, and the place to go on from: a file and its reader's state."""

    def __init__(self, out: Path, recipe: dict[str, Any]) -> None:
        self.out, self.recipe = out, recipe
        self.shards: list[Shard] = []
        self.file = 0
        self.state: State | None = None

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def has_no_text(self) -> bool:
        """Whether there is nothing yet, or nothing but end-of-text tokens."""
        return self.tokens == self.documents

    def load(self) -> None:
        """Take up what an earlier run finished, and delete what it did not."""
        path = self.out / JOURNAL
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path} is damaged ({error}): delete the folder, or name another") from error
            if content["shards"]:
                _check_recipe(self.out, content["recipe"], self.recipe, "was begun with other data")
                self.shards = [Shard(**entry) for entry in content["shards"]]
                self.file, self.state = content["file"], content["state"]
        finished = {shard.name for shard in self.shards}
        for file in self.out.iterdir():
            if file.name.startswith("shard-") and file.stem not in finished:
                file.unlink()
        self._save()

    def add(self, shard: Shard, position: SourcePosition) -> None:
        self.shards.append(shard)
        self.file, self.state = position
        self._save()

    def _save(self) -> None:
        shards = [asdict(shard) for shard in self.shards]
        content = {"recipe": self.recipe, "shards": shards, "file": self.file, "state": self.state}
        write_atomically(self.out / JOURNAL, json.dumps(content, indent=1), durable=True)

    def discard(self) -> None:
        """Leave nothing behind."""
        for path in self.out.glob("shard-*"):
            path.unlink()
        for name in (JOURNAL, "tokenizer.json", "tokenizer_config.json"):
            (self.out / name).unlink(missing_ok=True)

    def finish(self, encoder: TextEncoder, source: Source) -> None:
        """The manifest in place of the journal."""
        manifest = {
            "format": FORMAT,
            "dtype": encoder.dtype.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "vocab_size": encoder.vocab_size,
            "eos": encoder.eos,
            "eos_id": encoder.eos_id,
            "tokenizer": encoder.fingerprint,
            "source": {"name": source.name, "files": source.n_files},
            "recipe": self.recipe,
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_atomically(self.out / MANIFEST, json.dumps(manifest, indent=1), durable=True)
        (self.out / JOURNAL).unlink()


# --- reading, encoding, writing


def _read(source: Source, file: int, state: State | None) -> Iterator[TextBatch]:
    """Batches of about BATCH characters, from a place in the source on."""
    batch, size = TextBatch([], []), 0
    for number in range(file, source.n_files):
        reader = source.read(number, state if number == file else None)
        for text in reader:
            batch.texts.append(text)
            batch.positions.append((number, reader.state()))
            size += len(text)
            if size >= BATCH:
                yield batch
                batch, size = TextBatch([], []), 0
    if batch.texts:
        yield batch


def _write(
    journal: _Journal,
    encoded: Generator[tuple[TextBatch, Encoded], None, None],
    shard_tokens: int,
    progress: "_Progress",
) -> None:
    """Shards of `shard_tokens` tokens or a few more, each noted in the journal when it is on the disk."""
    writer: ShardWriter | None = None
    try:
        with contextlib.closing(encoded):
            for (_, positions), (tokens, lengths) in encoded:
                ends = np.cumsum(lengths)
                first = 0
                while first < len(lengths):
                    writer = writer or ShardWriter(journal.out, len(journal.shards))
                    start = ends[first - 1] if first else 0
                    full = np.searchsorted(ends, start + shard_tokens - writer.n_tokens)  # the document that fills it
                    stop = min(int(full) + 1, len(lengths))
                    writer.add(tokens[start : ends[stop - 1]], lengths[first:stop])
                    if writer.n_tokens >= shard_tokens:
                        journal.add(writer.finish(), positions[stop - 1])
                        writer = None
                    first = stop
                progress(len(lengths), len(tokens), positions[-1][0])
            if writer is not None:
                journal.add(writer.finish(), positions[-1])
    except BaseException:
        if writer is not None:
            writer.abort()
        raise


class _Progress:
    """A line every few seconds."""

    def __init__(self, log: Log, journal: _Journal, source: Source) -> None:
        self._log, self._n_files = log, source.n_files
        self._documents, self._tokens, self._new_tokens = journal.documents, journal.tokens, 0
        self._start = self._said = time.monotonic()
        log(f"tokenizing {source.name}")

    def __call__(self, documents: int, tokens: int, file: int) -> None:
        self._documents += documents
        self._tokens += tokens
        self._new_tokens += tokens
        now = time.monotonic()
        if now - self._said >= PROGRESS_S:
            self._said = now
            rate = self._new_tokens / (now - self._start)
            share = f", in file {file + 1:,} of {self._n_files:,}" if self._n_files > 1 else ""
            self._log(f"{self._documents:,} documents, {self._tokens:,} tokens, {rate:,.0f} tokens/s{share}")
