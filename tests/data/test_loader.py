"""Every layout, worker count and resume point sees the same global batches."""

import gc
import os
import re
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from dtron.config import Config, replace
from dtron.config.sections import DataLoader
from dtron.data import loader as loader_module
from dtron.data.loader import IGNORE_INDEX, StepLoader, ValidationLoader, check_dataloader, rows_of
from dtron.data.order import Mixture, sample_indices
from dtron.errors import UserError

S = 4


class Numbered:
    """n sequences of consecutive numbers: the first token of sequence i is first + i * S."""

    tokenizer_json = None

    def __init__(self, n, first=0):
        self.n, self.first, self.vocab_size = n, first, first + n * S + 1

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        assert 0 <= i < self.n
        window = np.arange(self.first + i * S, self.first + (i + 1) * S + 1)
        return window[:-1], window[1:]


class WithWorker:
    """Sequences that carry the id of the process that read them."""

    vocab_size, tokenizer_json = 1, None

    def __len__(self):
        return 64

    def __getitem__(self, i):
        info = torch.utils.data.get_worker_info()
        pid = torch.multiprocessing.current_process().pid
        return np.full(S, i), np.full(S, pid if info else 0)


def steps(dataset, n_steps, dp=1, workers=0, consumed=0, gbs=16, **kwargs):
    """The global batches of `n_steps` steps, put together from all ranks: [steps, gbs, 2, S]."""
    kwargs |= {"global_batch_size": gbs, "options": DataLoader(num_workers=workers), "seed": 5}
    loaders = [
        StepLoader([dataset], Mixture([1]), dp_rank=r, dp_size=dp, consumed=consumed, **kwargs) for r in range(dp)
    ]
    taken = []
    for _ in range(n_steps):
        batches = [next(loader)[:2] for loader in loaders]
        assert all(x.shape == y.shape == (gbs // dp, S) and x.dtype == y.dtype == torch.int64 for x, y in batches)
        taken.append(torch.cat([torch.stack(batch, 1) for batch in batches]))
    assert {loader.consumed for loader in loaders} == {consumed + n_steps * gbs}
    return torch.stack(taken)


@pytest.mark.parametrize("dp,workers", [(2, 0), (4, 0), (8, 0), (1, 2), (4, 2)])
def test_global_batches_do_not_depend_on_the_layout(dp, workers):
    dataset = Numbered(50)  # 16 does not divide 50: epochs end inside batches
    reference = steps(dataset, 8)
    assert torch.equal(steps(dataset, 8, dp, workers), reference)
    for done in (1, 3, 7):
        assert torch.equal(steps(dataset, 8 - done, dp, workers, consumed=16 * done), reference[done:])


def test_batches_hold_the_samples_of_the_order():
    n, gbs = 50, 16
    batches = steps(Numbered(n), 10, gbs=gbs)
    indices = batches[:, :, 0, 0].flatten() // S
    assert indices.tolist() == sample_indices(0, 10 * gbs, n, seed=5).tolist()
    assert sorted(indices[:n].tolist()) == list(range(n))  # an epoch that ends inside the fourth batch
    assert torch.equal(batches[..., 1, :], batches[..., 0, :] + 1)  # labels: the next token


def test_another_global_batch_size_continues_where_the_old_one_stopped():
    dataset = Numbered(50)
    small = steps(dataset, 3, gbs=8).flatten(0, 1)
    large = steps(dataset, 2, consumed=24, gbs=16).flatten(0, 1)
    assert torch.equal(torch.cat([small, large]), steps(dataset, 7, gbs=8).flatten(0, 1))


def test_without_shuffle_the_order_is_that_of_the_data():
    indices = steps(Numbered(50), 4, shuffle=False)[:, :, 0, 0].flatten() // S
    assert indices.tolist() == [g % 50 for g in range(64)]


@pytest.mark.parametrize("workers", [0, 2])
def test_seek_drops_what_was_loaded_ahead(workers):
    dataset = Numbered(50)
    options = DataLoader(num_workers=workers)
    loader = StepLoader([dataset], Mixture([1]), global_batch_size=16, dp_rank=0, dp_size=1, seed=5, options=options)
    reference = steps(dataset, 6)
    for start in (0, 4, 1):
        loader.seek(16 * start)
        assert loader.consumed == 16 * start
        for k in (start, start + 1):
            assert torch.equal(torch.stack(next(loader)[:2], 1), reference[k])
            assert loader.consumed == 16 * (k + 1)


def test_workers_end_with_their_loader():
    others = set(torch.multiprocessing.active_children())  # the pool of ranks, where other tests ran before
    options = DataLoader(num_workers=2)
    loader = StepLoader(
        [Numbered(50)], Mixture([1]), global_batch_size=16, dp_rank=0, dp_size=1, seed=5, options=options
    )
    next(loader)
    assert len(set(torch.multiprocessing.active_children()) - others) == 2
    gc.disable()
    try:
        del loader
        assert set(torch.multiprocessing.active_children()) <= others
    finally:
        gc.enable()


def test_loading_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    steps(Numbered(50), 1)
    list(ValidationLoader(Numbered(5), global_batch_size=4, dp_rank=0, dp_size=1, options=DataLoader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_uneven_split_is_refused():
    assert [list(rows_of(6, r, 3)) for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    for make in (partial(StepLoader, [Numbered(50)], Mixture([1]), seed=0), partial(ValidationLoader, Numbered(50))):
        with pytest.raises(UserError, match="10 sequences .* 4 data-parallel ranks"):
            make(global_batch_size=10, dp_rank=0, dp_size=4, options=DataLoader())


@pytest.mark.parametrize(
    "n,dp,workers", [(17, 4, 2), *((n, dp, 0) for n in (1, 15, 16, 17, 50) for dp in (1, 2, 4, 8))]
)
def test_validation_takes_every_sequence_once(n, dp, workers):
    options = DataLoader(num_workers=workers)
    loaders = [
        ValidationLoader(Numbered(n), global_batch_size=16, dp_rank=r, dp_size=dp, options=options) for r in range(dp)
    ]
    ranks = [list(loader) for loader in loaders]
    assert {len(batches) for batches in ranks} == {len(loader) for loader in loaders} == {-(-n // 16)}
    seen = []
    for batches in zip(*ranks, strict=True):
        inputs, labels = (torch.cat(parts) for parts in zip(*(batch[:2] for batch in batches), strict=True))
        assert inputs.shape == labels.shape == (16, S)
        real = (labels != IGNORE_INDEX).all(1)
        assert (labels[~real] == IGNORE_INDEX).all()
        assert torch.equal(labels[real], inputs[real] + 1)
        seen += (inputs[real][:, 0] // S).tolist()
    assert seen == list(range(n))


def test_validation_steps_limit_the_batches_and_every_pass_is_the_same():
    def loader(steps):
        layout = {"global_batch_size": 16, "dp_rank": 0, "dp_size": 1}
        return ValidationLoader(Numbered(50), **layout, options=DataLoader(), steps=steps)

    assert [len(loader(steps)) for steps in (-1, 1, 3, 4, 99)] == [4, 1, 3, 4, 4]
    two = loader(2)
    first, second = list(two), list(two)
    assert len(first) == len(second) == 2
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x[:2], y[:2], strict=True))


@pytest.mark.parametrize("persistent", [False, True])
def test_persistent_workers_outlive_a_pass(persistent):
    options = DataLoader(num_workers=2, persistent_workers=persistent)
    loader = ValidationLoader(WithWorker(), global_batch_size=8, dp_rank=0, dp_size=1, options=options)
    passes = [{int(batch.labels[0, 0]) for batch in loader} for _ in range(2)]
    assert all(len(pids) == 2 and 0 not in pids for pids in passes)
    assert (passes[0] == passes[1]) == persistent


def test_prefetch_factor_and_pin_memory_reach_torch(monkeypatch):
    seen = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loader_module, "_Loader", lambda dataset, **options: seen.update(options))
    options = DataLoader(num_workers=3, prefetch_factor=7, pin_memory=True)
    StepLoader([Numbered(50)], Mixture([1]), global_batch_size=8, dp_rank=0, dp_size=1, seed=0, options=options)
    assert (seen["num_workers"], seen["prefetch_factor"], seen["pin_memory"]) == (3, 7, True)


@pytest.mark.parametrize("section", ["training", "validation"])
@pytest.mark.parametrize("option,value", [("persistent_workers", True), ("pin_memory", True)])
def test_options_without_effect_are_refused(section, option, value):
    check_dataloader(Config())
    cfg = replace(replace(Config(), "training.device", "cpu"), f"{section}.dataloader.{option}", value)
    with pytest.raises(UserError, match=rf"{section}\.dataloader\.{option} = (?i:{value}) has no effect"):
        check_dataloader(cfg)
    cfg = replace(replace(cfg, f"{section}.dataloader.num_workers", 1), "training.device", "auto")
    if (section, option) == ("training", "persistent_workers"):
        with pytest.raises(UserError, match="training.* no effect: .* as long as the run; .*validation.dataloader"):
            check_dataloader(cfg)
    else:
        check_dataloader(cfg)


class Recording(Numbered):
    """Notes which sequences are read, and by which thread."""

    def __init__(self, n):
        super().__init__(n)
        self.read, self.threads = [], set()

    def __getitem__(self, i):
        self.read.append(i)
        self.threads.add(threading.current_thread())
        return super().__getitem__(i)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_a_thread_loads_ahead_of_the_step(ahead):
    data, options = Recording(64), DataLoader(prefetch_factor=ahead)
    loader = StepLoader(
        [data], Mixture([1]), global_batch_size=4, dp_rank=0, dp_size=1, seed=5, options=options, shuffle=False
    )
    for step in range(1, 4):
        next(loader)
        end = time.monotonic() + 30
        while len(data.read) < 4 * (step + ahead):
            assert time.monotonic() < end
            time.sleep(0.001)
        assert data.read == list(range(4 * (step + ahead))) and loader.consumed == 4 * step
    [thread] = data.threads
    assert thread is not threading.current_thread()
    gc.disable()
    try:
        del loader
        assert not thread.is_alive()
    finally:
        gc.enable()


# --- mixtures


def mixed(n_steps, dp=1, workers=0, consumed=0):
    """The global batches of a mixture of two sources: first tokens [steps, 16] and sources [steps, 16]."""
    options = DataLoader(num_workers=workers)
    sources = [Numbered(50), Numbered(30, first=1000)]
    loaders = [
        StepLoader(sources, Mixture([3, 1]), global_batch_size=16, dp_rank=r, dp_size=dp, seed=5,
                   options=options, consumed=consumed)
        for r in range(dp)
    ]  # fmt: skip
    taken = [[next(loader) for loader in loaders] for _ in range(n_steps)]
    first = torch.stack([torch.cat([batch.tokens[:, 0] for batch in batches]) for batches in taken])
    return first, torch.stack([torch.cat([batch.sources for batch in batches]) for batches in taken])


@pytest.mark.parametrize("dp,workers", [(2, 0), (4, 2), (16, 0)])
def test_mixed_batches_do_not_depend_on_the_layout(dp, workers):
    reference = mixed(8)
    for done in (0, 5):
        again = mixed(8 - done, dp, workers, consumed=16 * done)
        assert all(torch.equal(a, b[done:]) for a, b in zip(again, reference, strict=True))


def test_a_mixture_takes_every_source_in_its_own_order_and_share():
    first, sources = mixed(40)
    assert ((sources == 0).sum(1) == 12).all() and ((first >= 1000) == (sources == 1)).all()
    for source, n, base in ((0, 50, 0), (1, 30, 1000)):
        indices = (first[sources == source] - base) // S
        assert sorted(indices[:n].tolist()) == list(range(n))  # every sequence once an epoch of its own source
        assert indices[:n].tolist() != indices[n : 2 * n].tolist()
    both = [(first[sources == s] - 1000 * s)[:30].tolist() for s in (0, 1)]
    assert both[0] != both[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_arrives_as_it_is(workers):
    class Damaged(WithWorker):
        def __getitem__(self, i):
            raise UserError(f"shard-00003 is damaged, seen at sequence {i}")

    options = {"options": DataLoader(num_workers=workers), "global_batch_size": 4, "dp_rank": 0, "dp_size": 1}
    for loader in (StepLoader([Damaged()], Mixture([1]), seed=0, **options), ValidationLoader(Damaged(), **options)):
        with pytest.raises(UserError, match=r"^shard-00003 is damaged, seen at sequence \d+$"):
            next(iter(loader))


def test_a_killed_worker_is_reported():
    others = set(torch.multiprocessing.active_children())
    options = {"options": DataLoader(num_workers=2), "global_batch_size": 4, "dp_rank": 0, "dp_size": 1}
    loader = StepLoader([Numbered(50)], Mixture([1]), seed=0, **options)
    next(loader)
    worker = (set(torch.multiprocessing.active_children()) - others).pop()
    worker.kill()
    for _ in range(10_000):
        next(loader)  # read by this process itself
        if loader.lost_worker:
            break
    assert re.search(rf"worker .*{worker.pid}.* (killed|exited)", loader.lost_worker)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_costs_no_batch(workers):
    """The rank reads on by itself, says so, and torch's own handler raises nothing elsewhere."""
    list(torch.utils.data.DataLoader(range(2), num_workers=1))  # sets torch's handler, which is to go
    expected = steps(Numbered(40), 14)  # more than were loaded ahead when the worker is killed
    kwargs = {"global_batch_size": 16, "dp_rank": 0, "dp_size": 1, "options": DataLoader(num_workers=workers)}
    loader = StepLoader([Numbered(40)], Mixture([1]), seed=5, **kwargs)
    taken = [torch.stack(next(loader)[:2], 1) for _ in range(2)]
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL and loader.lost_worker == ""
    kill_one()
    time.sleep(0.2)  # the signal of its end has come
    taken += [torch.stack(next(loader)[:2], 1) for _ in range(12)]
    assert torch.equal(torch.stack(taken).flatten(), torch.as_tensor(expected).flatten())
    assert "data worker process" in loader.lost_worker and "memory" in loader.lost_worker
    assert loader.consumed == 14 * 16


@pytest.mark.parametrize("persistent", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_validation_whose_worker_is_killed_is_complete(persistent):
    options = DataLoader(num_workers=1, persistent_workers=persistent, prefetch_factor=1)
    loader = ValidationLoader(Numbered(40), global_batch_size=4, dp_rank=0, dp_size=1, options=options)
    whole = [batch.tokens.tolist() for batch in loader]
    seen = []
    for batch in loader:
        seen.append(batch.tokens.tolist())
        if len(seen) == 3:
            kill_one()
    assert seen == whole == [batch.tokens.tolist() for batch in loader]
    assert "data worker process" in loader.lost_worker


def kill_one():
    os.kill(torch.multiprocessing.active_children()[0].pid, signal.SIGKILL)
