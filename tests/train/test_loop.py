"""Small parts of the loop: the clock, the batch that holds, and every key in use."""

import ast
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch.distributed as dist
from ranks import Ranks
from tinyrun import train_tiny

from dtron.config import load
from dtron.config.keys import KEYS
from dtron.ranks.world import World
from dtron.train import report
from dtron.train.report import Report, StepClock

ROOT = Path(__file__).resolve().parents[2]


# --- the clock


class Time:
    """Stands for time.perf_counter: seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(report.time, "perf_counter", clock)
    return clock


def step(clock: StepClock, time: Time, data_s: float, rest_s: float) -> None:
    with clock.data():
        time.now += data_s
    time.now += rest_s


def test_clock_divides_by_the_steps_since_the_last_reading(time: Time) -> None:
    clock = StepClock()
    step(clock, time, 1.0, 4.0)
    assert clock.read() == pytest.approx((5.0, 1.0))  # step 1: one step, whatever log_freq is
    for _ in range(9):
        step(clock, time, 0.25, 0.75)
    assert clock.read() == pytest.approx((1.0, 0.25))


def test_clock_leaves_pauses_out(time: Time) -> None:
    clock = StepClock()
    step(clock, time, 0.5, 0.5)
    with clock.paused("validation"):  # validation, a checkpoint
        time.now += 60.0
    step(clock, time, 0.5, 0.5)
    assert clock.read() == pytest.approx((1.0, 0.5))
    step(clock, time, 0.5, 1.5)
    assert clock.read() == pytest.approx((2.0, 0.5))


def test_slowdown_is_of_the_steps_beside_a_save(time: Time) -> None:
    clock = StepClock()
    assert clock.slowdown() is None
    for seconds, saving in ((1.0, False), (1.0, False), (9.0, False), (3.0, True), (1.5, True), (2.0, True)):
        step(clock, time, 0.0, seconds)
        clock.end_step(saving)
        time.now += 50.0  # validation and saving, after the step
    assert clock.slowdown() == pytest.approx(2.0)
    assert clock.slowdown() is None, "told once"


def test_rates_of_a_row(time: Time, tmp_path: Path) -> None:
    """tokens_per_s, a GPU's share of it, and MFU = tokens/s/GPU x FLOPs a token / peak."""
    arguments = "--metrics.no_enable_tensorboard --training.global_batch_size 16 --training.seq_len 128"
    config = load(arguments.split())
    told = Report(World(0, 0, 4, dist.HashStore()), config, "", tmp_path, 1, flops=6e6, peak=1e9, entropy=None)
    clock = StepClock()
    step(clock, time, 0.5, 1.5)
    told.step({"step": 1, "loss": 3.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 2048}, clock)
    step(clock, time, 0.5, 1.5)
    told.step({"step": 2, "flops_per_token": 3e6}, clock)  # under document masks: what is done
    told.end(2, StepClock())
    row, masked = report.read_metrics(tmp_path / "metrics.jsonl")
    assert masked["mfu"] == pytest.approx(row["mfu"] / 2)
    got = [row[name] for name in ("step_s", "data_s", "tokens_per_s", "tokens_per_s_per_gpu", "mfu")]
    assert got == pytest.approx([2.0, 0.5, 1024.0, 256.0, 256 * 6e6 / 1e9])


def test_resume_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(report.sys, "argv", ["train.py", "--job.description", "two words", "--checkpoint.enable"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    told = Report(
        World(0, 0, 4, dist.HashStore()),
        load(["--checkpoint.enable", "--metrics.no_enable_tensorboard"]),
        "", tmp_path, 1, 1.0, None, None,
    )  # fmt: skip
    told.end(2, StepClock())
    assert "torchrun --standalone --nproc_per_node 4 train.py --job.description 'two words' --checkpoint.enable" in (
        capsys.readouterr().out
    )


# --- the batch of a run that resumes on another layout


def train(folder: str, steps: int, arguments: str) -> tuple[list[str], int, int]:
    """What rank 0 says, the global batch, and the forwards of a step."""
    trainer, said = train_tiny(folder, steps, arguments)
    config = trainer.config
    forwards = config.training.global_batch_size // (config.training.local_batch_size * trainer.setup.degrees.dp)
    return said, trainer.progress.consumed, forwards


def test_global_batch_is_resolved_once_and_holds(ranks: Ranks, tmp_path: Path) -> None:
    """-1 on dp 2 is 4 sequences a step; on dp 1 they stay 4, by accumulation; an explicit change is said."""
    said, consumed, forwards = ranks.run(2, train, str(tmp_path), 2, "")[0]
    assert (consumed, forwards) == (8, 1) and not any("resuming" in line for line in said)
    said, consumed, forwards = ranks.run(1, train, str(tmp_path), 4, "")[0]
    assert (consumed, forwards) == (16, 2) and any("resuming from" in line for line in said)
    said, consumed, forwards = ranks.run(1, train, str(tmp_path), 5, "--training.global_batch_size 6")[0]
    assert (consumed, forwards) == (22, 3)
    assert "the global batch changes from 4 to 6 sequences, as configured" in said


# --- every key takes effect


def names_read(path: Path) -> set[str]:
    """Attributes a module reads, and the strings in it, by which `getattr` reads some."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_supported_key_is_read() -> None:
    read: set[str] = set()
    for path in (ROOT / "dtron").rglob("*.py"):
        if path.name != "sections.py":
            read |= names_read(path)
    # A key with one legal value states a fact; there is nothing to read.
    facts = {name for name, key in KEYS.items() if get_origin(key.kind) is Literal and len(get_args(key.kind)) == 1}
    chosen = [name for name, key in KEYS.items() if not key.lacks and name not in facts]
    unread = [name for name in chosen if name.rpartition(".")[2] not in read]
    assert unread == []
