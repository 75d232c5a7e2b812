"""Deals the documents of a source out to virtual shards, in one order for any number of processes.

files, in a new order each epoch -> blocks of `shuffle_documents` documents, each permuted -> dealt in turn to the
virtual shards

So there is one order of all documents, in which each comes once an epoch, however unequal the files are. Every process
reads all of it and keeps the documents of its own virtual shards only: reading is cheap beside tokenizing.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dtron.data.formats import BadDocument, State, good_documents
from dtron.data.order import Permutation, seed_of
from dtron.data.sources import Source
from dtron.errors import UserError

if TYPE_CHECKING:
    from dtron.data.tokenizer import TextEncoder

__all__ = ["Document", "Router", "StreamPosition", "StreamedSource"]

NEAR = 16  # blocks: a virtual shard this close behind a reader's position is served by it; one farther gets its own
TOGETHER = 1 << 14  # characters of small documents that are tokenized in one call
WAITING = 1 << 24  # characters that may wait for a slow virtual shard, in the middle of a huge document, say


class StreamedSource:
    """A source without end: epoch after epoch, tokenized on the fly into sequences of seq_len tokens.

    shuffle_documents: documents that are shuffled at a time (and held in memory); with 1 documents and files keep
    their order. documents: whether rows have the third array of `Batch`. name: for messages. skip_bad: leave out
    documents that cannot be used, which are counted.
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
        skip_bad: bool = False,
    ) -> None:
        if shuffle_documents < 1:
            raise UserError(f"shuffle_documents = {shuffle_documents}: expected 1 (no shuffle) or more documents")
        self.source, self.encoder, self.seq_len, self.name = source, encoder, seq_len, name
        self.seed, self.shuffle_documents, self.documents = seed, shuffle_documents, documents
        self.skip_bad = skip_bad
        self.vocab_size, self.tokenizer_fingerprint = encoder.vocab_size, encoder.fingerprint
        recipe = [source.fingerprint, encoder.fingerprint, seed, shuffle_documents]
        self.fingerprint = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    @property
    def files(self) -> str:
        """What decides the order of the files: a position is one in the same files only, whatever is in them."""
        names = json.dumps(getattr(self.source, "names", None))
        return f"{self.source.n_files} {hashlib.sha256(names.encode()).hexdigest()[:12]}"


class StreamPosition(NamedTuple):
    """Where a block begins: JSON-able."""

    number: int  # of its first document, in the source's endless run of documents
    epoch: int
    file: int  # in the epoch's order
    reader: State  # of the file's DocumentReader
    skipped: int = 0  # documents before it that could not be used, each epoch's anew


class Document(NamedTuple):
    number: int  # in the shuffled order
    text: str
    block: StreamPosition


class _Reader:
    """Reads the blocks of a source from `position` on, and deals their documents to the virtual shards it serves.

    on_bad: called with each document that is skipped.
    """

    def __init__(
        self, source: StreamedSource, n_shards: int, position: StreamPosition, on_bad: Callable[[str], object]
    ) -> None:
        self._streamed, self._n_shards, self._on_bad = source, n_shards, on_bad
        self._file_seed, self._block_seed = seed_of(source.seed, 1), seed_of(source.seed, 2)
        self.waiting: dict[int, deque[Document]] = {}  # of each virtual shard served
        self.characters: dict[int, int] = {}
        self._wanted: dict[int, int] = {}  # the first document each has not had
        self._position = position
        self._open()
        self._epoch_has_any = False  # a block holds a document, so there is one from any position on

    def serve(self, shard: int, document: int) -> None:
        """From now on keep the virtual shard's documents, those before `document` left out."""
        self.waiting[shard], self.characters[shard], self._wanted[shard] = deque(), 0, document

    def drop(self, shard: int) -> deque[Document]:
        """Stop serving the virtual shard; returns what waited for it."""
        del self.characters[shard]
        return self.waiting.pop(shard)

    @property
    def position(self) -> StreamPosition:
        """Of the next block."""
        return self._position._replace(reader=self._reader.state())

    def read_block(self) -> None:
        """UserError for an epoch without any document, and for what cannot be read."""
        size = self._streamed.shuffle_documents
        start, texts = self.position, list(islice(iter(self._next_text, None), size))
        if not texts:  # the epoch ended with the last block
            start, texts = self.position, list(islice(iter(self._next_text, None), size))
        order = np.zeros(1, np.int64)
        if size > 1:
            order = Permutation(len(texts), self._block_seed, start.number)(np.arange(len(texts)))
        for number, i in enumerate(order.tolist(), start.number):
            shard = number % self._n_shards
            if shard in self.waiting and number >= self._wanted[shard]:
                self.waiting[shard].append(Document(number, texts[i], start))
                self.characters[shard] += len(texts[i])
        self._position = self._position._replace(number=start.number + len(texts))

    def _open(self) -> None:
        position, file = self._position, self._position.file
        if self._streamed.shuffle_documents > 1:
            file = int(Permutation(self._streamed.source.n_files, self._file_seed, position.epoch)(np.array(file)))
        self._reader = self._streamed.source.read(file, position.reader or None)
        skip = self._skip if self._streamed.skip_bad else None
        self._documents: Iterator[str] = good_documents(self._reader, skip)

    def _skip(self, error: BadDocument) -> None:
        self._position = self._position._replace(skipped=self._position.skipped + 1)
        self._on_bad(error.what)

    def _next_text(self) -> str | None:
        """The next document, or None once at the end of an epoch."""
        while (text := next(self._documents, None)) is None:
            self._position = self._position._replace(file=self._position.file + 1, reader={})
            if self._position.file < self._streamed.source.n_files:
                self._open()
                continue
            if not self._epoch_has_any:
                bad = f" that can be used ({skipped} were skipped)" if (skipped := self._position.skipped) else ""
                raise UserError(f"{self._streamed.name} has no document{bad}: give data, or remove empty files")
            self._position = self._position._replace(epoch=self._position.epoch + 1, file=0)
            self._open()
            self._epoch_has_any = False
            return None
        self._epoch_has_any = True
        return text


class Router:
    """Gives the virtual shards of one source that a process holds their documents, with as few readers as possible."""

    def __init__(
        self,
        source: StreamedSource,
        n_shards: int,
        wanted: dict[int, tuple[int, StreamPosition]],
        on_bad: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.source, self._n_shards, self._on_bad = source, n_shards, on_bad
        self._readers: dict[int, _Reader] = {}  # of each virtual shard
        self._left = dict(wanted)  # those without a reader -> (next document, position of its block)
        for shard in sorted(wanted, key=lambda shard: wanted[shard][1].number):
            self._attach(shard)

    @property
    def skipped(self) -> int:
        """Documents that could not be used, up to where the first of the readers is."""
        return max(reader.position.skipped for reader in self._readers.values())

    def take(self, shard: int) -> list[Document]:
        """The virtual shard's next document, and of those that wait already as many as are well tokenized together."""
        if shard not in self._readers:
            self._attach(shard)
        reader = self._readers[shard]
        while not reader.waiting[shard]:
            reader.read_block()
            for other in [c for c, n in reader.characters.items() if c != shard and n > WAITING]:
                first = reader.drop(other)[0]
                del self._readers[other]
                self._left[other] = (first.number, first.block)
        waiting, size = reader.waiting[shard], 0
        taken: list[Document] = []
        while waiting and (not taken or size + len(waiting[0].text) <= TOGETHER):
            taken.append(waiting.popleft())
            size += len(taken[-1].text)
        reader.characters[shard] -= size
        return taken

    def _attach(self, shard: int) -> None:
        document, position = self._left.pop(shard)
        near = NEAR * self.source.shuffle_documents
        for reader in self._readers.values():
            if 0 <= position.number - reader.position.number <= near:
                break
        else:
            reader = _Reader(self.source, self._n_shards, position, self._on_bad)
        reader.serve(shard, document)
        self._readers[shard] = reader
