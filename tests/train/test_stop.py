"""A stop is looked at in every long phase: validation, a save, an export, and all that comes before the first step."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from ranks import RankError, Ranks
from tinyrun import Counting, quiet_world, tiny_setup, train_tiny

from dtron import registry
from dtron.checkpoint.save import Saver
from dtron.data.loader import IGNORE_INDEX
from dtron.observe.metrics import read_metrics
from dtron.ranks.control import SIGNALS, Control, StopBeforeStartError, StopError, StopRequest
from dtron.ranks.failure import exit_on_signals
from dtron.ranks.logs import setup_logging
from dtron.train import saving
from dtron.train.trainer import Trainer

RARELY = "--metrics.log_freq 100 --checkpoint.interval 100"


def trainer_of(folder: str, arguments: str, control: Control | None = None) -> tuple[Trainer, list[str]]:
    world, said = quiet_world()
    if control:
        world = dataclasses.replace(world, control=control)
    return Trainer(tiny_setup(f"--checkpoint.enable --job.dump_folder {folder} {arguments}"), world), said


def stopped_in_validation(folder: str, async_mode: str) -> tuple[int, list[str], list[str], dict[str, Any]]:
    """The job of one rank: rank 1 is signalled while the validation of step 3 runs; what became of the run."""
    begun: list[Trainer] = []

    class Signalling(Counting):
        def __getitem__(self, i: int) -> Any:
            if begun and begun[0].progress.step >= 3 and dist.get_rank() == 1:
                begun[0].world.stop.signal_name = "SIGTERM"
            return super().__getitem__(i)

    registry.register("dataset", f"signalling_{async_mode}", lambda *_: Signalling())
    validation = f"--validation.enable --validation.dataset signalling_{async_mode} --validation.freq 3"
    trainer, said = trainer_of(folder, f"{RARELY} --training.steps 9 {validation} --checkpoint.async_mode {async_mode}")
    begun.append(trainer)
    trainer.run()
    dist.barrier()
    checkpoints = sorted(path.name for path in trainer.start.checkpoints.local.iterdir())  # type: ignore[union-attr]
    return trainer.progress.step, checkpoints, said, read_metrics(trainer.run_folder / "metrics.jsonl")[-1]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_stop_during_a_validation_saves_that_step(ranks: Ranks, tmp_path: Path, mode: str) -> None:
    (step, checkpoints, said, row), (other, *_) = ranks.run(2, stopped_in_validation, str(tmp_path), mode)
    assert step == other == 3 and checkpoints == ["step-3"]
    assert "step 3: no validation, because a stop was requested" in said
    assert "stopped by a signal after step 3, which is saved" in said
    assert row["step"] == 3 and row["loss"] > 0, "the last step has a row, whatever metrics.log_freq is"
    (summary,) = [line for line in said if "resume with" in line]
    assert f"loss          {row['loss']:.4f}\n" in summary and "not finite" not in summary


def stopped_in_save(folder: str) -> tuple[int, list[str]]:
    original = Saver.save

    def save(self: Saver, *arguments: Any) -> Any:
        if dist.get_rank() == 1:
            trainer.world.stop.signal_name = "SIGTERM"
        return original(self, *arguments)

    Saver.save = save  # type: ignore[method-assign]
    try:
        trainer, said = trainer_of(folder, "--training.steps 9 --checkpoint.interval 2")
        trainer.run()
    finally:
        Saver.save = original  # type: ignore[method-assign]
    return trainer.progress.step, [line for line in said if "saved" in line]


def test_a_stop_during_a_save_needs_no_other(ranks: Ranks, tmp_path: Path) -> None:
    for step, said in ranks.run(2, stopped_in_save, str(tmp_path)):
        assert step == 2 and (not said or len([line for line in said if "step 2: saved" in line]) == 1)
    assert [path.name for path in tmp_path.glob("*/checkpoint/*")] == ["step-2"]


def failing_validation(folder: str) -> None:
    class Failing(Counting):
        def __getitem__(self, i: int) -> Any:
            if i:  # 0 is looked at before the first step
                raise ArithmeticError("no such row")
            return super().__getitem__(i)

    class Unlabelled(Counting):
        def __getitem__(self, i: int) -> Any:
            inputs, labels = super().__getitem__(i)
            return inputs, np.full_like(labels, IGNORE_INDEX)

    registry.register("dataset", "failing_rows", lambda *_: Failing())
    registry.register("dataset", "unlabelled_rows", lambda *_: Unlabelled())
    with pytest.raises(ArithmeticError):
        train_tiny(folder, 6, "--checkpoint.interval 2 --validation.enable --validation.freq 2 "
                   "--validation.dataset failing_rows")  # fmt: skip
    dist.barrier()
    train_tiny(f"{folder}/other", 6, "--validation.enable --validation.dataset unlabelled_rows --validation.steps 2")


def test_a_validation_that_fails_costs_no_step_and_one_without_labels_is_refused_at_the_start(
    ranks: Ranks, tmp_path: Path
) -> None:
    with pytest.raises(RankError, match="unlabelled_rows has no label to predict in the 32 sequences that are"):
        ranks.run(2, failing_validation, str(tmp_path))
    assert [path.name for path in tmp_path.glob("*/checkpoint/*")] == ["step-2"]
    assert not list(tmp_path.glob("other/**/metrics.jsonl"))


# --- before the first step


def stop_found(folder: str, when: str) -> dict[str, Any]:
    """STOP is made before the start, while rank 0 prepares the data, or while the checkpoint is loaded."""
    control = Control(dist.get_rank(), f"{folder}/control")
    stop = Path(folder, "control", "STOP")

    def counting(config: Any, section: Any, split: str, seq_len: int, vocab_size: int, log: Any) -> Counting:
        if when == "preparing" and dist.get_rank() == 0:
            stop.touch()
            time.sleep(1.1)  # the folder is looked at once a second
            log("half of it is tokenized")
            raise AssertionError("it went on")
        return Counting()

    registry.register("dataset", f"slow_{when}", counting)
    if when == "before" and dist.get_rank() == 0:
        stop.parent.mkdir()
        stop.touch()
    dist.barrier()
    with pytest.raises(StopBeforeStartError, match="stopped by the file STOP before the first step"):
        trainer, _ = trainer_of(folder, f"--training.steps 3 --training.dataset slow_{when}", control)
        if dist.get_rank() == 0:
            stop.touch()
            time.sleep(1.1)
        trainer.run()
    dist.barrier()
    assert not stop.exists()
    return json.loads(stop.with_name("SAVED").read_text())


@pytest.mark.parametrize("when", ["before", "preparing", "loading"])
def test_the_file_stop_ends_a_run_before_its_first_step(ranks: Ranks, tmp_path: Path, when: str) -> None:
    saved = ranks.run(2, stop_found, str(tmp_path), when)[0]
    assert (saved["step"], saved["by"]) == (0, "the file STOP")
    assert not list(tmp_path.glob("llama*/checkpoint/*"))


def _busy(pid: Any, child: bool) -> None:
    """A process whose main thread, or a child's, runs no Python for minutes, as in a tokenizer."""
    setup_logging(0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # nohup, or a shell's background, leaves some ignored
    exit_on_signals(0, hint=": there was nothing to save")
    if child and (forked := os.fork()):
        pid.value = forked
        _, status = os.waitpid(forked, 0)
        os._exit(os.waitstatus_to_exitcode(status) + 100)
    pid.value = pid.value or os.getpid()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("child", [False, True])
def test_a_signal_ends_a_process_that_runs_no_python(name: str, child: bool, capfd: pytest.CaptureFixture[str]) -> None:
    context: Any = multiprocessing.get_context("fork")
    pid = context.Value("i", 0)
    process = context.Process(target=_busy, args=(pid, child))
    process.start()
    while not pid.value:
        time.sleep(0.01)
    time.sleep(0.1)
    number = getattr(signal, name)
    os.kill(pid.value, number)
    process.join(10)
    process.kill()
    said = capfd.readouterr().err
    if child:  # which has the defaults: it dies of the signal, without a word
        assert process.exitcode == 100 - number and said == ""
    else:
        assert process.exitcode == 128 + number and f"error: stopped by {name}: there was nothing to save" in said


# --- an export


def test_a_request_is_an_error_at_once_within_raising() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopRequest()
    try:
        stop.arm()
        with pytest.raises(StopError, match="stopped by SIGTERM"), stop.raising():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        with stop.raising() if not stop.signal_name else pytest.raises(StopError), stop.raising():
            pass
        os.kill(os.getpid(), signal.SIGINT)  # noted, as before
        assert stop.signal_name == "SIGTERM"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_in_export(folder: str) -> list[str]:
    """What rank 0 is told by a run that is signalled during its export, and by the same command again."""
    original = saving.export

    def export(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(*arguments)

    told = []
    arguments = "--training.steps 2 --checkpoint.last_save_in_hf"
    try:
        for function in (export, original):
            saving.export = function
            trainer, said = trainer_of(folder, arguments, Control(dist.get_rank(), f"{folder}/control"))
            trainer.run()
            told += said
            names = sorted(path.name for path in Path(folder, "control").iterdir())
            told.append(f"{names} {sorted(path.name for path in (trainer.run_folder / 'hf').glob('*'))}")
            dist.barrier()
    finally:
        saving.export = original
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    return told


def test_a_stop_during_an_export_leaves_nothing_and_the_same_command_exports(ranks: Ranks, tmp_path: Path) -> None:
    told = ranks.run(1, stopped_in_export, str(tmp_path))[0]
    (line,) = [line for line in told if line.startswith("stopped by")]
    assert line.startswith("stopped by a signal: step 2 is saved; the same command writes its weights to ")
    after = [line for line in told if line.startswith("['")]
    assert after == ["['HEARTBEAT', 'SAVED'] []", "['DONE', 'HEARTBEAT'] ['step-2']"]
