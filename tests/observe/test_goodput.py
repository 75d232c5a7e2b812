"""The ledger of a run's wall time: whatever happens to a run, every second is in one part, and in the right one."""

import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dtron.observe.goodput import PARTS, Ledger, process_start_s

ROOT = Path(__file__).resolve().parents[2]
START = 1.8e9  # unix time


def spent(row: dict[str, float]) -> dict[str, float]:
    """The parts that are not 0."""
    return {part: row[f"spent_s/{part}"] for part in PARTS if abs(row[f"spent_s/{part}"]) > 1e-6}


def test_one_attempt() -> None:
    ledger = Ledger(START)
    assert ledger.row(START) == {"goodput": 0.0, **{f"spent_s/{part}": 0.0 for part in PARTS}, "unix_s": START}
    for part, seconds in {"startup": 10, "steps": 80, "data": 4, "checkpoint": 2, "validation": 3}.items():
        ledger.add(part, seconds / 2)
        ledger.add(part, seconds / 2)
    row = ledger.row(START + 100)
    assert spent(row) == {"steps": 80, "data": 4, "startup": 10, "checkpoint": 2, "validation": 3, "other": 1}
    assert row["goodput"] == 0.8 and row["unix_s"] == START + 100
    assert list(row) == ["goodput", *(f"spent_s/{part}" for part in PARTS), "unix_s"]


@pytest.mark.parametrize("part", ["other", "replayed", "down", "step"])
def test_only_what_an_attempt_measures_can_be_added(part: str) -> None:
    with pytest.raises(ValueError, match=f"'{part}' is not one of steps, data"):
        Ledger(START).add(part, 1.0)


def first_attempt() -> tuple[dict[str, float], dict[str, float]]:
    """Saved after 30 s, last row after 60 s."""
    ledger = Ledger(START)
    ledger.add("startup", 5)
    ledger.add("steps", 20)
    ledger.add("data", 3)
    saved = ledger.row(START + 30)  # 2 s are in no part
    ledger.add("checkpoint", 1)
    ledger.add("steps", 15)
    ledger.add("data", 4)
    ledger.add("validation", 7)
    return saved, ledger.row(START + 60)  # 3 s more


def test_a_resume_moves_what_is_done_again_to_replayed() -> None:
    saved, last = first_attempt()
    row = Ledger(START + 100, saved, last).row(START + 100)
    assert spent(row) == {
        "steps": 20, "data": 3, "startup": 5, "checkpoint": 1, "replayed": 26, "down": 40, "other": 5,
    }  # fmt: skip
    assert row["goodput"] == 0.2


def test_a_restart_without_a_checkpoint_replays_all() -> None:
    row = Ledger(START + 100, None, first_attempt()[1]).row(START + 110)
    assert spent(row) == {"startup": 5, "checkpoint": 1, "replayed": 49, "down": 40, "other": 15}
    assert row["goodput"] == 0.0


@pytest.mark.parametrize("row_after_s", [None, 0, 30])
def test_a_checkpoint_newer_than_the_last_row_is_the_last_sign(row_after_s: int | None) -> None:
    saved, _ = first_attempt()
    last = None if row_after_s is None else {**first_attempt()[1], "unix_s": START + row_after_s}
    row = Ledger(START + 100, saved, last).row(START + 100)
    assert spent(row) == {"steps": 20, "data": 3, "startup": 5, "down": 70, "other": 2}


@pytest.mark.parametrize("nothing", [None, {}, {"step": 3, "loss": 2.0}])
def test_what_was_written_before_ledgers_were_kept_begins_a_new_one(nothing: dict[str, Any] | None) -> None:
    assert spent(Ledger(START, nothing, nothing).row(START + 1)) == {"other": 1}


def test_a_clock_that_lags_behind_the_last_attempts_takes_nothing_away() -> None:
    saved, last = first_attempt()
    row = Ledger(START + 50, saved, last).row(START + 70)
    assert spent(row)["replayed"] == 26 and "down" not in spent(row)
    assert sum(spent(row).values()) == pytest.approx(60 + 20)


# --- any history


@dataclass
class Attempt:
    """What really happened: stretches of time, each of one part, and the signs of life that were left."""

    began: float
    resumed: "tuple[Attempt, float] | None"  # the attempt and the time of the checkpoint
    stretches: list[tuple[str, float, float]] = field(default_factory=list)  # part, from, to


def account(attempts: list[Attempt], signs: list[float], now: float) -> dict[str, float]:
    """Where the time went, stretch by stretch from what happened and not from any ledger.

    signs: for each attempt but the first, the last sign of life that it found.
    """
    until = {id(attempts[-1]): now}  # attempts of the surviving line, and when the line left them
    line = attempts[-1]
    while line.resumed is not None:
        line, left = line.resumed
        until[id(line)] = left
    gaps = [(sign, attempt.began) for sign, attempt in zip(signs, attempts[1:], strict=True)]
    lived = [(id(attempt), *stretch) for attempt in attempts for stretch in attempt.stretches]
    moments = sorted({t for gap in gaps for t in gap} | {t for stretch in lived for t in stretch[2:]})
    total = dict.fromkeys(PARTS, 0.0)
    for start, end in pairwise(moments):
        if any(sign <= start and end <= began for sign, began in gaps):
            total["down"] += end - start
            continue
        ((attempt, part),) = {(attempt, part) for attempt, part, a, b in lived if a <= start and end <= b}
        lost = part in ("steps", "data", "validation") and end > until.get(attempt, 0.0)
        total["replayed" if lost else part] += end - start
    return total


def live(rng: random.Random, attempt: Attempt, ledger: Ledger, events: list[tuple[Any, ...]]) -> float:
    """One attempt until it dies, at any moment; returns when. Rows and saves are appended to `events`."""
    now = attempt.began
    for i in range(rng.randrange(40)):
        part = "startup" if i == 0 else rng.choice(["steps", "steps", "data", "validation", "checkpoint", "other"])
        took = rng.uniform(0.1, 10)
        attempt.stretches.append((part, now, now + took))
        now += took
        if part != "other":
            ledger.add(part, took)
        if i and rng.random() < 0.2:
            events.append(("row", now, ledger.row(now)))
        if i and rng.random() < 0.15:
            events.append(("save", now, ledger.row(now), attempt))
    return now


@pytest.mark.parametrize("seed", range(200))
def test_every_second_of_any_history_is_in_its_part(seed: int) -> None:
    rng = random.Random(seed)
    attempts: list[Attempt] = []
    signs: list[float] = []
    events: list[tuple[Any, ...]] = []
    now = START
    for _ in range(rng.randint(1, 7)):
        # Most resume from the newest checkpoint; some have lost it for good and resume from the one before.
        saves = [event for event in events if event[0] == "save"]
        if saves and rng.random() < 0.2:
            events.remove(saves.pop())
        saved = saves[-1] if saves else None
        last = next((event for event in reversed(events) if event[0] == "row"), None)
        if left := [event[1] for event in (saved, last) if event]:
            signs.append(max(left))
        else:  # nothing is left of those before: the run begins anew
            attempts, signs = [], []
        now += rng.uniform(0, 30)
        attempts.append(Attempt(now, (saved[3], saved[1]) if saved else None))
        ledger = Ledger(now, saved and saved[2], last and last[2])
        now = live(rng, attempts[-1], ledger, events)
    row, wall = ledger.row(now), now - attempts[0].began
    wanted = account(attempts, signs, now)
    assert {part: row[f"spent_s/{part}"] for part in PARTS} == pytest.approx(wanted, abs=1e-4)
    assert sum(row[f"spent_s/{part}"] for part in PARTS) == pytest.approx(wall, abs=1e-4)
    assert row["goodput"] == pytest.approx(wanted["steps"] / wall if wall else 0.0, abs=1e-6)


def test_the_start_of_a_process_is_before_its_imports() -> None:
    child = "import time; time.sleep(0.3); from dtron.observe.goodput import *; print(process_start_s())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True, check=True)
    assert before - 0.05 <= float(done.stdout) <= before + 0.25, "ticks of 10 ms; well before the sleep's end"


def test_without_proc_the_start_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert process_start_s() == pytest.approx(time.time(), abs=1.0)


def test_a_clock_that_was_ahead_makes_no_checkpoint_newer_than_the_rows_after_it() -> None:
    """Attempt 1, two days ahead, saves; attempt 2 resumes from there by the right clock and is killed."""
    ahead = 2 * 86400
    saved = {**first_attempt()[0], "attempt": 1}
    saved["unix_s"] += ahead
    second = Ledger(START + 100, saved)
    second.add("steps", 50)
    last = {**second.row(START + 150), "attempt": 2}
    third = spent(Ledger(START + 160, saved, last).row(START + 160))
    assert third["replayed"] == 50 and third["down"] == 10 and third["steps"] == 20
    without = spent(Ledger(START + 160, saved, {**last, "attempt": 1}).row(START + 160))
    assert "replayed" not in without, "within an attempt the clock decides"
