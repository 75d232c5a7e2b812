"""train.py --validation.only as its user sees it: the training's loss again, on another layout, and nothing written."""

import json
from pathlib import Path

import pytest
from frontdoor import CONFIG, torchrun


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_evaluated_on_another_layout(tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    (tmp_path / "evaluated").mkdir()
    few = ("--training.steps", "2", "--validation.enable")
    run = torchrun(tmp_path / "trained", 1, *few, config=CONFIG + "[checkpoint]\nenable = true\n")
    assert run.code == 0, run.everything()
    (trained,) = (row["validation_loss"] for row in run.rows() if "validation_loss" in row)
    (checkpoint,) = run.folder.glob("outputs/*/checkpoint/step-2")
    outputs = run.folder / "outputs"
    before = files(outputs)

    only = ("--validation.only", "--checkpoint.initial_load_path", str(checkpoint), "--job.dump_folder", str(outputs))
    only += ("--job.control_folder", str(tmp_path / "control"))
    run = torchrun(tmp_path / "evaluated", 2, *only, "--tp", "2", "--training.dataset", "none_such")
    assert run.code == 0 and run.err == ["", ""] and run.out[1] == "", run.everything()
    assert run.out[0].count("nats per token") == 1
    (line,) = [line for line in run.out[0].splitlines() if line.startswith("loss ")]
    assert float(line.split()[1]) == pytest.approx(trained, rel=1e-5)
    assert files(outputs) == before
    assert {path.name for path in run.folder.iterdir()} == {"x.toml", "agent", "logs"}
    assert {path.name for path in (tmp_path / "control").iterdir()} == {"HEARTBEAT", "DONE"}
    assert json.loads((tmp_path / "control/HEARTBEAT").read_text())["deadline_s"] >= 3600, "it may take long"
