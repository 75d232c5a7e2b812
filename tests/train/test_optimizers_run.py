"""Every optimizer in a training as a user starts one: saved, and resumed on another layout with the same losses."""

import json
from pathlib import Path

import pytest
from ranks import Ranks
from tinyrun import train_tiny

COMMON = (
    "--training.global_batch_size 4 --lr_scheduler.total_steps 4 --lr_scheduler.warmup_steps 1 --metrics.log_freq 1 "
    "--model.n_layers 2 --optimizer.lr 1e-2 --training.mixed_precision_param float32 "
)
OPTIMIZERS = {
    "AdamW": "",
    "AdamW bf16": "--optimizer.state_dtype bfloat16",
    "Adam": "--optimizer.name Adam",
    "SGD": "--optimizer.name SGD",
    "Muon": "--optimizer.name Muon",
}
FLOAT8 = (
    "--model.converters float8 --quantize.linear.float8.emulate --quantize.linear.float8.enable_fsdp_float8_all_gather "
    "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp "
)


def run(folder: str, steps: int, arguments: str) -> None:
    train_tiny(folder, steps, COMMON + arguments)


def curve(folder: Path) -> list[tuple[float, float]]:
    (file,) = folder.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "grad_norm" in row]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_resumes_on_another_layout(name: str, tmp_path: Path, ranks: Ranks) -> None:
    arguments = OPTIMIZERS[name]
    ranks.run(2, run, str(tmp_path / "whole"), 4, f"{arguments} --dp 2")
    ranks.run(2, run, str(tmp_path / "parts"), 2, f"{arguments} --dp 2")
    ranks.run(2, run, str(tmp_path / "parts"), 4, f"{arguments} --pp 2 --training.local_batch_size 4")
    whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    assert len(whole) == len(parts) == 4 and whole[0][0] != whole[3][0]
    assert parts == [pytest.approx(pair, rel=1e-4) for pair in whole]


@pytest.mark.parametrize("name", ["AdamW bf16", "Muon"])
def test_weights_gathered_as_float8_are_updated_too(name: str, tmp_path: Path, ranks: Ranks) -> None:
    pytest.importorskip("torchao")
    for world in (1, 2):
        ranks.run(world, run, str(tmp_path / str(world)), 3, f"{FLOAT8} {OPTIMIZERS[name]} --dp {world}")
    one, two = (curve(tmp_path / str(world)) for world in (1, 2))
    assert len(two) == 3 and two == [pytest.approx(pair, rel=3e-3) for pair in one]
