"""Ranks that die, hang or go astray: all end soon, and the cause is what is printed last and what torchrun names."""

import re
from pathlib import Path

from frontdoor import Run, torchrun

TWO_RANKS = ("--training.local_batch_size", "4", "--training.steps", "1000")


def failing(folder: Path, order: str, *arguments: str) -> Run:
    data = ("--training.dataset", "failing", "--training.dataset_path", order)
    run = torchrun(folder, 2, *TWO_RANKS, *data, *arguments)
    assert run.code != 0
    return run


def root_cause(run: Run) -> str:
    """The part of torchrun's summary that names the first failure."""
    assert "Root Cause (first observed failure):" in run.agent, run.everything()
    return run.agent.split("Root Cause (first observed failure):")[1]


def steps(run: Run) -> list[int]:
    return [row["step"] for row in run.rows()]


def test_rank_that_raises(tmp_path: Path) -> None:
    run = failing(tmp_path, "raise 1 3")
    assert steps(run) == [1, 2]
    assert run.err[1].splitlines()[-1] == "error on rank 1: ArithmeticError: the disk is on fire"
    assert run.err[1].count("Traceback") == 1
    assert run.err[0] == "", run.everything()  # lost contact, which is no cause
    assert "rank      : 1 (local_rank: 1)" in root_cause(run)
    assert "ArithmeticError: the disk is on fire" in root_cause(run)


def test_rank_that_is_killed(tmp_path: Path) -> None:
    """It cannot say anything; the other one does not take the blame for it."""
    run = failing(tmp_path, "kill 1 3")
    assert steps(run) == [1, 2]
    assert run.err == ["", ""], run.everything()
    assert "rank      : 1 (local_rank: 1)" in root_cause(run) and "SIGKILL" in root_cause(run)


def test_rank_that_hangs(tmp_path: Path) -> None:
    """It is waited for as long as comm.train_timeout_seconds says, far less than the time to start."""
    run = failing(tmp_path, "sleep 1 3", "--comm.train_timeout_seconds", "8")
    assert steps(run) == [1, 2]
    assert re.search(r"error on rank 0: .*(8000 ?ms|8 ?seconds|[Tt]imed out)", run.err[0]), run.everything()
    assert "rank      : 0 (local_rank: 0)" in root_cause(run)


def test_loss_that_is_not_a_number(tmp_path: Path) -> None:
    run = torchrun(tmp_path, 2, *TWO_RANKS, "--training.loss", "nan_on_rank_1")
    assert run.code != 0
    said = "".join(run.err)
    assert said.count("Traceback") == 1
    assert re.search(
        r"error on rank [01]: FloatingPointError: step 3: loss nan.*: the loss of rank 1 is not finite", said
    )
    assert "step 3: loss nan" in root_cause(run)
    assert steps(run) == [1, 2]
