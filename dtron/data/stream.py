"""Training straight from a source: its documents are tokenized and packed on the fly, exactly resumable on any layout.

A run has V virtual shards: virtual shard v gives rows [v G/V, (v+1) G/V) of every global batch of G, whichever ranks
and worker processes read it. `router` deals the documents of a source out to them in turn; each is tokenized and packed
into sequences here. In a mixture the rows are in the order of `Mixture.spread`, so that the virtual shards go through a
source together.

The state of a virtual shard is the position where the block with its next document begins, the document's number and
the tokens used of it. It says nothing of ranks or workers, so a run resumes on any others: at most a block is read
again, or a few. In checkpoints V is called `columns`, and the states `places`.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.data

from dtron.config.sections import DataLoader
from dtron.data.formats import State
from dtron.data.loader import (
    Ahead,
    Batch,
    Row,
    SequenceDataset,
    WorkerDiedError,
    collate,
    prefetch,
    rows_of,
    torch_loader,
    with_sources,
)
from dtron.data.order import Mixture, sample_indices, seed_of
from dtron.data.router import Document, Router, StreamedSource, StreamPosition
from dtron.errors import UserError

__all__ = ["StreamLoader", "StreamedSource", "merge_states", "virtual_shard_count"]

MAX_SHARDS = 32

SHOWN = 10  # bad documents that are named; the others are counted


class Part(NamedTuple):
    """Of one step, a worker's rows."""

    batch: Batch
    positions: dict[str, State]  # of its virtual shards after them
    bad: list[str]  # documents that were skipped since the last part
    skipped: dict[int, int]  # number of those of each source since the run began, up to where it was read


def virtual_shard_count(global_batch_size: int) -> int:
    """V, the virtual shards of a new run: the largest divisor of the global batch that is at most 32."""
    return next(d for d in range(min(global_batch_size, MAX_SHARDS), 0, -1) if global_batch_size % d == 0)


class _VirtualShard:
    """One virtual shard of one source: packs its documents into sequences.

    A sequence's last label is the next one's first input, so that no token goes without a prediction.
    """

    def __init__(self, router: Router, number: int, state: State) -> None:
        self._router, self._number, self._start = router, number, state
        self._used = state["used"]  # tokens of the first document held
        self._held: deque[tuple[Document, np.ndarray]] = deque()  # with its tokens

    def next_sequence(self) -> Row:
        """(inputs [S], labels [S]) int64, and document_start [S] where the source has it."""
        source = self._router.source
        size = source.seq_len + 1
        window, document_start = np.empty(size, np.int64), np.zeros(size, np.int64)
        filled, used = 0, self._used
        for i in count():
            if i == len(self._held):
                taken = self._router.take(self._number)
                self._held.extend(zip(taken, source.encoder.encode([d.text for d in taken]), strict=True))
            piece = self._held[i][1][used : used + size - filled]
            window[filled : filled + len(piece)] = piece
            if used == 0:
                document_start[filled:] = filled
            filled, used = filled + len(piece), 0
            if filled == size:
                break
        self._used += source.seq_len
        while self._used >= len(self._held[0][1]):
            self._used -= len(self._held.popleft()[1])
        row = (window[:-1], window[1:])
        return (*row, document_start[:-1]) if source.documents else row

    def state(self) -> State:
        """JSON-able: {document, used, block}, see `_start_state`."""
        if not self._held:
            return self._start
        document = self._held[0][0]
        return {"document": document.number, "used": self._used, "block": document.block._asdict()}


def _start_state(shard: int) -> State:
    """A virtual shard's state before its first sequence.

    document: number of its next document in the source's run, of which it has used `used` tokens; block: a
    `StreamPosition`.
    """
    return {"document": shard, "used": 0, "block": StreamPosition(0, 0, 0, {})._asdict()}


def merge_states(states: Sequence[State]) -> State:
    """The state of a whole run from its ranks' `StreamLoader.state()`, for the checkpoint."""
    positions = {key: position for state in states for key, position in state["places"].items()}
    return {**states[0], "places": dict(sorted(positions.items()))}


@dataclass
class _StepRows(torch.utils.data.IterableDataset[Any]):
    """A worker's part of every step.

    It refers to no loader, so that an iterator is shut down as soon as its loader is gone.
    """

    sources: Sequence[SequenceDataset | StreamedSource]
    mixture: Mixture
    global_batch_size: int
    rows: range  # of this rank
    seed: int
    shuffle: bool
    start: int  # global sample
    n_shards: int  # virtual ones
    positions: dict[str, State]  # "source/virtual shard" -> state, of all of this rank

    def shards(self, worker: int, n_workers: int) -> list[int]:
        """The virtual shards of one worker; one whose rows lie on several ranks is read by each of them."""
        size = self.global_batch_size // self.n_shards
        mine = range(self.rows.start // size, (self.rows.stop - 1) // size + 1)
        return list(mine[worker::n_workers])

    def rows_of_shard(self, shard: int) -> range:
        """Its rows of a global batch."""
        size = self.global_batch_size // self.n_shards
        return range(shard * size, (shard + 1) * size)

    def samples(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within it) of every row of the global batch whose first global sample is `start`."""
        streamed = any(isinstance(source, StreamedSource) for source in self.sources)
        return (self.mixture.spread if streamed else self.mixture)(start, self.global_batch_size)

    def __iter__(self) -> Iterator[Part | UserError]:
        info = torch.utils.data.get_worker_info()
        shards = self.shards(info.id, info.num_workers) if info else self.shards(0, 1)
        bad: list[str] = []
        try:
            routers = self._open_routers(shards, bad.append)
            streams = {
                (s, shard): _VirtualShard(router, shard, self.positions[f"{s}/{shard}"])
                for s, router in routers.items()
                for shard in shards
            }
            for start in count(self.start, self.global_batch_size):
                samples = self.samples(start)
                batch = collate([row for shard in shards for row in self._shard_rows(shard, *samples, streams)])
                positions = {f"{source}/{shard}": stream.state() for (source, shard), stream in streams.items()}
                yield Part(batch, positions, bad[:], {s: router.skipped for s, router in routers.items()})
                bad.clear()
        except UserError as error:
            yield error  # raised in a worker it would arrive with the worker's traceback as its text

    def _open_routers(self, shards: list[int], on_bad: Callable[[str], object]) -> dict[int, Router]:
        """One for each streamed source."""
        routers = {}
        for s, source in enumerate(self.sources):
            if isinstance(source, StreamedSource):
                states = {shard: self.positions[f"{s}/{shard}"] for shard in shards}
                wanted = {shard: (x["document"], StreamPosition(**x["block"])) for shard, x in states.items()}
                routers[s] = Router(source, self.n_shards, wanted, on_bad)
        return routers

    def _shard_rows(
        self, shard: int, sources: np.ndarray, numbers: np.ndarray, streams: dict[tuple[int, int], _VirtualShard]
    ) -> Iterator[Row]:
        """This rank's rows of one virtual shard, in the step of these samples."""
        for row in self.rows_of_shard(shard):
            s, number = int(sources[row]), int(numbers[row])
            source = self.sources[s]
            if isinstance(source, StreamedSource):
                sequence = streams[s, shard].next_sequence()  # also where another rank has the row
                if row in self.rows:
                    yield sequence
            elif row in self.rows:
                seed = seed_of(self.seed, s)
                yield source[int(sample_indices(number, 1, len(source), seed, self.shuffle)[0])]


def _as_it_is(item: Any) -> Any:
    return item


class StreamLoader:
    """Like `StepLoader`, one `Batch` per optimizer step without end, where sources may be streamed.

    state: `merge_states` of all ranks' `state()` at `consumed`, of any layout and worker count; None at the start.
    lost_worker: as of `StepLoader`.
    on_bad: called with the first few documents that are skipped; `skipped` counts all, each epoch's anew.
    Raises UserError where dp_size or the state's virtual shards do not divide the global batch, and where the files are
    others than those of the state.
    """

    def __init__(
        self,
        sources: Sequence[SequenceDataset | StreamedSource],
        mixture: Mixture,
        *,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        options: DataLoader,
        consumed: int = 0,
        state: State | None = None,
        shuffle: bool = True,
        on_bad: Callable[[str], object] = lambda _: None,
    ) -> None:
        rows = rows_of(global_batch_size, dp_rank, dp_size)
        n_shards = state["columns"] if state else virtual_shard_count(global_batch_size)
        if global_batch_size % n_shards:
            raise UserError(
                f"training.global_batch_size = {global_batch_size}: this run has {n_shards} virtual shards, "
                f"fixed when it began, so the global batch must be a multiple of {n_shards}: "
                f"{' or '.join(str(n_shards * (global_batch_size // n_shards + k)) for k in (1, 2))}, for example"
            )
        self._data = _StepRows(sources, mixture, global_batch_size, rows, seed, shuffle, consumed, n_shards, {})
        self._positions = self._first_positions(consumed, state)
        self._consumed, self._options = consumed, options
        self._n_workers = min(options.num_workers, len(self._data.shards(0, 1)))
        self.lost_worker = ""
        self._batches: Ahead[Part | UserError] | None = None
        self._on_bad, self._named, self._skipped = on_bad, set[str](), dict[int, int]()
        for key, position in self._positions.items():
            s = int(key.split("/")[0])
            self._skipped[s] = max(self._skipped.get(s, 0), position["block"].get("skipped", 0))

    def _first_positions(self, consumed: int, state: State | None) -> dict[str, State]:
        positions = {}
        for s, source in enumerate(self._data.sources):
            if isinstance(source, StreamedSource):
                for shard in self._data.shards(0, 1):
                    positions[f"{s}/{shard}"] = _start_state(shard)
        if state is None and consumed == 0:
            return positions
        known = state["places"] if state else {}
        if not known.keys() >= positions.keys():
            raise UserError(
                "the checkpoint does not say where this run is in its data, which is tokenized on the fly: use "
                "the data it was made with, or start a new run"
            )
        recorded = state.get("files", {}) if state else {}
        for number, files in self._files().items():
            if (then := recorded.get(number, files)) != files:
                name = getattr(self._data.sources[int(number)], "name", "the data set")
                before, now = then.split()[0], files.split()[0]
                raise UserError(
                    f"{name} had other files when the checkpoint was made ({before}, now {now}): their order depends "
                    "on their number and names, so only what is in them may change; give them their names back, a "
                    "deleted one empty, or start a new run"
                )
        return {key: known[key] for key in positions}

    def _files(self) -> dict[str, str]:
        """Of each streamed source."""
        sources = enumerate(self._data.sources)
        return {str(s): source.files for s, source in sources if isinstance(source, StreamedSource)}

    @property
    def skipped(self) -> int:
        """Documents that could not be used, up to where this rank has read."""
        return sum(self._skipped.values())

    @property
    def epochs(self) -> dict[int, int]:
        """Whole epochs of each streamed source that have been read."""
        found: dict[int, int] = {}
        for key, position in self._positions.items():
            s = int(key.split("/")[0])
            found[s] = max(found.get(s, 0), position["block"]["epoch"])
        return found

    @property
    def consumed(self) -> int:
        """Global samples trained on so far."""
        return self._consumed

    def state(self) -> State:
        """This rank's virtual shards after the batches handed out: JSON-able, for `merge_states`."""
        return {"columns": self._data.n_shards, "places": dict(self._positions), "files": self._files()}

    def __iter__(self) -> "StreamLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._open()
        try:
            item = next(self._batches)
        except WorkerDiedError as error:
            self.lost_worker = str(error)
            self._n_workers, self._options = 0, dataclasses.replace(self._options, num_workers=0)
            self._batches = None
            return next(self)
        if isinstance(item, UserError):
            self._batches = None  # ends the workers now: the error's traceback holds this loader
            raise item
        self._positions = self._positions | item.positions
        self._skipped |= {s: max(n, self._skipped[s]) for s, n in item.skipped.items()}
        for what in item.bad:  # several workers read the same
            if what not in self._named and len(self._named) < SHOWN:
                self._named.add(what)
                self._on_bad(what)
        rows = self._data.rows
        sources = self._data.samples(self._consumed)[0][rows.start : rows.stop]
        self._consumed += self._data.global_batch_size
        return with_sources(item.batch, self._data.mixture, sources)

    @property
    def problem(self) -> str:
        """Why there is no next batch; empty: there is, or it is not known yet."""
        return self._batches.problem() if self._batches else ""

    def _open(self) -> Ahead[Part | UserError]:
        """The batches from here on; no frame that an error's traceback holds refers to the workers' iterator."""
        self._data.start, self._data.positions = self._consumed, self._positions
        workers = self._n_workers
        parts = iter(torch_loader(self._data, _as_it_is, self._options, batch_size=None, num_workers=workers))
        pin = self._options.pin_memory and torch.cuda.is_available()
        return prefetch(_whole_batches(self._data, parts, max(1, workers), pin), self._options)


def _whole_batches(
    data: _StepRows, parts: Iterator[Part | UserError], n_workers: int, pin: bool
) -> Iterator[Part | UserError]:
    """The workers' parts of every step as one, its rows in the order of the global batch."""
    shards = [shard for worker in range(n_workers) for shard in data.shards(worker, n_workers)]
    rows = [row for shard in shards for row in data.rows_of_shard(shard) if row in data.rows]
    order = torch.tensor(rows).argsort()
    while True:
        batches: list[Batch] = []
        positions: dict[str, State] = {}
        bad: list[str] = []
        skipped: dict[int, int] = {}
        for part in islice(parts, n_workers):  # torch takes one item from each worker in turn
            if isinstance(part, UserError):
                yield part
                return
            batches.append(part.batch)
            positions |= part.positions
            bad += part.bad
            skipped |= {s: max(n, skipped.get(s, 0)) for s, n in part.skipped.items()}
        whole = (torch.cat(tensors)[order] for tensors in zip(*batches, strict=True) if tensors[0] is not None)
        batch = Batch(*(tensor.pin_memory() if pin else tensor for tensor in whole))
        yield Part(batch, positions, bad, skipped)
