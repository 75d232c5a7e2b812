"""A run's prediction beside what was measured, at its end."""

import json
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hardware_file import preflight

from dtron.__main__ import main
from dtron.config import load, replace
from dtron.errors import UserError
from dtron.plan.hardware import Hardware
from dtron.plan.hardware_file import read_hardware
from dtron.train import prediction

DEBUG = str(Path(__file__).resolve().parents[2] / "configs/debug.toml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run on two CPU ranks: its rows, and what preflight measured there."""
    rows = [
        {"step": i, "tokens_per_s_per_gpu": speed, "max_memory_bytes": 2**30} for i, speed in enumerate((5, 90, 110))
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row | {"unix_s": 1.0, "mfu": None}) + "\n" for row in rows)
    )
    (tmp_path / "preflight.json").write_text(json.dumps(preflight("cpu", "float32", {})))
    return tmp_path


def test_a_cpu_run_is_predicted_from_preflights_rates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", DEBUG, "--gpus", "2", "--hardware", str(folder / "preflight.json")]
    arguments += ["--measured", str(folder / "metrics.jsonl"), "--training.device", "cpu"]
    assert main([*arguments, "--training.mixed_precision_param", "float32"]) == 0
    speed, memory = capsys.readouterr().out.splitlines()
    assert speed.startswith("tokens/s per rank: predicted ") and "measured 100 (" in speed
    assert memory.startswith("peak memory: predicted ") and memory.endswith("measured 1.00 of the process")
    hw = read_hardware(str(folder / "preflight.json"), cpu=True)
    assert isinstance(hw, Hardware) and hw.flops == 6e14
    figures = [word for word in arguments if word not in ("--measured", str(folder / "metrics.jsonl"))]
    assert main([*figures, "--training.mixed_precision_param", "float32", "--as-configured", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"tokens_per_s_per_gpu", "bubble", "max_memory_bytes"} and found["bubble"] == 0
    assert f"predicted {found['tokens_per_s_per_gpu']:,.0f}, measured" in speed
    with pytest.raises(UserError, match="the device is cpu"):
        read_hardware("h100", cpu=True)
    # What is beside it is another run, or of other ranks.
    text = (folder / "metrics.jsonl").read_text()
    base = f"base = {json.dumps(DEBUG)}\n"
    (folder / "config.toml").write_text(base + "[training]\nseq_len = 32\ndevice = 'cpu'\n")
    assert main([*arguments, "--training.mixed_precision_param", "float32"]) == 1
    said = capsys.readouterr().err
    assert "is of another run than CONFIG: it has training.seq_len 32, not 64; give its own config.toml" in said
    (folder / "config.toml").unlink()
    (folder / "metrics.jsonl").write_text(text.replace('"mfu"', '"tokens_per_s": 400, "mfu"'))
    assert main([*arguments, "--training.mixed_precision_param", "float32"]) == 1
    assert "is of 4 ranks, and --gpus is 2; give --gpus 4" in capsys.readouterr().err
    (folder / "metrics.jsonl").write_text("")
    assert main(arguments) == 1
    assert "has no row with tokens_per_s_per_gpu" in capsys.readouterr().err
    (folder / "metrics.jsonl").unlink()
    assert main(arguments) == 1
    assert "No such file or directory; expected the metrics.jsonl of a run" in capsys.readouterr().err


def test_torchs_name_of_a_gpu_is_one_of_the_table() -> None:
    assert read_hardware("NVIDIA H100 80GB HBM3").name == "h100"
    with pytest.raises(UserError, match="unknown"):
        read_hardware("NVIDIA L4")


def test_what_goes_wrong_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a CPU without rates is not predicted at all."""
    (folder / "config.toml").touch()
    world = types.SimpleNamespace(size=2)
    progress = types.SimpleNamespace(step=7)
    trainer: Any = types.SimpleNamespace(device=torch.device("cpu"), run_folder=folder, world=world, progress=progress)
    asked: list[list[str]] = []

    def answers(*outcomes: Any) -> Any:
        def run(command: list[str], **options: Any) -> Any:
            asked.append(command)
            assert options["timeout"] == prediction.DEADLINE_S and "RANK" not in options["env"]
            outcome = outcomes[len(asked) - 1]
            if isinstance(outcome, Exception):
                raise outcome
            return types.SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), outcome, strict=True)))

        return run

    late = subprocess.TimeoutExpired("dtron plan", prediction.DEADLINE_S)
    outcomes = (0, "tokens/s: 1\nMFU: 2\n", ""), (1, "", "a\nerror: no\n"), (1, "", ""), late, OSError("no python")
    monkeypatch.setattr(subprocess, "run", answers(*outcomes))
    monkeypatch.setenv("RANK", "0")
    said: list[str] = []
    monkeypatch.setattr(prediction.log, "info", said.append)
    config = load(["--job.config_file", DEBUG, "--training.steps", "8"])
    prediction.compare_with_prediction(replace(config, "metrics.plan_hardware", "preflight.json"), trainer)
    assert asked == said == []  # it was stopped before its last step, and is to end at once
    progress.step = 8
    prediction.compare_with_prediction(config, trainer)
    assert (
        asked == [] and said.pop() == "plan: no prediction, as no rates of this CPU are given (metrics.plan_hardware)"
    )
    for _ in outcomes:
        prediction.compare_with_prediction(replace(config, "metrics.plan_hardware", "preflight.json"), trainer)
    assert asked[0][1:] == [
        "-m", "dtron", "plan", str(folder / "config.toml"), "--gpus", "2", "--hardware", "preflight.json",
        "--measured", str(folder / "metrics.jsonl"),
    ]  # fmt: skip
    assert said == [
        "plan: tokens/s: 1\nplan: MFU: 2", "plan: no prediction: error: no",
        "plan: no prediction: dtron plan ended with 1", "plan: no prediction: dtron plan took longer than 120 s",
        "plan: no prediction: no python",
    ]  # fmt: skip
