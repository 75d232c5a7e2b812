"""The times of phases, and the rank that others wait for, by name."""

import dataclasses
import socket
import time
import types
from typing import Any

import pytest
import torch
from ranks import Ranks
from tinyrun import Collecting, quiet_world, tiny_setup

from dtron.observe import phases as phases_module
from dtron.observe.metrics import read_metrics
from dtron.observe.phases import Phases
from dtron.train import slowest as slowest_module
from dtron.train.slowest import Slowest
from dtron.train.trainer import Trainer


class SlowData(Trainer):
    """Rank 1 gets its batch late."""

    def next_batch(self) -> Any:
        if self.world.rank == 1:
            time.sleep(0.15)
        return super().next_batch()


def train_with_a_slow_rank(folder: str) -> tuple[list[dict[str, Any]], list[str]]:
    world, said = quiet_world()
    world = dataclasses.replace(world, store=torch.distributed.distributed_c10d._get_default_store())
    arguments = f"--dp 2 --job.dump_folder {folder} --metrics.log_freq 1 --training.steps 7"
    trainer = SlowData(tiny_setup(arguments), world)
    trainer.run()
    return read_metrics(trainer.run_folder / "metrics.jsonl"), said


def test_a_slow_rank_is_named_once(ranks: Ranks, tmp_path: Any) -> None:
    rows, said = ranks.run(2, train_with_a_slow_rank, str(tmp_path))[0]
    for row in rows:
        assert row["slowest_rank"] == 1 and 0.1 < row["longest_wait_s"] < row["step_s"] + 0.2
        assert 0 < row["forward_backward_s"] < row["step_s"] and 0 < row["optimizer_s"] < row["step_s"]
        assert row["max_memory_bytes"] > 0 and "hfu" not in row and "max_active_memory_bytes" not in row
    (line,) = [line for line in said if "slowest" in line]
    assert line.startswith(f"warning: rank 1 on {socket.gethostname()} is the slowest: others waited up to 0.")


def of_stage(world: Any, wait_s: float, pp_rank: int = 0) -> tuple[Slowest, Any]:
    mesh: Any = types.SimpleNamespace(pp_rank=pp_rank)
    phases: Any = types.SimpleNamespace(seconds=lambda: {"count labels": wait_s, "forward-backward": 2.0})
    return Slowest(world, mesh, torch.device("cpu")), phases


def reduce_of(waits: tuple[float, ...], stages: tuple[int, ...]) -> dict[str, Any]:
    world, _ = quiet_world()
    slowest, phases = of_stage(world, waits[world.rank], stages[world.rank])
    return slowest.reduce(phases)


def test_the_rank_that_waits_least_is_the_slowest_of_the_first_stage(ranks: Ranks) -> None:
    for row in ranks.run(3, reduce_of, (0.5, 0.25, 0.0), (0, 0, 1)):
        assert (row["slowest_rank"], row["longest_wait_s"], row["forward_backward_s"]) == (1, 0.5, 2.0)
    (row,) = ranks.run(1, reduce_of, (0.5,), (0,))
    assert "slowest_rank" not in row and "longest_wait_s" not in row


def test_short_waits_and_changing_ranks_are_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Collecting()
    monkeypatch.setattr(slowest_module.log, "handlers", [said])
    store = types.SimpleNamespace(set=lambda key, host: None, get=lambda key: b"h", check=lambda keys: True)
    slowest, _ = of_stage(types.SimpleNamespace(rank=0, size=4, store=store), 0.0)
    for rank, wait_s in [*4 * [(1, 0.5)], (2, 0.5), *4 * [(1, 0.5)], (1, 0.05), *4 * [(1, 0.5)]]:
        slowest.warn({"slowest_rank": rank, "longest_wait_s": wait_s}, 1.0)
    for _ in range(9):
        slowest.warn({"slowest_rank": 1, "longest_wait_s": 0.05}, 0.1)
    assert said.lines == []
    for _ in range(9):
        slowest.warn({"slowest_rank": 1, "longest_wait_s": 0.5}, 1.0)
    assert len(said.lines) == 1 and "rank 1 on h" in said.lines[0]


def test_on_a_gpu_the_times_are_of_events_that_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)
            self.recorded = 0

        def record(self) -> None:
            self.recorded += 1

        def elapsed_time(self, end: "Event") -> float:
            return 250.0

    monkeypatch.setattr(phases_module.torch.cuda, "Event", Event)
    phases = Phases(torch.device("cuda"))
    for _ in range(3):
        with phases("optimizer"):
            pass
    assert phases.seconds() == {"optimizer": 0.25} and [event.recorded for event in made] == [3, 3]
