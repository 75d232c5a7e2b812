"""A mixture of experts through train.py: every layout trains it alike, and a run goes on with its experts elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from frontdoor import CONFIG, Run, torchrun
from ranks import Ranks
from tinyrun import quiet_world

from dtron.config import load
from dtron.observe.metrics import read_metrics
from dtron.train.resolve import resolve
from dtron.train.trainer import Trainer

DIMENSIONS = {
    "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 8,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": [0], "initializer_range": 0.1,
}  # fmt: skip
BALANCE = "--training.expert_balance_loss 0.1"
STEPS = "--training.steps 10"
EP = "--parallelism.expert_parallel_degree"
LAYOUTS = {"tp2, ep2": (2, f"--tp 2 {EP} 2")}
# Each process costs seconds to start; the pool's ranks train on the same layouts below.
LONG = {
    "ep2": (2, f"{EP} 2 --training.local_batch_size 2"),
    "dp2 x tp2 x pp2, ep4": (8, f"--dp 2 --tp 2 --pp 2 {EP} 4 --training.local_batch_size 4"),
    "pp2 x ep2": (4, f"--pp 2 {EP} 2 --training.local_batch_size 4"),
    "cp2 x tp2 x dp2, ep8": (8, f"--cp 2 --tp 2 {EP} 8 --training.local_batch_size 4"),
}


def config_of(folder: Path, more: str = "") -> str:
    """The text of a run's configuration file, of the tiny Qwen3-MoE whose config.json it writes."""
    (folder / "config.json").write_text(json.dumps(DIMENSIONS))
    before, _, after = CONFIG.partition("[model]\n")
    model = f'[model]\nname = "qwen3_moe"\nhf_config_path = "{folder / "config.json"}"\n'
    return before + model + after[after.index("[optimizer]") :] + more


def rows_of(run: Run) -> list[dict[str, Any]]:
    assert run.code == 0, run.everything()
    assert "Traceback" not in "".join(run.err), run.everything()
    (path,) = run.folder.glob("outputs/*/metrics.jsonl")
    return read_metrics(path)


def assert_alike(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same steps, loss, gradient norm and load of the experts."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    columns = [name for name in expected[0] if name in ("loss", "grad_norm") or name.startswith("expert_")]
    assert len(columns) == 2 + 2 * 3 + 1
    for row, other in zip(rows, expected, strict=True):
        for name in columns:
            assert row[name] == pytest.approx(other[name], rel=1e-4), (row["step"], name)
        assert row["expert_dropped_rows"] == 0


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("single")
    return rows_of(torchrun(folder, 1, *f"{BALANCE} {STEPS}".split(), config=config_of(folder)))


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_experts_train_alike_on_every_layout(layout: str, single: list[dict[str, Any]], tmp_path: Path) -> None:
    ranks, arguments = (LAYOUTS | LONG)[layout]
    arguments = f"{BALANCE} {STEPS} {arguments}"
    assert_alike(rows_of(torchrun(tmp_path, ranks, *arguments.split(), config=config_of(tmp_path))), single)
    assert single[-1]["loss"] < single[0]["loss"] - 0.1


# --- on the pool's ranks


def train(folder: str, name: str, arguments: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The job of a rank: train from FOLDER/run.toml in FOLDER/NAME. On rank 0 the rows so far, and what it was told."""
    import frontdoor_parts  # noqa: F401 - registers the data; in a rank, as job.custom_import does

    world, said = quiet_world()
    begin = ["--job.config_file", f"{folder}/run.toml", "--job.dump_folder", f"{folder}/{name}"]
    trainer = Trainer(resolve(load([*begin, *BALANCE.split(), *arguments.split()]), dist.get_world_size()), world)
    trainer.run()
    return (read_metrics(trainer.run_folder / "metrics.jsonl") if world.rank == 0 else []), said


CHANGING = [
    (4, 3, f"--dp 2 --tp 2 {EP} 4 --training.local_batch_size 4"),
    (4, 5, f"--pp 2 {EP} 2 --training.local_batch_size 4 --parallelism.pipeline_parallel_schedule ZBVZeroBubble"),
    (2, 6, f"--cp 2 {EP} 1"),
    (4, 7, f"--dp-replicate 2 --dp 2 {EP} 2 --training.local_batch_size 1"),
]


def test_a_run_stopped_and_resumed_with_its_experts_elsewhere_trains_alike(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(config_of(tmp_path, "[checkpoint]\nenable = true\n"))
    steady = "--lr_scheduler.total_steps 7"
    expected, _ = ranks.run(1, train, str(tmp_path), "whole", f"{steady} --training.steps 7")[0]
    for attempt, (world, last, layout) in enumerate(CHANGING, start=1):
        arguments = f"{steady} --training.steps {last} {layout}"
        rows, said = ranks.run(world, train, str(tmp_path), "parts", arguments)[0]
        assert any("resuming from" in line for line in said) == (attempt > 1), said
    assert [row["attempt"] for row in rows] == [1, 1, 1, 2, 2, 3, 4]
    assert_alike(rows, expected)
