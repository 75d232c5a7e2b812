"""Text to tokens in worker processes, the batches in order."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, NamedTuple

import numpy as np

from dtron.data.formats import State
from dtron.data.tokenizer import TextEncoder
from dtron.errors import UserError

__all__ = ["Encoded", "SourcePosition", "TextBatch", "encode_in_order"]


class SourcePosition(NamedTuple):
    """From where a source is read on."""

    file: int = 0
    state: State | None = None  # of its reader
    skipped: int = 0  # documents before this that could not be used


class TextBatch(NamedTuple):
    """Documents that are encoded together."""

    texts: list[str]
    positions: list[SourcePosition]  # after each text


class Encoded(NamedTuple):
    """A batch of documents."""

    tokens: np.ndarray  # one document after another, as the tokenizer's dtype
    lengths: np.ndarray  # [documents] int64: tokens of each


def encode_in_order(
    batches: Iterable[TextBatch], encoder: TextEncoder, processes: int
) -> Generator[tuple[TextBatch, Encoded], None, None]:
    """Encode every batch; at most two batches per process are read ahead.

    processes: with 1 it is this one, with as many threads as the library takes. Closing the generator ends the others.
    Raises UserError where one of them dies.
    """
    if processes == 1:
        yield from ((batch, _encode(encoder, batch.texts)) for batch in batches)
        return
    context = _Context()
    pool = ProcessPoolExecutor(processes, context, _start_worker, (encoder,))
    waiting: deque[tuple[TextBatch, Future[Encoded]]] = deque()

    def first() -> tuple[TextBatch, Encoded]:
        batch, encoded = waiting.popleft()
        return batch, encoded.result()

    try:
        for batch in batches:
            if len(waiting) == 2 * processes:  # one in work and one waiting for each
                yield first()
            waiting.append((batch, pool.submit(_encode_in_worker, batch.texts)))
        while waiting:
            yield first()
    except BrokenProcessPool as error:
        if sys.version_info < (
            3,
            11,
            5,
        ):  # else it waits forever for its feeder thread (cpython issue 94777)
            pool._call_queue._reader.close()  # type: ignore[attr-defined]
        pool.shutdown()
        ended = {process.exitcode for process in context.started} - {0, -signal.SIGTERM}  # the pool ends the others
        raise UserError(
            f"a worker process died (exit code {', '.join(map(str, ended)) or 'unknown'}; -9 is usually the system, "
            "out of memory): what is finished stays; give the same command again, with fewer --processes if memory is "
            "short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(encoder: TextEncoder, texts: Sequence[str]) -> Encoded:
    documents = encoder.encode(texts)
    return Encoded(np.concatenate(documents), np.array([len(tokens) for tokens in documents], np.int64))


class _Context(SpawnContext):
    """Spawns processes and remembers them for their exit codes, which BrokenProcessPool does not give."""

    def __init__(self) -> None:
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        self.started.append(SpawnProcess(*args, **kwargs))
        return self.started[-1]


_encoder: TextEncoder  # of a worker process, set once


def _start_worker(encoder: TextEncoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process is interrupted too, and ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    # A pool's workers outlive a main process that is killed: each holds both ends of the pipe they read from.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return _encode(_encoder, texts)
