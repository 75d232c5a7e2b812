"""Weights & Biases gets TensorBoard's scalars, one run per run folder, and never disturbs a training."""

import math
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from dtron.config.sections import Metrics
from dtron.errors import UserError
from dtron.observe import wandb_run
from dtron.observe.metrics import MetricsWriter, read_metrics
from dtron.observe.wandb_run import check_wandb

HPARAMS = {"optimizer.lr": 8e-4, "model.rope_scaling.factor": None, "model.converters": ["float8"]}


class Wandb(types.ModuleType):
    """A stand-in that notes what is asked of it. init_error: raised by init. wait: for which init waits."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.opened: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.defined: list[Any] = []
        self.finished = 0
        self.error: Exception | None = None
        self.wait = threading.Event()
        self.wait.set()

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def init(self, **given: Any) -> "Wandb":
        self.opened.append(given)
        self.wait.wait()
        if self.error and not self.logged:
            raise self.error
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, numbers: dict[str, float]) -> None:
        self.logged.append(numbers)
        if self.error:
            raise self.error

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return stand_in


def writer(folder: Path, attempt: int = 1) -> MetricsWriter:
    return MetricsWriter(folder, "", HPARAMS, Metrics(enable_tensorboard=False, enable_wandb=True), attempt)


def test_scalars_have_the_names_of_tensorboard(tmp_path: Path, wandb: Wandb) -> None:
    metrics = writer(tmp_path / "run")
    assert wandb.opened == [], "a run that never comes to its first row is none of W&B either"
    metrics.log({"step": 1, "loss": 10.5, "mfu": 0.25, "lr": None, "expert_load": torch.ones(2, 2)})
    metrics.log({"step": 1, "validation_loss": math.nan, "nonfinite": ["validation_loss"]})
    metrics.close()
    (opened,) = wandb.opened
    assert (opened["project"], opened["name"], opened["dir"]) == ("dtron", "run", str(tmp_path / "run"))
    assert opened["config"] == {
        "optimizer": {"lr": 8e-4},
        "model": {"rope_scaling": {"factor": None}, "converters": "['float8']"},
    }
    assert wandb.logged[0] == {"step": 1, "loss/train": 10.5, "perf/mfu_percent": 25.0}
    assert wandb.logged[1].keys() == {"step", "loss/validation"} and math.isnan(wandb.logged[1]["loss/validation"])
    assert wandb.defined == [("*", "step")] and wandb.finished == 1


def test_a_resumed_run_is_the_same_run(tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, attempt in ((tmp_path / "a", 1), (tmp_path / "a", 2), (tmp_path / "b", 1)):
        metrics = writer(folder, attempt)
        metrics.log({"step": 5 - attempt, "loss": 1.0})
        metrics.close()
        monkeypatch.setenv("WANDB_PROJECT", "mine")
    first, second, other = (opened["id"] for opened in wandb.opened)
    assert first == second != other and {opened["resume"] for opened in wandb.opened} == {"allow"}
    assert wandb.opened[1]["project"] == "mine"


@pytest.mark.parametrize("at", ["init", "log"])
def test_an_error_of_wandb_is_one_warning(
    tmp_path: Path, wandb: Wandb, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    wandb.error = ConnectionError("no network")
    wandb.logged += [{}] if at == "log" else []
    metrics = writer(tmp_path)
    for step in (1, 2, 3):
        metrics.log({"step": step, "loss": 1.0})
    metrics.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert "ConnectionError: no network" in line and "the training continues" in line
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_slow_network_holds_nothing_up(
    tmp_path: Path, wandb: Wandb, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "FINISH_S", 0.05)
    wandb.wait.clear()
    metrics = writer(tmp_path)
    metrics.log({"step": 1, "loss": 1.0})
    metrics.close()
    assert "has not taken all metrics within 0.05 s: wandb sync" in capsys.readouterr().out
    wandb.wait.set()


def test_a_missing_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    for start in (lambda: writer(tmp_path), lambda: check_wandb(True)):
        with pytest.raises(
            UserError, match=r"enable_wandb = true needs the package wandb.*pip install 'dtron\[wandb\]'"
        ):
            start()
    check_wandb(False)


@pytest.mark.long
def test_an_offline_run_of_the_real_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for attempt in (1, 2):
        metrics = writer(tmp_path, attempt)
        for step in (2 * attempt - 1, 2 * attempt):
            metrics.log({"step": step, "loss": 1.0 / step})
        metrics.close()
    run_id = (tmp_path / "wandb/dtron-run-id").read_text()
    files = list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert files and all(b"loss/train" in file.read_bytes() for file in files)
