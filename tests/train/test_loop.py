"""Small parts of the loop: the clock, the batch that holds, and every key in use."""

import ast
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import Ranks
from tinyrun import train_tiny

from dtron.config import Config, load, sections
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
    """tokens_per_s, a GPU's share of it, and MFU = tokens/s/GPU x FLOPs per token / peak."""
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
    once = ["--checkpoint.allow-restart", "--checkpoint.allow_changed_data"]
    monkeypatch.setattr(
        report.sys, "argv", ["train.py", "--job.description", "two words", *once, "--checkpoint.enable"]
    )
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


def sections_in(holder: Any) -> dict[str, type]:
    """The sections that a section has, and those in them, by the attributes that hold them."""
    found: dict[str, type] = {}
    for field in dataclasses.fields(holder):
        if dataclasses.is_dataclass(section := getattr(holder, field.name)):
            found |= {field.name: type(section)} | sections_in(section)
    return found


# Attributes that hold a section: `config.training`, and `self._config` where a class names it so.
BY_ATTRIBUTE = sections_in(Config())
SECTIONS = {name: kind for name, kind in vars(sections).items() if dataclasses.is_dataclass(kind)}
SECTIONS |= {kind.__name__: kind for kind in BY_ATTRIBUTE.values()}


def declared_in(kind: type, leaf: str) -> str:
    """`Dataset.dataset` for that key of [training], which inherits it: one declaration is one thing to read."""
    owner = next((base for base in reversed(kind.__mro__) if leaf in getattr(base, "__annotations__", {})), kind)
    return f"{owner.__name__}.{leaf}"


def keys_read(source: str) -> set[str]:
    """Keys that a module reads as attributes of what is known to be their section, or by getattr with their name.

    A name is known by its annotation, or because it was assigned a section; an attribute by BY_ATTRIBUTE.
    """
    tree = ast.parse(source)
    known = {name: SECTIONS[name] for name in SECTIONS}
    names: dict[str, set[type]] = {}

    def kinds(node: ast.AST | None) -> set[type]:
        if isinstance(node, ast.Attribute):
            attribute = {BY_ATTRIBUTE[node.attr]} if node.attr in BY_ATTRIBUTE else set()
            return attribute | (names.get(f"self.{node.attr}", set()) if ast.unparse(node.value) == "self" else set())
        return names.get(node.id, set()) if isinstance(node, ast.Name) else set()

    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            words = {getattr(word, "id", getattr(word, "attr", "")) for word in ast.walk(node.annotation)}
            names.setdefault(name, set()).update(known[word] for word in words & known.keys())
    for node in [node for node in nodes if isinstance(node, ast.Assign)] * 2:  # twice: self.x = c, c = config.x
        for target in node.targets:
            whole = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=True) if whole else [(target, node.value)]  # type: ignore
            for left, right in pairs:
                names.setdefault(ast.unparse(left), set()).update(kinds(right))
    read = set()
    for node in nodes:
        if isinstance(node, ast.Attribute):
            read |= {declared_in(kind, node.attr) for kind in kinds(node.value)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "vars":  # all at once
            read |= {declared_in(kind, f.name) for kind in kinds(node.args[0]) for f in dataclasses.fields(kind)}
        # getattr(section, key), with the keys as strings in the module
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            read |= {declared_in(kind, leaf) for kind in kinds(node.args[0]) for leaf in strings}
    return read


def test_every_supported_key_is_read() -> None:
    read: set[str] = set()
    for path in (ROOT / "dtron").rglob("*.py"):
        if path.parent.name != "config":
            read |= keys_read(path.read_text())
    unread = []
    for name, key in KEYS.items():
        section = functools.reduce(getattr, name.split(".")[:-1], Config())
        if not key.unsupported and declared_in(type(section), name.rpartition(".")[2]) not in read:
            unread.append(name)
    assert unread == []


def test_a_key_that_nothing_reads_is_found() -> None:
    """Though an attribute of something else has its name."""
    source = "def f(c: Config, o: Other) -> None:\n    p = c.parallelism\n    o.steps, c.training.seq_len, p.nothing\n"
    read = keys_read(source)
    assert "Training.seq_len" in read and "Training.steps" not in read
