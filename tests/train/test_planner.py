"""What the planner predicts is logged beside what is measured, and costs a run nothing that does not ask for it."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtron.config import load, replace
from dtron.observe.metrics import read_metrics
from dtron.ranks.world import World
from dtron.train import planner
from dtron.train import report as report_module
from dtron.train.report import Report, StepClock

ANSWER = '{"tokens_per_s_per_gpu": 900.0, "mfu": 0.4, "bubble": 0.1, "max_memory_bytes": 1024.0}'


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> list[list[str]]:
    """Python that runs `program` in place of the planner; the words it was asked with."""
    asked: list[list[str]] = []

    def command(words: list[str]) -> Any:
        asked.append(words)
        return [sys.executable, "-S", "-c", program], {}

    monkeypatch.setattr(planner, "plan_command", command)
    return asked


def wait_for(prediction: planner.Prediction) -> None:
    end = time.monotonic() + 30
    while prediction._process and prediction._process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def report(folder: Path, hardware: str, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(report_module, "log", SimpleNamespace(info=lambda *_: None))
    config = load(["--training.steps", "9", "--metrics.no_enable_tensorboard", "--training.global_batch_size", "4"])
    config = replace(config, "metrics.plan_hardware", hardware)
    world = World(0, 0, 2, torch.distributed.HashStore())
    return Report(world, config, "", folder, 1, flops=1e9, peak=1e12, entropy=None, recomputed=2e8)


def step(made: Report, number: int) -> None:
    clock = StepClock()
    with clock.data():
        pass
    time.sleep(0.001)
    made.step({"step": number, "loss": 1.0}, clock)


def test_predicted_scalars_follow_when_they_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stand_in(monkeypatch, f"print('''{ANSWER}''')")
    made = report(tmp_path, "h100", monkeypatch)
    assert asked == [], "nothing is asked before the first step"
    step(made, 1)
    words = [str(tmp_path / "config.toml"), "--gpus", "2", "--hardware", "h100", "--as-configured", "--json"]
    assert asked == [words]
    assert made._prediction
    wait_for(made._prediction)
    for number in (2, 3):
        step(made, number)
    made.end(3, StepClock())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert "predicted/mfu" not in rows[0] and len(asked) == 1
    for row in rows[1:]:
        figures = [row[f"predicted/{key}"] for key in ("tokens_per_s_per_gpu", "mfu", "bubble", "max_memory_bytes")]
        assert figures == [900.0, 0.4, 0.1, 1024.0]
        assert row["hfu"] == pytest.approx(1.2 * row["mfu"])


def test_without_the_key_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stand_in(monkeypatch, "")
    made = report(tmp_path, "", monkeypatch)
    step(made, 1)
    assert asked == [] and not [key for key in read_metrics(tmp_path / "metrics.jsonl")[0] if "predicted" in key]


@pytest.mark.parametrize("program", ["raise SystemExit('error: no')", "print('a line')", "print('[1]')"])
def test_no_prediction_is_no_row(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, program)
    prediction = planner.Prediction(Path("config.toml"), 2, "h100")
    wait_for(prediction)
    assert prediction.row() == prediction.row() == {}


def test_a_run_that_ends_first_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "import time; time.sleep(60)")
    prediction = planner.Prediction(Path("config.toml"), 2, "h100")
    process: Any = prediction._process
    assert prediction.row() == {}
    prediction.close()
    assert process.returncode is not None and prediction.row() == {}
