"""metrics.jsonl and TensorBoard tell the same, survive kills and resumes, and never lie about a NaN."""

import builtins
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from dtron.config.sections import Metrics
from dtron.errors import UserError
from dtron.observe.goodput import PARTS, Ledger
from dtron.observe.metrics import LAYOUT, TAGS, MetricsWriter, last_row, read_metrics, tag_of

ROW: dict[str, Any] = {
    "expert_dropped_rows": 0,
    "step": 1,
    "loss": 10.5,
    "grad_norm": 1.25,
    "lr": 1e-4,
    "tokens": 2048,
    "epochs": 0.25,
    "step_s": 0.5,
    "tokens_per_s": 4096.0,
    "tokens_per_s_per_gpu": 1024.0,
    "mfu": 0.41,
    "hfu": 0.5,
    "forward_backward_s": 0.3,
    "optimizer_s": 0.05,
    "longest_wait_s": 0.02,
    "slowest_rank": 3,
    "max_active_memory_bytes": 2 * 2**30,
    "alloc_retries": 1,
    "predicted/mfu": 0.45,
    "predicted/bubble": 0.1,
    "predicted/tokens_per_s_per_gpu": 1100.0,
    "predicted/max_memory_bytes": 2**31,
    "data_s": 0.01,
    "max_memory_bytes": 3 * 2**30,
    "validation_loss": 10.0,
    "validation_perplexity": math.exp(10.0),
    "goodput": 0.9,
    "checkpoint_stall_s": 0.25,
    "checkpoint_save_s": 1.5,
    "checkpoint_bytes": 2**31,
    "checkpoint_slowdown": 1.25,
    "failed_saves": 1,
    "skipped_steps": 2,
    "skipped_documents": 3,
}
CONFIG_TEXT = "[training]\nsteps = 7"


def writer(folder: Path, attempt: int = 1, tensorboard: bool = False) -> MetricsWriter:
    hparams = {"optimizer.lr": 8e-4, "model.name": "llama3", "unset": None}
    return MetricsWriter(folder, CONFIG_TEXT, hparams, Metrics(enable_tensorboard=tensorboard), attempt)


def log_steps(folder: Path, attempt: int, steps: range, loss: float, tensorboard: bool = False) -> None:
    metrics = writer(folder, attempt, tensorboard)
    for step in steps:
        metrics.log({"step": step, "loss": loss})
    metrics.close()


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "tensors": 0})
    return accumulator.Reload()


def test_every_key_comes_back_from_the_file(tmp_path: Path) -> None:
    metrics = writer(tmp_path, attempt=3)
    metrics.log(ROW)
    # Read before close: a row must be on its way to the disk at once.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{**ROW, "attempt": 3}]
    assert read_metrics(tmp_path / "metrics.jsonl") == [{**ROW, "attempt": 3}]
    assert not (tmp_path / "tb").exists()
    metrics.close()


@pytest.mark.parametrize("kept", [1, 12, -1])
def test_a_line_cut_by_a_kill_is_ended_and_passed_over(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(tmp_path, 1, range(1, 3), loss=5.0)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    whole = kept == -1  # only the end of the line is missing
    assert [row["step"] for row in read_metrics(path)] == ([1, 2] if whole else [1])
    log_steps(tmp_path, 2, range(2, 4), loss=6.0)
    assert path.read_bytes().startswith(first + second[:kept] + b"\n{"), "nothing is deleted, the stump is ended"
    assert [(row["step"], row["loss"], row["attempt"]) for row in read_metrics(path)] == [
        (1, 5.0, 1),
        (2, 6.0, 2),
        (3, 6.0, 2),
    ]


def test_a_whole_file_is_reopened_without_an_empty_line(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, range(1, 3), loss=5.0)
    log_steps(tmp_path, 2, range(3, 4), loss=5.0)
    assert len((tmp_path / "metrics.jsonl").read_text().split("\n")) == 4


def test_the_last_attempt_of_a_step_wins_and_steps_are_sorted(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, range(5, 0, -1), loss=1.0)
    log_steps(tmp_path, 2, range(4, 2, -1), loss=2.0)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 1.0)]


def test_validation_joins_its_step_but_not_another_attempts(tmp_path: Path) -> None:
    metrics = writer(tmp_path, attempt=1)
    metrics.log({"step": 1, "loss": math.nan})
    metrics.log({"step": 1, "validation_loss": math.inf})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    joined = {"step": 1, "loss": None, "validation_loss": None, "nonfinite": ["loss", "validation_loss"], "attempt": 1}
    assert read_metrics(path) == [joined]
    log_steps(tmp_path, 2, range(1, 2), loss=2.0)
    assert read_metrics(path) == [{"step": 1, "loss": 2.0, "attempt": 2}]


def test_a_row_that_is_not_finite_is_valid_json_and_says_so(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    metrics = writer(tmp_path)
    metrics.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "mfu": None})
    metrics.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["nonfinite"] == ["loss", "grad_norm"], "an unknown MFU is null, but not for being NaN"
    assert (row["loss"], row["grad_norm"], row["lr"], row["mfu"]) == (None, None, 0.1, None)


def test_the_last_row_is_the_one_written_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) is None
    path.touch()
    assert last_row(path) is None
    log_steps(tmp_path, 1, range(1, 6), loss=1.0)
    log_steps(tmp_path, 2, range(3, 5), loss=2.0)
    assert last_row(path) == {"step": 4, "loss": 2.0, "attempt": 2}, "of the second attempt, though the first got on"
    metrics = writer(tmp_path, attempt=2)
    metrics.log({"step": 4, "validation_loss": 3.0})
    metrics.close()
    assert last_row(path) == {"step": 4, "validation_loss": 3.0, "attempt": 2}
    assert last_row(path, "loss") == {"step": 4, "loss": 2.0, "attempt": 2}
    assert last_row(path, "unix_s") is None


@pytest.mark.parametrize("stump", [b"{", b'{"step": 6, "lo', b'{"step": 6, "loss": 1.0, "attempt": 2', b"\n"])
def test_the_last_row_of_a_run_that_was_killed_is_the_last_whole_one(tmp_path: Path, stump: bytes) -> None:
    log_steps(tmp_path, 1, range(1, 6), loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + stump)
    assert last_row(path) == {"step": 5, "loss": 1.0, "attempt": 1}
    path.write_bytes(stump)
    assert last_row(path) is None


def test_a_ledger_goes_on_from_the_file(tmp_path: Path) -> None:
    ledger, metrics = Ledger(1e9), writer(tmp_path)
    ledger.add("steps", 30.0)
    metrics.log({"step": 1, **ledger.row(1e9 + 40)})
    metrics.log({"step": 1, "validation_loss": 3.0})
    metrics.close()
    row = Ledger(1e9 + 50, None, last_row(tmp_path / "metrics.jsonl", "unix_s")).row(1e9 + 50)
    assert {part: row[f"spent_s/{part}"] for part in PARTS if row[f"spent_s/{part}"]} == {
        "replayed": 30.0, "down": 10.0, "other": 10.0,
    }  # fmt: skip


def test_every_metric_has_a_tag_and_every_chart_shows_one() -> None:
    undrawn = {key for key in [*ROW, "attempt", "nonfinite", "unix_s"] if tag_of(key) is None}
    assert undrawn == {"step", "attempt", "nonfinite", "unix_s"}
    assert set(TAGS) == set(ROW) - undrawn
    account = [tag for key in Ledger(0.0).row(1.0) if (tag := tag_of(key)) and key not in TAGS]
    assert account == [(f"spent_s/{part}", 1.0) for part in PARTS]
    names = [tag.name for tag in [*TAGS.values(), *account]]
    assert len(set(names)) == len(names)
    for charts in LAYOUT.values():
        for title, (_, patterns) in charts.items():
            assert any(re.search(pattern, name) for pattern in patterns for name in names), title
    assert tag_of("goodput") == ("goodput/percent", 100.0)
    assert tag_of("checkpoint_s") == ("time/checkpoint_s", 1.0)
    assert tag_of("pipeline_bubble") == ("other/pipeline_bubble", 1.0)


def test_tensorboard_holds_scalars_dashboard_config_and_hparams(tmp_path: Path) -> None:
    metrics = writer(tmp_path, tensorboard=True)
    metrics.log({**ROW, "mfu": None})
    metrics.log({**ROW, "step": 2, "loss": math.nan})
    metrics.close()
    board = events(tmp_path)
    assert set(board.Tags()["scalars"]) == {tag.name for tag in TAGS.values()}
    for key, tag in TAGS.items():
        points = board.Scalars(tag.name)
        assert points[0].value == pytest.approx(ROW[key] * tag.factor), key
        assert [point.step for point in points] == ([2] if key == "mfu" else [1, 2]), key
    assert board.Scalars("perf/mfu_percent")[0].value == pytest.approx(41.0)
    assert board.Scalars("memory/max_gib")[0].value == pytest.approx(3.0)
    assert math.isnan(board.Scalars("loss/train")[1].value)
    layout = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert {c.title: [chart.title for chart in c.chart] for c in layout.category} == {
        category: list(charts) for category, charts in LAYOUT.items()
    }
    assert CONFIG_TEXT in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    hparams = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer.lr" in hparams and b"llama3" in hparams
    assert len(list((tmp_path / "tb").iterdir())) == 1, "a second file would hide the first one's later rows"


def test_a_run_killed_right_after_a_row_keeps_it(tmp_path: Path) -> None:
    child = (
        "import os, signal, sys\n"
        "from dtron.config.sections import Metrics\n"
        "from dtron.observe.metrics import TAGS, MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1], '', {}, Metrics(), attempt=1)\n"
        "writer.log({**dict.fromkeys(TAGS, 1.0), 'step': 1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", child, str(tmp_path)], cwd=root, stderr=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0
    board = events(tmp_path)
    assert set(board.Tags()["scalars"]) == {tag.name for tag in TAGS.values()}


def test_a_replayed_step_is_drawn_once(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, range(1, 7), loss=1.0, tensorboard=True)
    log_steps(tmp_path, 2, range(4, 9), loss=2.0, tensorboard=True)
    points = [(point.step, point.value) for point in events(tmp_path).Scalars("loss/train")]
    assert points == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0), (8, 2.0)]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs the package tensorboard.*pip install tensorboard"):
        writer(tmp_path, tensorboard=True)
    writer(tmp_path).close()  # without TensorBoard the package is not needed


def test_a_full_disk_costs_rows_and_not_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = writer(tmp_path)
    for step in (1, 2):
        metrics.log({**ROW, "step": step})
    metrics.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert "could not be written" in line and "No space left on device" in line and "the training continues" in line
