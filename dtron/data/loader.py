"""Batches for one data-parallel rank, and the one number that says where the run is in its data.

Step k of the run trains on the global samples [consumed, consumed + global_batch_size), whatever the
layout; rank r of dp takes the r-th contiguous block of those rows. The order of the samples comes from
`dtron.data.order`, so neither the number of ranks nor that of worker processes changes a global batch,
and a checkpoint needs to hold `consumed` only.
"""

import dataclasses
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.utils.data

from dtron.config.sections import Config, DataLoader
from dtron.data.order import Mixture, sample_indices, seed_of
from dtron.errors import UserError
from dtron.models.loss import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "Ahead",
    "Batch",
    "SequenceDataset",
    "StepLoader",
    "ValidationLoader",
    "WorkerDiedError",
    "check_dataloader",
    "collate",
    "prefetch",
    "row_indices",
    "rows_of",
    "torch_loader",
    "with_sources",
]

T = TypeVar("T")
END: Any = object()
PROBLEM_WAIT_S = 1.0  # at the end of a step, for a batch that the next one needs anyway
PADDING = -1  # stands for a row without a sample, where a data-set index is expected

Row = tuple[np.ndarray, ...]  # (inputs [S], labels [S]) or (inputs [S], labels [S], document_start [S])


class Batch(NamedTuple):
    """One data-parallel rank's rows: int64 tensors on the CPU.

    document_start: for every token the position in its row where its document begins, under document masks.
    sources: which of a mixture's sources every row comes from; None without a mixture.
    """

    tokens: torch.Tensor  # [rows, S]
    labels: torch.Tensor  # [rows, S], IGNORE_INDEX: no loss here
    document_start: torch.Tensor | None = None  # [rows, S]
    sources: torch.Tensor | None = None  # [rows]


class SequenceDataset(Protocol):
    """What a data set provides: sequences of one length, reachable by number in any order."""

    vocab_size: int  # one more than the largest token id
    tokenizer_json: str | None  # path of a Hugging Face tokenizer.json, where there is one

    def __len__(self) -> int:
        """Number of sequences."""

    def __getitem__(self, i: int) -> Row:
        """(inputs [S], labels [S]), both int64; label IGNORE_INDEX: no loss at this position.

        With training.attention_mask = document a third array, document_start [S]: see `Batch`.
        """


def check_dataloader(cfg: Config) -> None:
    """Refuse data-loader options that could have no effect. Raises UserError."""
    for section, options in (("training", cfg.training.dataloader), ("validation", cfg.validation.dataloader)):
        if section == "training" and cfg.validation.only:
            continue
        name = f"{section}.dataloader"
        if options.persistent_workers:
            if section == "training":
                raise UserError(
                    "training.dataloader.persistent_workers = True has no effect: the training's workers live as long "
                    "as the run; leave it out, or set validation.dataloader.persistent_workers"
                )
            if options.num_workers == 0:
                raise UserError(
                    f"{name}.persistent_workers = True has no effect with {name}.num_workers = 0: "
                    "set num_workers to 1 or more, or leave persistent_workers out"
                )
        if options.pin_memory and cfg.training.device == "cpu":
            raise UserError(f'{name}.pin_memory = true has no effect with training.device = "cpu": leave it out')


def rows_of(global_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """The rows of a global batch that data-parallel rank `dp_rank` takes: one contiguous block."""
    if global_batch_size % dp_size:
        raise UserError(
            f"a global batch of {global_batch_size} sequences cannot be split evenly over {dp_size} "
            "data-parallel ranks: make training.global_batch_size a multiple of them"
        )
    rows = global_batch_size // dp_size
    return range(dp_rank * rows, (dp_rank + 1) * rows)


class _Rows:
    """Rows of several data sets, or a UserError instead: raised in a worker, its text would be a traceback."""

    def __init__(self, datasets: Sequence[SequenceDataset]) -> None:
        self.datasets = datasets

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> list[Row] | UserError:
        """indices: (data set, index) of each row."""
        try:
            return [self.row(self.datasets[source], i) for source, i in indices]
        except UserError as error:
            return error

    def row(self, dataset: SequenceDataset, i: int) -> Row:
        if i != PADDING:
            return dataset[i]
        inputs, labels, *document_start = dataset[0]  # right in shape and without loss
        return np.zeros_like(inputs), np.full_like(labels, IGNORE_INDEX), *map(np.zeros_like, document_start)


# The two batch samplers below refer to no loader: an iterator in a reference cycle would shut its
# worker processes down only when Python's garbage collector finds it, and then by a timeout.


@dataclass
class _EndlessRows:
    """Batch sampler of the endless run: (source, index) of this rank's rows of the global batches from `start` on."""

    n_samples: list[int]  # of each source
    mixture: Mixture
    global_batch_size: int
    rows: range
    seed: int
    shuffle: bool
    start: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in count(self.start, self.global_batch_size):
            yield row_indices(
                self.n_samples, self.mixture, first + self.rows.start, len(self.rows), self.seed, self.shuffle
            )


def row_indices(
    n_samples: Sequence[int], mixture: Mixture, start: int, count: int, seed: int, shuffle: bool = True
) -> list[tuple[int, int]]:
    """(source, index in its data set) of the global samples start .. start + count - 1.

    n_samples: sequences of each source. Each has an order of its own: source 0 that of `seed` itself.
    """
    sources, numbers = mixture(start, count)
    indices = np.empty_like(numbers)
    for source in np.unique(sources):
        here = sources == source
        first, last = int(numbers[here][0]), int(numbers[here][-1])  # a source's numbers follow on one another
        indices[here] = sample_indices(first, last - first + 1, n_samples[source], seed_of(seed, int(source)), shuffle)
    return list(zip(sources.tolist(), indices.tolist(), strict=True))


@dataclass(frozen=True)
class _PassRows:
    """Batch sampler of one pass in the data's own order, the last global batch filled up with PADDING."""

    n_samples: int
    global_batch_size: int
    rows: range
    n_batches: int
    first: int = 0  # batch of the pass

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for k in range(self.first, self.n_batches):
            samples = (k * self.global_batch_size + row for row in self.rows)
            yield [(0, sample if sample < self.n_samples else PADDING) for sample in samples]


def collate(rows: Sequence[Row]) -> Batch:
    """Rows as one batch, without the mixture's sources."""
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def with_sources(batch: Batch, mixture: Mixture, sources: np.ndarray) -> Batch:
    """The batch, and of a mixture the source of every row."""
    return batch if len(mixture.counts) == 1 else batch._replace(sources=torch.from_numpy(sources))


def _collate(rows: list[Row] | UserError) -> Batch | UserError:
    return rows if isinstance(rows, UserError) else collate(rows)


def _ignore_signals(worker: int) -> None:
    """Slurm and Ctrl-C signal the workers too, and the training needs them until it has saved; they end with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def torch_loader(
    dataset: Any, collate: Callable[[Any], Any], options: DataLoader, **more: Any
) -> torch.utils.data.DataLoader[Any]:
    """torch's loader with the configured workers. more: further arguments of it, in place of those."""
    arguments = {
        "num_workers": options.num_workers,
        "prefetch_factor": options.prefetch_factor if options.num_workers else None,
        "worker_init_fn": _ignore_signals,
        # By default every new iterator would draw from the global generator, which a resumed run
        # would then find in another state than a run that was never interrupted.
        "generator": torch.Generator(),
    }
    return _Loader(dataset, collate_fn=collate, **(arguments | more))


def _rows_loader(
    datasets: Sequence[SequenceDataset], batch_sampler: Any, options: DataLoader, **more: Any
) -> torch.utils.data.DataLoader[Any]:
    """Over lists of (data set, index); page-locks memory only where there is a GPU to copy to."""
    pin = options.pin_memory and torch.cuda.is_available()
    return torch_loader(_Rows(datasets), _collate, options, batch_sampler=batch_sampler, pin_memory=pin, **more)


class WorkerDiedError(RuntimeError):
    """A worker process was killed, as the text says. The rank then reads on without workers until all have saved."""


class _Loader(torch.utils.data.DataLoader[Any]):
    """torch's, of whose workers one that is killed is found when its next batch is awaited, within 5 s.

    torch's SIGCHLD handler would raise it wherever the main thread happens to be, in a collective, say.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        before = signal.getsignal(signal.SIGCHLD)
        items = super().__iter__()
        if _is_torchs(signal.getsignal(signal.SIGCHLD)):  # set once in a process, perhaps by another loader
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if _is_torchs(before) else before or signal.SIG_DFL)
        return _Watched(items, multiprocessing.active_children()) if self.num_workers else items


def _is_torchs(handler: Any) -> bool:
    return getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"


class _Watched:
    def __init__(self, items: Iterator[Any], workers: Sequence[Any]) -> None:
        self._items, self._workers = items, workers

    def __iter__(self) -> "_Watched":
        return self

    def __next__(self) -> Any:
        try:
            return next(self._items)
        except (RuntimeError, OSError, EOFError):  # also what a message half sent is
            for worker in self._workers:
                worker.join(0.2)
            dead = [f"{worker.pid} (exit code {worker.exitcode})" for worker in self._workers if worker.exitcode]
            if not dead:
                raise  # of the data set
            raise WorkerDiedError(
                f"data worker process {', '.join(dead)} was killed, which the system does when memory is short "
                "(`dmesg` then has 'Out of memory'; or /dev/shm is full): lower num_workers or prefetch_factor in "
                "[training.dataloader] and [validation.dataloader], or give the job more memory"
            ) from None


def prefetch(batches: Iterable[T], options: DataLoader) -> "Ahead[T]":
    """The same batches, taken ahead while a step computes, by one thread, from the worker processes or without any.

    iter(batches) is called here and now. It keeps no state: batches that were taken ahead and not handed out are loaded
    again on a resume. docs/data.md says why this is not torchdata's.
    """
    return Ahead(iter(batches), 1 if options.num_workers else options.prefetch_factor)


class Ahead(Iterator[T]):
    """Items taken ahead by a thread, which ends with this iterator."""

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._items, self._thread = items, ThreadPoolExecutor(1, "prefetch")
        self._waiting = deque(self._submit() for _ in range(ahead))

    def _submit(self) -> Future[T]:
        return self._thread.submit(next, self._items, END)

    def __next__(self) -> T:
        return self._take_ahead()

    def _take_ahead(self) -> T:
        item = self._waiting.popleft().result() if self._waiting else END
        if item is END:
            self._waiting.clear()
            raise StopIteration
        self._waiting.append(self._submit())
        return item

    def problem(self) -> str:
        """The mistake that stands in place of the next item; empty: none, or it is not there within PROBLEM_WAIT_S.

        So all ranks can stop and save after a step, where one of them could not take part in the next. Other errors,
        and a source that hangs, are of the step that needs the item.
        """
        try:
            item = self._waiting[0].result(PROBLEM_WAIT_S) if self._waiting else None
        except Exception:
            return ""
        return str(item) if isinstance(item, UserError) else ""

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._thread.shutdown(cancel_futures=True)


class StepLoader:
    """One `Batch` per optimizer step, without end: this rank's rows, global_batch_size / dp_size of them.

    lost_worker: what happened to a worker process, empty: nothing; then this process loads the batches itself.

    datasets: one, or several mixed by `mixture`. `consumed` counts the global samples of the batches handed
    out; those that were merely loaded ahead do not count. UserError unless dp_size divides the batch.
    """

    def __init__(
        self,
        datasets: Sequence[SequenceDataset],
        mixture: Mixture,
        *,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        options: DataLoader,
        consumed: int = 0,
        shuffle: bool = True,
    ) -> None:
        rows = rows_of(global_batch_size, dp_rank, dp_size)
        lengths = [len(dataset) for dataset in datasets]
        self._sampler = _EndlessRows(lengths, mixture, global_batch_size, rows, seed, shuffle, consumed)
        self._loader, self._options = _rows_loader(datasets, self._sampler, options), options
        self._datasets, self.lost_worker = datasets, ""
        self.seek(consumed)

    @property
    def consumed(self) -> int:
        """Global samples trained on so far: the whole state of the data, for any later layout."""
        return self._consumed

    def seek(self, consumed: int) -> None:
        """Continue from global sample `consumed`; O(1)."""
        self._consumed = self._sampler.start = consumed
        self._batches: Ahead[Batch | UserError] | None = None

    @property
    def problem(self) -> str:
        """Why there is no next batch; empty: there is, or it is not known yet."""
        return self._batches.problem() if self._batches else ""

    def state(self) -> dict[str, Any]:
        """What a resume needs besides `consumed`: nothing."""
        return {}

    def __iter__(self) -> "StepLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = prefetch(self._loader, self._options)
        sampler = self._sampler
        try:
            batch = next(self._batches)
        except WorkerDiedError as error:
            self.lost_worker = str(error)
            self._options = dataclasses.replace(self._options, num_workers=0)
            self._loader = _rows_loader(self._datasets, self._sampler, self._options)
            self.seek(self._consumed)
            return next(self)
        if isinstance(batch, UserError):
            self._batches = None  # ends the workers now: the error's traceback holds this loader
            raise batch
        first = self._consumed + sampler.rows.start
        self._consumed += sampler.global_batch_size
        return with_sources(batch, sampler.mixture, sampler.mixture(first, len(sampler.rows))[0])


class ValidationLoader:
    """One pass over a data set in its own order: every sequence once, or `steps` batches (-1: all).

    Items are those of `StepLoader`. The last batch is filled up with rows whose labels are all
    IGNORE_INDEX: every rank takes the same number of batches of the same shape, and the mean over
    the labels that count is that of the data set alone. A rank may get a batch without any such
    label, so sums of losses and of labels are to be reduced, not means.

    lost_worker: as of `StepLoader`.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        *,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        options: DataLoader,
        steps: int = -1,
    ) -> None:
        rows = rows_of(global_batch_size, dp_rank, dp_size)
        whole_pass = -(-len(dataset) // global_batch_size)
        self._n_batches = whole_pass if steps < 0 else min(steps, whole_pass)
        sampler = _PassRows(len(dataset), global_batch_size, rows, self._n_batches)
        self._options, self.lost_worker = options, ""
        self._dataset, self._sampler = dataset, sampler
        self._loader = _rows_loader([dataset], sampler, options, persistent_workers=options.persistent_workers)

    def __len__(self) -> int:
        """Batches in one pass."""
        return self._n_batches

    def __iter__(self) -> Iterator[Batch]:
        done = 0
        try:
            for batch in prefetch(self._loader, self._options):
                if isinstance(batch, UserError):
                    raise batch
                yield batch
                done += 1
        except WorkerDiedError as error:
            self.lost_worker = str(error)
            self._options = dataclasses.replace(self._options, num_workers=0, persistent_workers=False)
            rest = dataclasses.replace(self._sampler, first=done)
            self._loader = _rows_loader([self._dataset], self._sampler, self._options)
            yield from prefetch(_rows_loader([self._dataset], rest, self._options), self._options)
