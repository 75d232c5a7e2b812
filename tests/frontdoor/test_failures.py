"""Ranks that die, hang or go astray: all end soon, and the cause is what is printed last and what torchrun names."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from frontdoor import Run, environment, torchrun
from warm import Warm, ranks_of

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


def hang_report(run: Run, cause: str, folder: str = "comm_traces", prefix: str = "rank_") -> str:
    """What rank 0 said of a hang: alone, once, in time, with the files it names beside it."""
    assert run.code != 0
    said = run.err[0]
    assert run.err[1] == "" and said.count("error: the run hangs after step") == 1, run.everything()
    assert "Traceback" not in said and "Traceback" not in root_cause(run), run.everything()
    assert 4 < float(re.search(rf"rank 0 has waited ([\d.]+) s for {cause}; comm", said)[1]) < 8  # type: ignore[index]
    assert "rank      : 0 (local_rank: 0)" in root_cause(run) and "HangError: the run hangs" in root_cause(run)
    (traces,) = run.folder.glob(f"outputs/*/{folder}")
    assert pickle.loads((traces / f"{prefix}0").read_bytes())["entries"]
    assert "MainThread:" in (traces / "stack_0.txt").read_text()
    return said


@pytest.mark.parametrize("first_step", [False, pytest.param(True, marks=pytest.mark.long)])
def test_rank_that_hangs(tmp_path: Path, first_step: bool) -> None:
    """It is waited for as long as comm.train_timeout_seconds says, in the first step as comm.init_timeout_seconds."""
    key, other = ("init", "train") if first_step else ("train", "init")
    limits = (f"--comm.{key}_timeout_seconds", "8", f"--comm.{other}_timeout_seconds", "300")
    run = failing(tmp_path, f"sleep 1 {1 if first_step else 3}", *limits)
    assert steps(run) == ([] if first_step else [1, 2])
    said = hang_report(run, "rank 1")
    assert f"comm.{key}_timeout_seconds is 8" in said
    assert re.search(r'rank 1.* is in no collective.*frontdoor_parts.py".*time.sleep\(1000\)\nrank 0', said, re.DOTALL)
    assert re.search(r"rank 0 waits in all_reduce of a scalar, collective \d+ of all ranks\n", said)
    (folder,) = tmp_path.glob("outputs/*/comm_traces")
    assert "time.sleep(1000)" in (folder / "stack_1.txt").read_text()
    analyzer = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", "--prefix", "rank_", str(folder)]
    seen = subprocess.run(analyzer, env=environment(), capture_output=True, text=True)
    assert seen.returncode == 0, seen.stderr
    assert "all_reduce" in seen.stdout + seen.stderr


def test_rank_that_hangs_in_a_pipeline(tmp_path: Path) -> None:
    """gloo's point-to-point keeps torch's 30 minutes, and its recorder does not hold it."""
    arguments = ("--pp", "2", "--parallelism.pipeline_parallel_microbatch_size", "2", "--training.steps", "1000")
    files = ("--comm.trace_buf_size", "20", "--comm.save_traces_folder", "a/b", "--comm.save_traces_file_prefix", "r")
    limit = ("--comm.train_timeout_seconds", "8")
    run = torchrun(tmp_path, 2, *arguments, *files, "--training.loss", "stuck_on_rank_1", *limit)
    said = hang_report(run, "rank 1", "a/b", "r")
    (dump,) = tmp_path.glob("outputs/*/a/b/r1")
    assert len(pickle.loads(dump.read_bytes())["entries"]) == 20
    assert re.search(r'rank 1.* is in no collective.*frontdoor_parts.py".*time.sleep\(1000\)\nrank 0', said, re.DOTALL)
    assert re.search(r"rank 0 waits in a point-to-point message \(_wait_batch_p2p, line \d+ of schedules.py\)", said)
    assert len(steps(run)) >= 2


@pytest.mark.long
def test_rank_that_is_stopped(tmp_path: Path) -> None:
    def stop(torchrun_process: Warm) -> None:
        wait_for(tmp_path, "outputs/*/metrics.jsonl", torchrun_process)
        pid = ranks_of(torchrun_process.pid)[1]
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        wait_for(tmp_path, "logs/*/attempt_0/0/stderr.log", torchrun_process)
        assert time.monotonic() - began < 12
        os.kill(pid, signal.SIGKILL)  # torchrun would, half a minute later

    arguments = (*TWO_RANKS[:2], "--training.steps", "1000000", "--comm.train_timeout_seconds", "8")
    run = torchrun(tmp_path, 2, *arguments, meanwhile=stop)
    said = hang_report(run, "rank 1")
    assert "rank 1 did not answer within" in said
    assert re.search(r"rank 0 waits in \w+ of .*collective \d+ of all ranks", said)


@pytest.mark.long
def test_ranks_that_wait_for_nobody(tmp_path: Path) -> None:
    """However long all ranks sleep or compute, that is no hang."""
    data = ("--training.dataset", "failing", "--training.dataset_path", "rest all 3")
    limit = ("--comm.train_timeout_seconds", "4", "--training.steps", "5")
    run = torchrun(tmp_path, 2, *TWO_RANKS[:2], *data, *limit)
    assert (run.code, run.err) == (0, ["", ""]), run.everything()
    assert sum(row.get("data_s", 0) for row in run.rows()) > 11.5
    assert not list(tmp_path.glob("outputs/*/comm_traces"))


def wait_for(folder: Path, pattern: str, torchrun_process: Warm) -> None:
    """Until a file has something in it."""
    end = time.monotonic() + 150
    while not any(path.stat().st_size for path in folder.glob(pattern)):
        assert time.monotonic() < end and torchrun_process.poll() is None
        time.sleep(0.1)


@pytest.mark.long
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
