"""A run that is killed at random moments, on changing layouts, ends as the run that was never killed."""

import collections
import statistics
from pathlib import Path
from typing import Any

import pytest
from kills import KEEP, Plan, Run, draw_plans, table
from moments import MOMENTS

RELATIVE = 1e-4


def difference(rows: list[dict[str, Any]], expected: list[dict[str, Any]], key: str) -> float:
    """The largest relative one, over all steps."""
    return max(abs(row[key] - want[key]) / abs(want[key]) for row, want in zip(rows, expected, strict=True))


def kill_and_compare(folder: Path, seed: int, kills: int, steps: int) -> Run:
    """Kill a run as often as planned, let it end, and hold its metrics against those of one that was left alone."""
    whole = Run(folder / "whole", steps)
    whole.attempt(Plan())
    run = Run(folder / "killed", steps)
    try:
        for plan in draw_plans(seed, kills):
            killed = run.attempt(plan)
            assert killed.killed_s is not None, f"the run came to its end after {killed.number - 1} kills"
        last = run.attempt(Plan("dp2", interval=50))
    finally:
        print(f"seed {seed}\n{table(run)}")
    assert last.killed_s is None
    assert (last.newest, len(last.finished), last.debris) == (steps, KEEP, [])
    rows, expected = run.rows(), whole.rows()
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for key in ("loss", "grad_norm"):
        assert difference(rows, expected, key) <= RELATIVE, key
    for key in ("lr", "tokens"):
        assert [row[key] for row in rows] == [row[key] for row in expected]
    print(summary(run, rows, expected))
    planned = [attempt.as_planned for attempt, _ in run.restarts()]
    assert sum(planned) >= 0.9 * kills, "the moments come as they are drawn"
    assert max(seconds for _, seconds in run.restarts() if seconds) < 30
    return run


def summary(run: Run, rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> str:
    restarts = sorted(seconds for _, seconds in run.restarts() if seconds)
    killed = [attempt for attempt, _ in run.restarts()]
    lost = [attempt.reached - attempt.newest for attempt in killed if attempt.reached]
    phases = collections.Counter(attempt.plan.phase for attempt in killed if attempt.as_planned)
    return (
        f"{len(killed)} kills, {sum(a.inside_a_save for a in killed)} inside a save, "
        f"{sum(bool(a.debris) for a in killed)} left something half written or half deleted\n"
        f"as planned: {dict(phases)}, missed {sum(not a.as_planned for a in killed)}\n"
        f"largest relative difference: loss {difference(rows, expected, 'loss'):.1e}, "
        f"gradient norm {difference(rows, expected, 'grad_norm'):.1e}; "
        f"loss {expected[0]['loss']:.3f} -> {expected[-1]['loss']:.3f}\n"
        f"from a kill to the next step: median {statistics.median(restarts):.2f} s, longest {restarts[-1]:.2f} s\n"
        f"steps done again: mean {statistics.mean(lost):.1f}, most {max(lost)}"
    )


def test_a_few_kills(tmp_path: Path) -> None:
    run = kill_and_compare(tmp_path, seed=1012, kills=10, steps=60)
    assert sum(attempt.inside_a_save for attempt in run.attempts) >= 4


def test_kills_before_the_first_checkpoint(tmp_path: Path) -> None:
    """However often the start is killed, and wherever: the run begins in the one folder."""
    run = Run(tmp_path, 4)
    for moment in MOMENTS["start"]:
        if moment.name != "after read_data":  # there is nothing to read
            killed = run.attempt(Plan("dp2", phase="start", moment=moment, victims=(0,)))
            assert killed.as_planned and not killed.reached, moment.name
    last = run.attempt(Plan("dp2", interval=50))
    assert last.killed_s is None and last.finished == [4] and [row["step"] for row in run.rows()] == [1, 2, 3, 4]


@pytest.mark.long
def test_ninety_kills(tmp_path: Path, capsys: Any) -> None:
    run = kill_and_compare(tmp_path, seed=2, kills=90, steps=300)
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
    assert sum(attempt.inside_a_save for attempt in run.attempts) >= 30
