"""The files by which a run is followed and stopped."""

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from tinyrun import quiet_world, tiny_setup

from dtron.errors import UserError
from dtron.ranks import control
from dtron.ranks.control import Control, kind_of
from dtron.ranks.failure import LostContactError
from dtron.ranks.watchdog import HangError
from dtron.ranks.world import AbsentRanksError
from dtron.train import launch, trainer
from dtron.train.folder import InUseError
from dtron.train.trainer import Trainer


@pytest.fixture
def begun(tmp_path: Path) -> Control:
    made = Control(0)
    made.start_run(tmp_path, "checkpoints")
    return made


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_a_beat_says_where_the_run_is_and_when_the_next_comes(begun: Control, tmp_path: Path) -> None:
    begun.heartbeat("training", 90.0, 7)
    beat = read(tmp_path, "HEARTBEAT")
    assert (beat["phase"], beat["step"], beat["deadline_s"]) == ("training", 7, 90.0)
    assert beat["run_folder"] == str(tmp_path) and beat["checkpoints"] == "checkpoints"
    begun.heartbeat("training", 90.0, 8)
    assert read(tmp_path, "HEARTBEAT") == beat, "at most one a second"
    begun.heartbeat("saving", 100.0, 8)
    saving = read(tmp_path, "HEARTBEAT")
    assert saving["phase"] == "saving", "another phase is told at once"
    assert (saving["step"], saving["began_at"]) == (8, 7)


def test_stop_is_seen_and_goes_when_the_run_has_saved(
    begun: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "EVERY_S", 0.0)
    assert not begun.stop_requested()
    (tmp_path / "STOP").touch()
    assert begun.stop_requested()
    begun.saved(12, "somewhere/step-12", "a signal")
    assert read(tmp_path, "SAVED")["checkpoint"] == "somewhere/step-12" and not (tmp_path / "STOP").exists()


def test_a_stop_in_the_run_folder_counts_too(tmp_path: Path) -> None:
    """Where somebody who does not know of the control folder makes it."""
    followed = Control(0, str(tmp_path / "control"))
    followed.start_run(tmp_path, "")
    (tmp_path / "STOP").touch()
    assert followed.stop_requested()
    followed.saved(1, "step-1", "the file STOP")
    assert not (tmp_path / "STOP").exists()


def test_a_new_attempt_forgets_what_the_last_one_left_but_not_a_stop(tmp_path: Path) -> None:
    for name in ("SAVED", "DONE", "FAILED", "STOP"):
        (tmp_path / name).touch()
    Control(1, str(tmp_path)).start_run(tmp_path, "")
    assert len([*tmp_path.iterdir()]) == 4, "rank 0 alone cleans"
    Control(0, str(tmp_path)).start_run(tmp_path / "run", "")
    assert [path.name for path in tmp_path.iterdir()] == ["STOP"]


def test_the_first_failure_stays(tmp_path: Path) -> None:
    first, second = (Control(rank, str(tmp_path / "made")) for rank in (3, 0))
    first.failed(UserError("cause"))
    second.failed(UserError("consequence"))
    failed = read(tmp_path / "made", "FAILED")
    assert (failed["kind"], failed["message"], failed["rank"]) == ("mistake", "cause", 3)


def test_other_ranks_and_a_world_made_by_hand_write_nothing(tmp_path: Path) -> None:
    for quiet in (Control(1), Control()):
        quiet.start_run(tmp_path / "run", "")
        quiet.heartbeat("training", 1.0)
        quiet.done(3)
        assert not quiet.stop_requested()
    Control().failed(UserError("mistake"))
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_cannot_be_written_is_told_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    broken = Control(0, str(tmp_path / "file" / "folder"))
    broken.start_run(tmp_path, "")
    broken.heartbeat("training", 1.0)
    assert "the run continues" in capsys.readouterr().out


def promises(folder: str) -> list[tuple[float, float]]:
    """The job of one rank: when each step of a training with slow steps began, and what was promised then."""
    told: list[tuple[float, float]] = []

    class Slow(Trainer):
        def next_batch(self) -> Any:
            time.sleep(0.3 if told[1:] else 4)  # the first step compiles
            return super().next_batch()

    class Noting(Control):
        def heartbeat(self, phase: str, deadline_s: float, step: int = 0) -> None:
            if phase == "training":
                told.append((time.monotonic(), deadline_s))

    trainer.MARGIN_S = 0.0  # in this forked rank
    world, _ = quiet_world()
    limits = "--comm.train_timeout_seconds 1 --comm.init_timeout_seconds 60"
    setup = tiny_setup(f"--training.steps 4 {limits} --job.dump_folder {folder}")
    Slow(setup, dataclasses.replace(world, control=Noting(0))).run()
    return told


def test_steps_that_take_longer_than_ranks_may_wait_are_no_hang(ranks: Ranks, tmp_path: Path) -> None:
    (told,) = ranks.run(1, promises, str(tmp_path))
    assert len(told) == 4 and told[0][1] >= 3600, "the first step compiles"
    for (began, deadline_s), (next_began, _) in itertools.pairwise(told):
        assert deadline_s > 5 * (next_began - began)
    assert max(deadline_s for _, deadline_s in told[1:]) < 600, "but it is noticed in the end"
    took = [after - before for (before, _), (after, _) in itertools.pairwise(told)]
    for i in (2, 3):
        assert told[i][1] <= max(1.0, 10 * max(took[1:i])), "what the first step took is forgotten"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("x"), "mistake"),
        (FloatingPointError("step 3: loss nan"), "nonfinite"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), "oom"),
        (HangError("the run hangs"), "hang"),
        (LostContactError("rank 3 lost contact: Timed out"), "lost"),
        (InUseError("outputs/x is in use"), "busy"),
        (AbsentRanksError("3 of 4 ranks have not come"), "lost"),
        (RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv"), "hang"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:1"), "lost"),
        (ValueError("anything"), "error"),
    ],
)
def test_kinds_of_failures(error: BaseException, kind: str) -> None:
    assert kind_of(error) == kind


def test_a_stop_that_comes_too_late_does_not_stop_the_next_attempt(tmp_path: Path) -> None:
    """Made during the last step, or after the end: a continuation with more steps is not to end after its first one."""
    made = Control(0, str(tmp_path))
    made.start_run(tmp_path / "run")
    (tmp_path / "STOP").touch()
    made.done(7)
    assert not (tmp_path / "STOP").exists() and (tmp_path / "DONE").exists()


def test_an_attempt_that_fails_before_it_starts_says_why_in_its_own_words(tmp_path: Path) -> None:
    """Not in those of the attempt before it, whose FAILED is still there."""
    before = Control(0, str(tmp_path))
    before.start_run(tmp_path / "run")
    before.failed(HangError("rank 1 hangs"))
    Control(0, str(tmp_path)).failed(UserError("tp 3 does not divide 4 heads"))
    assert read(tmp_path, "FAILED")["message"] == "tp 3 does not divide 4 heads"
    Control(1, str(tmp_path))  # another rank of the same attempt, perhaps a later one, removes nothing
    assert (tmp_path / "FAILED").exists()


@pytest.mark.parametrize(
    "words",
    [["--job.control_folder", "there"], ["--job.control-folder=there"], ["--tp", "x", "--job.control_folder=there"]],
)
def test_the_control_folder_is_known_before_the_configuration(words: list[str]) -> None:
    assert launch._control_folder(words) == "there"
    assert launch._control_folder([*words, "--tp", "2"]) == "there"
    assert launch._control_folder(["--tp", "2"]) is None
    assert launch._control_folder(["--job.control_folder"]) is None
