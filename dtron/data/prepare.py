"""From a source and a tokenizer to a folder of shards: in parallel, resumable, and never half-written.

The path of a document: the source's reader in this process -> batches of about a million characters -> a worker
process, and back in order -> a shard under a .partial name -> the journal, which
names the finished shards and the position in the source after the last of them. So the folder's bytes depend neither on
the number of processes nor on how often the run was killed. The manifest comes last and replaces the journal.
"""

import contextlib
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np

from dtron.data.encode import Encoded, SourcePosition, TextBatch, encode_in_order
from dtron.data.formats import BadDocument, good_documents
from dtron.data.journal import InUseError, Journal, is_finished, lock_folder
from dtron.data.shards import FORMAT, ShardWriter, TokenStore, open_store
from dtron.data.sources import Source
from dtron.data.tokenizer import TextEncoder, read_tokenizer, train_bpe
from dtron.errors import UserError

__all__ = ["Log", "build_once", "choose_encoder", "prepare", "prepare_cached"]

Log = Callable[[str], None]

SHARD_TOKENS = 1 << 26  # 128 MiB of uint16: what a killed run may lose
BATCH = 1 << 20  # characters sent to a worker at a time
BPE_TEXT = 32 << 20  # characters a BPE is trained on
IN_USE_S = 1.0
PROGRESS_S = 5.0
SHOWN = 10  # bad documents that are named; the others are counted


def prepare(
    source: Source,
    encoder: TextEncoder,
    out: Path | str,
    *,
    processes: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    skip_bad: bool = False,
    log: Log,
) -> TokenStore:
    """Tokenize every document of `source` into the folder `out`; resumes where an earlier call ended.

    processes: how many encode; with 1 it is this one, with as many threads as the library takes.
    shard_tokens: a shard ends with the document that brings it to so many tokens. log: prints progress.
    skip_bad: leave out documents that cannot be used, name the first of them and count them all.
    Raises UserError for an empty or unreadable source, a folder that holds something else or cannot be written; and for
    a bad document, after which the same call with skip_bad resumes.
    """
    out = Path(out)
    recipe = {"source": source.fingerprint, "tokenizer": encoder.fingerprint, "shard_tokens": shard_tokens}
    done = is_finished(out, recipe)
    journal, skipped = Journal(out, recipe), _Skipped(log) if skip_bad else None
    try:
        # A finished folder never changes, and may be read-only. One that is not may be finished by the time we have
        # the lock, and the journal, which its finisher deleted, would then say that none of its shards is finished.
        if not done:
            with lock_folder(out):
                done = is_finished(out, recipe)
                if not done:
                    _fill(journal, source, encoder, processes, shard_tokens, skipped, log)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error}): {len(journal.shards)} shards with {journal.tokens:,} tokens are "
            "finished; make room or fix its permissions and give the same command again, it resumes after them"
        ) from error
    if done:
        log(f"{out} is prepared already: nothing to do")
    else:
        log(f"prepared {source.name}: {journal.documents:,} documents, {journal.tokens:,} tokens")
        if skipped:
            what = "document" if skipped.count == 1 else "documents"
            log(f"skipped {skipped.count:,} bad {what}{skipped.first and f', the first: {skipped.first}'}")
    return open_store(out)


def _fill(
    journal: Journal,
    source: Source,
    encoder: TextEncoder,
    processes: int,
    shard_tokens: int,
    skipped: "_Skipped | None",
    log: Log,
) -> None:
    """Tokenize from where the journal of an unfinished folder says, up to the manifest."""
    journal.load()
    try:
        if journal.shards:
            log(f"resuming after shard {len(journal.shards)}, {journal.tokens:,} tokens")
        encoder.save(journal.out)
        if skipped:
            skipped.count = journal.position.skipped
        batches = _read(source, journal.position, skipped)
        _write(journal, encode_in_order(batches, encoder, processes), shard_tokens, _Progress(log, journal, source))
        if journal.has_no_text(encoder):
            beside = f", and {skipped.count} bad ones, the first: {skipped.first}" if skipped and skipped.count else ""
            raise UserError(f"{source.name} is empty: {journal.documents} documents without any text in them{beside}")
        journal.finish(encoder, source, skipped.count if skipped else 0)
    except BaseException:
        if journal.has_no_text(encoder):
            journal.discard()
        raise


def prepare_cached(
    source: Source, encoder: TextEncoder, cache_folder: Path | str, *, skip_bad: bool = False, log: Log
) -> TokenStore:
    """`prepare` into a folder of `cache_folder` named by what shapes it, unless it is there.

    A killed one is resumed by the next call; one that another process is preparing is waited for.
    """
    shaped_by = f"{FORMAT} {source.fingerprint} {encoder.fingerprint}{' skip' if skip_bad else ''}"
    final = Path(cache_folder) / f"prepared-{hashlib.sha256(shaped_by.encode()).hexdigest()[:16]}"
    partial = final.with_name(f".partial-{final.name}")
    while not final.is_dir():
        _make_cache(final.parent)  # one that is whole may be read-only
        try:
            prepare(source, encoder, partial, skip_bad=skip_bad, log=log)
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


def choose_encoder(
    source: Source,
    tokenizer: str,
    cache_folder: Path | str,
    *,
    skip_bad: bool = False,
    add_special_tokens: bool | None = None,
) -> TextEncoder:
    """`bpe:N`: a byte-level BPE of N tokens, trained on the source's first 32M characters; else `read_tokenizer`."""
    if match := re.fullmatch(r"bpe:(\d+)", tokenizer):
        return train_bpe(_first_texts(source, skip_bad), int(match[1]))
    return read_tokenizer(tokenizer, cache_folder, "--tokenizer", add_special_tokens=add_special_tokens)


def _first_texts(source: Source, skip_bad: bool) -> Iterator[str]:
    left = BPE_TEXT
    for batch in _read(source, SourcePosition(), _Skipped(lambda _: None) if skip_bad else None):
        for text in batch.texts:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


# --- reading, encoding, writing


class _Skipped:
    """Counts bad documents and names the first."""

    def __init__(self, log: Log) -> None:
        self._log, self.count, self.first = log, 0, ""

    def __call__(self, error: BadDocument) -> None:
        self.count += 1
        self.first = self.first or error.what
        if self.count <= SHOWN:
            self._log(f"skipped: {error.what}")


def _read(source: Source, start: SourcePosition, skipped: _Skipped | None) -> Iterator[TextBatch]:
    """Batches of about BATCH characters, from a position in the source on; without `skipped` a bad one is raised."""
    batch, size = TextBatch([], []), 0
    for number in range(start.file, source.n_files):
        reader = source.read(number, start.state if number == start.file else None)
        for text in good_documents(reader, skipped):
            batch.texts.append(text)
            batch.positions.append(SourcePosition(number, reader.state(), skipped.count if skipped else 0))
            size += len(text)
            if size >= BATCH:
                yield batch
                batch, size = TextBatch([], []), 0
    if batch.texts:
        yield batch


def _write(
    journal: Journal,
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
                progress(len(lengths), len(tokens), positions[-1].file)
            if writer is not None:
                journal.add(writer.finish(), positions[-1])
    except BaseException:
        if writer is not None:
            writer.abort()
        raise


class _Progress:
    """A line every few seconds."""

    def __init__(self, log: Log, journal: Journal, source: Source) -> None:
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
