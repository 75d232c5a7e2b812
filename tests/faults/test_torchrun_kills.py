"""Ranks of torchrun killed from outside: `--max-restarts` brings the run back, and it ends as the one left alone."""

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.append(str(Path(__file__).resolve().parents[1] / "frontdoor"))
from frontdoor import CONFIG, ROOT, Run, torchrun  # noqa: E402
from warm import Warm, ranks_of  # noqa: E402

from dtron.checkpoint.files import find_damage, read_manifest, steps_in  # noqa: E402
from dtron.checkpoint.storage import StoragePath  # noqa: E402
from dtron.observe.metrics import read_metrics  # noqa: E402
from dtron.ranks import failure  # noqa: E402
from dtron.ranks.world import World  # noqa: E402

BACK_S = 30  # from a kill to the next finished step
EPS = CONFIG.replace("lr = 3e-3", "lr = 1e-3\neps = 1e-4  # see tests/parity/single.py")
LAYOUTS = {  # ranks, arguments, steps that may be done again
    "dp2 async": (2, "--dp 2 --training.local_batch_size 4 --checkpoint.interval 10 --checkpoint.async_mode async", 20),
    "pp2": (2, "--pp 2 --training.local_batch_size 4 --checkpoint.interval 5", 5),
    "dp2 x tp2": (4, "--dp 2 --tp 2 --training.local_batch_size 4 --checkpoint.interval 5", 5),
}


@dataclass
class Kill:
    """`attempt`, `step`: of the last row before it; 0 where there was none."""

    unix_s: float
    what: str
    attempt: int = 0
    step: int = 0


class Killer:
    """Kills a random rank again and again: while it starts, while it saves, or within `longest_s` of the first step."""

    def __init__(self, folder: Path, ranks: int, whats: list[str], longest_s: float) -> None:
        self._folder, self._ranks, self._whats, self._longest_s = folder, ranks, whats, longest_s
        self._random = random.Random(0)
        self.kills: list[Kill] = []

    def __call__(self, agent: Warm) -> None:
        seen: set[int] = set()
        for what in self._whats:
            self._wait(lambda: len(set(ranks_of(agent.pid)) - seen) == self._ranks, agent)  # noqa: B023 - called at once
            ranks = set(ranks_of(agent.pid)) - seen
            seen |= ranks
            self._wait_for(what, agent)
            os.kill(self._random.choice(sorted(ranks)), signal.SIGKILL)
            now_s = time.time()
            last = max(self._rows(), key=lambda row: row["attempt"] * 10**6 + row["step"], default={})
            self.kills.append(Kill(now_s, what, last.get("attempt", 0), last.get("step", 0)))

    def _wait_for(self, what: str, agent: Warm) -> None:
        if what == "start":
            time.sleep(self._random.uniform(0, 4))
            return
        rows = len(self._rows())
        self._wait(lambda: len(self._rows()) > rows, agent)
        time.sleep(self._random.uniform(0, self._longest_s))
        if what == "save":  # not the first: there is to be something to go on from
            self._wait(
                lambda: any(steps_in(StoragePath.at(at)) for at in self._folder.glob("outputs/*/checkpoint")), agent
            )
            self._wait(lambda: any(self._folder.glob("outputs/*/checkpoint/*.partial-*")), agent, every_s=0.0005)
            time.sleep(self._random.uniform(0, 0.01))

    def _wait(self, until: Any, agent: Warm, every_s: float = 0.02) -> None:
        end = time.monotonic() + 100
        while not until():
            assert time.monotonic() < end and agent.poll() is None, f"in vain, after {self.kills}"
            time.sleep(every_s)

    def _rows(self) -> list[dict[str, Any]]:
        """Every row that is whole, of every attempt."""
        files = list(self._folder.glob("outputs/*/metrics.jsonl"))
        lines = files[0].read_bytes().splitlines(keepends=True) if files else []
        return [json.loads(line) for line in lines if line.endswith(b"}\n")]


def train(folder: Path, ranks: int, steps: int, arguments: str, restarts: int = 0, killer: Any = None) -> Run:
    program = ("--max-restarts", str(restarts), str(ROOT / "train.py"))
    every = f"--training.steps {steps} {arguments}".split()
    run = torchrun(folder, ranks, *every, config=EPS, program=program, meanwhile=killer)
    assert run.code == 0, run.everything()
    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """Rows of the run of so many steps that is left alone."""

    @functools.cache
    def rows(steps: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("alone")
        train(folder, 1, steps, "")
        return read_metrics(next(folder.glob("outputs/*/metrics.jsonl")))

    return rows


def check(killer: Killer, folder: Path, expected: list[Any], steps: int, bound: int) -> list[float]:
    """The run that ended is the one left alone, and came back soon every time: seconds to the next step."""
    (outputs,) = (folder / "outputs").iterdir()
    rows = read_metrics(outputs / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row, want in zip(rows, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(want[key], rel=1e-4), (row["step"], key)
    place = StoragePath.at(outputs / "checkpoint")
    assert place.names() == [f"step-{step}" for step in sorted(steps_in(place), key=str)], "nothing half written"
    assert steps_in(place)[-1] == steps
    for name in place.names():
        assert not find_damage(place / name, read_manifest(place / name).files.items())
    every = [row for row in killer._rows() if "loss" in row]
    back_s = []
    for kill in killer.kills:
        after = [row for row in every if row["attempt"] > kill.attempt]
        if kill.what != "start":
            back_s.append(after[0]["unix_s"] - kill.unix_s)
            done = max(row["step"] for row in every if row["attempt"] == kill.attempt)
            assert done + 1 - after[0]["step"] <= bound, kill
    assert max(back_s) < BACK_S
    return back_s


@pytest.mark.parametrize(
    ("steps", "layout", "whats"),
    [
        (100, "dp2 async", ["save"]),
        pytest.param(400, "dp2 async", ["save", "any", "start", "save", "any"], marks=pytest.mark.long),
        pytest.param(400, "pp2", ["any", "save", "save", "start", "any"], marks=pytest.mark.long),
        pytest.param(100, "dp2 x tp2", ["save", "any"], marks=pytest.mark.long),
    ],
)
def test_torchrun_brings_it_back(
    steps: int, layout: str, whats: list[str], alone: Callable[[int], list[Any]], tmp_path: Path, capsys: Any
) -> None:
    ranks, arguments, bound = LAYOUTS[layout]
    killer = Killer(tmp_path, ranks, whats, longest_s=steps / 300)
    train(tmp_path, ranks, steps, f"--checkpoint.enable {arguments}", len(whats), killer)
    assert [kill.what for kill in killer.kills] == whats
    back_s = check(killer, tmp_path, alone(steps), steps, bound)
    if len(whats) > 1:
        with capsys.disabled():
            print(f"\n{layout}: {killer.kills}\nfrom a kill to the next step, s: {[round(s, 1) for s in back_s]}")


def fail(told_to_stop: bool) -> None:
    """What a rank does that loses contact with the first to fail."""
    world = World(1, 1, 2, dist.HashStore())
    world.store.set("first_failure", "rank 0")
    world.stop.arm()
    if told_to_stop:
        os.kill(os.getpid(), signal.SIGTERM)
    failure.exit_with_traceback(1, world, RuntimeError("connection closed by peer"))


@pytest.mark.parametrize("told_to_stop", [True, False])
def test_a_rank_that_was_told_to_stop_does_not_wait_to_be_told_again(told_to_stop: bool) -> None:
    """Else every rank that waits for it in a collective goes on waiting, up to torchrun's shutdown timeout of 30 s."""
    process = mp.get_context("fork").Process(target=fail, args=(told_to_stop,), daemon=True)
    process.start()
    process.join(5.0 if told_to_stop else 0.5)
    assert process.exitcode == (1 if told_to_stop else None)
    process.terminate()
    process.join()
    assert process.exitcode == (1 if told_to_stop else -signal.SIGTERM), "one that waits ends as soon as it is told"
