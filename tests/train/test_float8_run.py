"""A training in float8 through the trainer: saved, resumed on another layout, exported, and read without torchao."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from tinyrun import train_tiny

pytest.importorskip("torchao")
FLOAT8 = (
    "--model.converters float8 --quantize.linear.float8.emulate --training.global_batch_size 4 "
    "--lr_scheduler.total_steps 6 --lr_scheduler.warmup_steps 1 --metrics.log_freq 1 "
)
GATHERED = "--quantize.linear.float8.enable_fsdp_float8_all_gather "
AT_ONCE = "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp "


def run(folder: str, steps: int, arguments: str) -> list[str]:
    return train_tiny(folder, steps, arguments)[1]


def losses(folder: Path) -> list[tuple[float, float]]:
    (file,) = folder.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row and "grad_norm" in row]


@pytest.mark.parametrize("gathered", ["", GATHERED + AT_ONCE], ids=["bf16 gather", "float8 gather"])
def test_a_resume_on_another_layout_goes_on_and_exports(tmp_path: Path, ranks: Ranks, gathered: str) -> None:
    arguments = FLOAT8 + gathered
    ranks.run(2, run, str(tmp_path / "whole"), 6, arguments + "--dp 2")
    ranks.run(2, run, str(tmp_path / "parts"), 3, arguments + "--dp 2")
    said = ranks.run(1, run, str(tmp_path / "parts"), 6, arguments + "--checkpoint.last_save_in_hf")[0]
    assert any("float8 tensorwise (emulated)" in line for line in said)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(whole) == len(parts) == 6
    assert parts == [pytest.approx(pair, rel=1e-4) for pair in whole]
    (exported,) = (tmp_path / "parts").glob("*/hf/step-6/*.safetensors")
    weights = load_file(exported)
    assert {w.dtype for w in weights.values()} <= {torch.float32, torch.bfloat16}
    assert "model.layers.0.mlp.down_proj.weight" in weights


def test_scales_of_all_gathered_weights_at_once_are_the_same(tmp_path: Path, ranks: Ranks) -> None:
    for name, arguments in (("each", GATHERED), ("once", GATHERED + AT_ONCE)):
        ranks.run(2, run, str(tmp_path / name), 3, FLOAT8 + arguments + "--dp 2")
    assert losses(tmp_path / "each") == losses(tmp_path / "once")


def test_the_checkpoint_is_one_of_any_run(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights gathered as float8 are saved as they are, and evaluated without float8 and without torchao."""
    ranks.run(2, run, str(tmp_path / "run"), 2, FLOAT8 + GATHERED + "--dp 2")
    (checkpoint,) = (tmp_path / "run").glob("*/checkpoint/step-2")
    evaluated = ranks.run(1, plainly, str(tmp_path / "plain"), str(checkpoint))[0]
    assert evaluated


def plainly(folder: str, checkpoint: str) -> Any:
    import sys

    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchao"}
    sys.modules["torchao"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        train_tiny(
            folder,
            1,
            f"--training.global_batch_size 2 --lr_scheduler.warmup_steps 0 --checkpoint.initial_load_path {checkpoint}",
        )
        return True
    finally:
        del sys.modules["torchao"]
        sys.modules.update(hidden)
