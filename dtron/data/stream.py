"""Training straight from a source: its documents are tokenized and packed on the way, exactly resumable on any layout.

A run has V virtual streams, the columns: column v gives rows [v G/V, (v+1) G/V) of every global batch of G, whichever
ranks and worker processes read it. The way of the data, for one source:

files, in a new order each epoch -> blocks of `shuffle_documents` documents, each permuted -> dealt in turn to the V
columns -> tokens -> packed into sequences by each column.

So there is one order of all documents, in which each comes once an epoch, however unequal the files are. Every process
reads all of it and tokenizes its own columns' documents only: reading is cheap beside tokenizing.

A column's state is the place where the block with its next document begins, the document's number and the tokens used
of it. It says nothing of ranks or workers, so a run continues on any others: at most a block is read again, or a few.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.utils.data

from dtron.config.sections import DataLoader
from dtron.data.loader import Batch, Row, SequenceDataset, collate, prefetch, rows_of, seed_of, torch_loader
from dtron.data.order import Mixture, Permutation, sample_indices
from dtron.data.sources import Source
from dtron.errors import UserError

if TYPE_CHECKING:
    from dtron.data.tokenizer import TextEncoder

__all__ = ["StreamLoader", "StreamedSource", "column_count", "merge_states"]

MAX_COLUMNS = 32
NEAR = 16  # blocks: a column this close behind a reader's place is served by it; one farther gets its own
TOGETHER = 1 << 14  # characters of small documents that are tokenized in one call
WAITING = 1 << 24  # characters that may wait for a slow column, in the middle of a huge document, say

State = dict[str, Any]
# Of one step, a worker's rows and the states of its columns after them; or, at last, a UserError.
Part = tuple[Batch, dict[str, State]] | UserError


def column_count(global_batch_size: int) -> int:
    """V, the virtual streams of a new run: the largest divisor of the global batch that is at most 32."""
    return next(d for d in range(min(global_batch_size, MAX_COLUMNS), 0, -1) if global_batch_size % d == 0)


class StreamedSource:
    """A source without end: epoch after epoch, tokenized on the way into sequences of seq_len tokens.

    shuffle_documents: documents that are shuffled at a time (and held in memory); with 1 documents and files keep
    their order. documents: whether rows have the third array of `Batch`. name: for messages.
    The attributes are those of a `SequenceDataset`; `fingerprint` is of all that decides the order of the tokens.
    """

    tokenizer_json = None

    def __init__(
        self,
        source: Source,
        encoder: "TextEncoder",
        seq_len: int,
        *,
        seed: int,
        shuffle_documents: int = 1000,
        documents: bool = False,
        name: str = "the data set",
    ) -> None:
        if shuffle_documents < 1:
            raise UserError(f"shuffle_documents = {shuffle_documents}: expected 1 (no shuffle) or more documents")
        self.source, self.encoder, self.seq_len, self.name = source, encoder, seq_len, name
        self.seed, self.shuffle_documents, self.documents = seed, shuffle_documents, documents
        self.vocab_size, self.tokenizer_fingerprint = encoder.vocab_size, encoder.fingerprint
        recipe = [source.fingerprint, encoder.fingerprint, seed, shuffle_documents]
        self.fingerprint = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


class _Place(NamedTuple):
    """Where a block begins: JSON-able."""

    number: int  # of its first document, in the source's endless run of documents
    epoch: int
    file: int  # in the epoch's order
    reader: State  # of the file's DocumentReader


class _Document(NamedTuple):
    number: int  # in the shuffled order
    text: str
    block: _Place


class _Reader:
    """Reads the blocks of a source from `place` on, and deals their documents to the columns it serves."""

    def __init__(self, source: StreamedSource, n_columns: int, place: _Place) -> None:
        self._streamed, self._n_columns = source, n_columns
        self._file_seed, self._block_seed = seed_of(source.seed, 1), seed_of(source.seed, 2)
        self.waiting: dict[int, deque[_Document]] = {}  # of each column served
        self.characters: dict[int, int] = {}
        self._wanted: dict[int, int] = {}  # the first document each has not had
        self._place = place
        self._open()
        self._epoch_has_any = False  # a block holds a document, so there is one from any place on

    def serve(self, column: int, document: int) -> None:
        """From now on keep the column's documents, those before `document` left out."""
        self.waiting[column], self.characters[column], self._wanted[column] = deque(), 0, document

    def drop(self, column: int) -> deque[_Document]:
        """Serve the column no more; gives what waited for it."""
        del self.characters[column]
        return self.waiting.pop(column)

    @property
    def place(self) -> _Place:
        """Of the next block."""
        return self._place._replace(reader=self._documents.state())

    def read_block(self) -> None:
        """UserError for an epoch without any document, and for what cannot be read."""
        size = self._streamed.shuffle_documents
        start, texts = self.place, list(islice(iter(self._next_text, None), size))
        if not texts:  # the epoch ended with the last block
            start, texts = self.place, list(islice(iter(self._next_text, None), size))
        order = np.zeros(1, np.int64)
        if size > 1:
            order = Permutation(len(texts), self._block_seed, start.number)(np.arange(len(texts)))
        for number, i in enumerate(order.tolist(), start.number):
            column = number % self._n_columns
            if column in self.waiting and number >= self._wanted[column]:
                self.waiting[column].append(_Document(number, texts[i], start))
                self.characters[column] += len(texts[i])
        self._place = self._place._replace(number=start.number + len(texts))

    def _open(self) -> None:
        place, file = self._place, self._place.file
        if self._streamed.shuffle_documents > 1:
            file = int(Permutation(self._streamed.source.n_files, self._file_seed, place.epoch)(np.array(file)))
        self._documents = self._streamed.source.read(file, place.reader or None)

    def _next_text(self) -> str | None:
        """The next document, or None once at the end of an epoch."""
        while (text := next(self._documents, None)) is None:
            self._place = self._place._replace(file=self._place.file + 1, reader={})
            if self._place.file < self._streamed.source.n_files:
                self._open()
                continue
            if not self._epoch_has_any:
                raise UserError(f"{self._streamed.name} has no document: give data, or remove empty files")
            self._place = self._place._replace(epoch=self._place.epoch + 1, file=0)
            self._open()
            self._epoch_has_any = False
            return None
        self._epoch_has_any = True
        return text


class _Dealer:
    """The columns of one source that a process holds, served by as few readers as may be."""

    def __init__(self, source: StreamedSource, n_columns: int, wanted: dict[int, tuple[int, _Place]]) -> None:
        self.source, self._n_columns = source, n_columns
        self._readers: dict[int, _Reader] = {}  # of each column
        self._left = dict(wanted)  # columns without a reader -> (their next document, the place of its block)
        for column in sorted(wanted, key=lambda column: wanted[column][1].number):
            self._attach(column)

    def take(self, column: int) -> list[_Document]:
        """The column's next document, and of those that wait already as many as are well tokenized together."""
        if column not in self._readers:
            self._attach(column)
        reader = self._readers[column]
        while not reader.waiting[column]:
            reader.read_block()
            for other in [c for c, n in reader.characters.items() if c != column and n > WAITING]:
                first = reader.drop(other)[0]
                del self._readers[other]
                self._left[other] = (first.number, first.block)
        waiting, size = reader.waiting[column], 0
        taken: list[_Document] = []
        while waiting and (not taken or size + len(waiting[0].text) <= TOGETHER):
            taken.append(waiting.popleft())
            size += len(taken[-1].text)
        reader.characters[column] -= size
        return taken

    def _attach(self, column: int) -> None:
        document, place = self._left.pop(column)
        near = NEAR * self.source.shuffle_documents
        for reader in self._readers.values():
            if 0 <= place.number - reader.place.number <= near:
                break
        else:
            reader = _Reader(self.source, self._n_columns, place)
        reader.serve(column, document)
        self._readers[column] = reader


class _Column:
    """One virtual stream of one source: packs its documents into sequences.

    A sequence's last label is the next one's first input, so that no token goes without a prediction.
    """

    def __init__(self, dealer: _Dealer, column: int, state: State) -> None:
        self._dealer, self._column, self._start = dealer, column, state
        self._used = state["used"]  # tokens of the first document held
        self._held: deque[tuple[_Document, np.ndarray]] = deque()  # with its tokens

    def next_sequence(self) -> Row:
        """(inputs [S], labels [S]) int64, and documents [S] where the source has them."""
        source = self._dealer.source
        size = source.seq_len + 1
        window, documents = np.empty(size, np.int64), np.zeros(size, np.int64)
        filled, used = 0, self._used
        for i in count():
            if i == len(self._held):
                taken = self._dealer.take(self._column)
                self._held.extend(zip(taken, source.encoder.encode([d.text for d in taken]), strict=True))
            piece = self._held[i][1][used : used + size - filled]
            window[filled : filled + len(piece)] = piece
            if used == 0:
                documents[filled:] = filled
            filled, used = filled + len(piece), 0
            if filled == size:
                break
        self._used += source.seq_len
        while self._used >= len(self._held[0][1]):
            self._used -= len(self._held.popleft()[1])
        row = (window[:-1], window[1:])
        return (*row, documents[:-1]) if source.documents else row

    def state(self) -> State:
        """JSON-able: {document, used, block}, see `_start_state`."""
        if not self._held:
            return self._start
        document = self._held[0][0]
        return {"document": document.number, "used": self._used, "block": document.block._asdict()}


def _start_state(column: int) -> State:
    """A column's state before its first sequence.

    document: number of its next document in the source's run, of which it has used `used` tokens; block: a `_Place`.
    """
    return {"document": column, "used": 0, "block": _Place(0, 0, 0, {})._asdict()}


def merge_states(states: Sequence[State]) -> State:
    """The state of a whole run from its ranks' `StreamLoader.state()`, for the checkpoint."""
    places = {key: place for state in states for key, place in state["places"].items()}
    return {"columns": states[0]["columns"], "places": dict(sorted(places.items()))}


@dataclass
class _StepRows(torch.utils.data.IterableDataset):
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
    n_columns: int
    places: dict[str, State]  # "source/column" -> state, of every column of this rank

    def columns(self, worker: int, n_workers: int) -> list[int]:
        """The columns of one worker; a column whose rows lie on several ranks is read by each of them."""
        size = self.global_batch_size // self.n_columns
        mine = range(self.rows.start // size, (self.rows.stop - 1) // size + 1)
        return list(mine[worker::n_workers])

    def rows_of_column(self, column: int) -> range:
        """Its rows of a global batch."""
        size = self.global_batch_size // self.n_columns
        return range(column * size, (column + 1) * size)

    def __iter__(self) -> Iterator[Part]:
        info = torch.utils.data.get_worker_info()
        columns = self.columns(info.id, info.num_workers) if info else self.columns(0, 1)
        try:
            streams = self._open(columns)
            for start in count(self.start, self.global_batch_size):
                batch = collate([row for column in columns for row in self._column_rows(column, start, streams)])
                yield batch, {f"{source}/{column}": stream.state() for (source, column), stream in streams.items()}
        except UserError as error:
            yield error  # raised in a worker it would arrive with the worker's traceback as its text

    def _open(self, columns: list[int]) -> dict[tuple[int, int], _Column]:
        streams: dict[tuple[int, int], _Column] = {}
        for s, source in enumerate(self.sources):
            if isinstance(source, StreamedSource):
                states = {column: self.places[f"{s}/{column}"] for column in columns}
                wanted = {column: (x["document"], _Place(**x["block"])) for column, x in states.items()}
                dealer = _Dealer(source, self.n_columns, wanted)
                streams |= {(s, column): _Column(dealer, column, state) for column, state in states.items()}
        return streams

    def _column_rows(self, column: int, start: int, streams: dict[tuple[int, int], _Column]) -> Iterator[Row]:
        """This rank's rows of one column, in the step whose first global sample is `start`."""
        rows = self.rows_of_column(column)
        sources, numbers = self.mixture(start + rows.start, len(rows))
        for row, s, number in zip(rows, sources.tolist(), numbers.tolist(), strict=True):
            source = self.sources[s]
            if isinstance(source, StreamedSource):
                sequence = streams[s, column].next_sequence()  # also where another rank has the row
                if row in self.rows:
                    yield sequence
            elif row in self.rows:
                seed = seed_of(self.seed, s)
                yield source[int(sample_indices(number, 1, len(source), seed, self.shuffle)[0])]


def _as_it_is(item: Any) -> Any:
    return item


class StreamLoader:
    """As `StepLoader`, one `Batch` an optimizer step without end, where sources may be streamed.

    state: `merge_states` of all ranks' `state()` at `consumed`, of any layout and worker count; None at the start.
    Raises UserError where dp_size or the state's virtual streams do not divide the global batch.
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
    ) -> None:
        rows = rows_of(global_batch_size, dp_rank, dp_size)
        n_columns = state["columns"] if state else column_count(global_batch_size)
        if global_batch_size % n_columns:
            raise UserError(
                f"training.global_batch_size = {global_batch_size}: this run reads its data in {n_columns} streams, "
                f"fixed when it began, so the global batch must be a multiple of {n_columns}: "
                f"{' or '.join(str(n_columns * (global_batch_size // n_columns + k)) for k in (1, 2))}, for example"
            )
        self._data = _StepRows(sources, mixture, global_batch_size, rows, seed, shuffle, consumed, n_columns, {})
        self._places = self._first_places(consumed, state)
        self._consumed, self._options = consumed, options
        self._n_workers = min(options.num_workers, len(self._data.columns(0, 1)))
        self._batches: Iterator[Part] | None = None

    def _first_places(self, consumed: int, state: State | None) -> dict[str, State]:
        places = {}
        for s, source in enumerate(self._data.sources):
            if isinstance(source, StreamedSource):
                for column in self._data.columns(0, 1):
                    places[f"{s}/{column}"] = _start_state(column)
        if state is None and consumed == 0:
            return places
        known = state["places"] if state else {}
        if not known.keys() >= places.keys():
            raise UserError(
                "the checkpoint does not say where this run stands in its data, which is tokenized on the way: "
                "give the data it was made with, or start a run of its own"
            )
        return {key: known[key] for key in places}

    @property
    def consumed(self) -> int:
        """Global samples trained on so far."""
        return self._consumed

    def state(self) -> State:
        """This rank's columns after the batches handed out: JSON-able, for `merge_states`."""
        return {"columns": self._data.n_columns, "places": dict(self._places)}

    def __iter__(self) -> "StreamLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._data.start, self._data.places = self._consumed, self._places
            workers = self._n_workers
            parts = iter(torch_loader(self._data, _as_it_is, self._options, batch_size=None, num_workers=workers))
            pin = self._options.pin_memory and torch.cuda.is_available()
            self._batches = prefetch(_whole_batches(self._data, parts, max(1, workers), pin), self._options)
        item = next(self._batches)
        if isinstance(item, UserError):
            self._batches = None  # ends the workers now: the error's traceback holds this loader
            raise item
        batch, places = item
        self._places = self._places | places
        data = self._data
        if len(data.sources) > 1:
            sources, _ = data.mixture(self._consumed + data.rows.start, len(data.rows))
            batch = batch._replace(sources=torch.from_numpy(sources))
        self._consumed += data.global_batch_size
        return batch


def _whole_batches(data: _StepRows, parts: Iterator[Part], n_workers: int, pin: bool) -> Iterator[Part]:
    """The workers' parts of every step as one, its rows in the order of the global batch."""
    columns = [column for worker in range(n_workers) for column in data.columns(worker, n_workers)]
    rows = [row for column in columns for row in data.rows_of_column(column) if row in data.rows]
    order = torch.tensor(rows).argsort()
    while True:
        batches: list[Batch] = []
        places: dict[str, State] = {}
        for part in islice(parts, n_workers):  # torch takes one item from each worker in turn
            if isinstance(part, UserError):
                yield part
                return
            batches.append(part[0])
            places |= part[1]
        whole = (torch.cat(tensors)[order] for tensors in zip(*batches, strict=True) if tensors[0] is not None)
        yield Batch(*(tensor.pin_memory() if pin else tensor for tensor in whole)), places
