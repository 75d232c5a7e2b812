"""Faults that a new user found: each is refused, or right, from now on."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parity.layout import CPU, Case, build, build_config, with_keys
from parity.single import MODELS, SEQ, batch, plain_model
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dtron.config import load
from dtron.config.sections import LRScheduler
from dtron.errors import UserError
from dtron.mesh import Degrees
from dtron.registry import cross_entropy
from dtron.train.optimizer import learning_rate_factor, squared_gradient_norm
from dtron.train.resolve import resolve

TINY = ["--model.n_layers", "2", "--training.device", "cpu", "--training.seq_len", "64"]


def _norm(elements: int) -> tuple[float, float]:
    """The global norm of one large gradient sharded over all ranks, and the exact one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(distribute_tensor(torch.zeros(elements), mesh, [Shard(0)], src_data_rank=None))
    p.grad = distribute_tensor(values, mesh, [Shard(0)], src_data_rank=None)
    square = squared_gradient_norm([("w", p)], {}, mesh.size(), CPU)
    dist.all_reduce(square)
    return square.sqrt().item(), values.double().norm().item()


@pytest.mark.parametrize("world", [1, 2])
def test_norm_of_a_large_matrix_is_exact_on_any_layout(ranks: Ranks, world: int) -> None:
    """torch's fp32 norm is off by 1e-4 here, and by something else for other shards."""
    norm, exact = ranks.run(world, _norm, 2**22)[0]
    assert norm == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("decay_ratio", [None, 0.0])
def test_schedule_that_ends_before_the_run_stays_defined(decay_ratio: float | None) -> None:
    for warmup in (0, 2):
        c = LRScheduler(warmup_steps=warmup, total_steps=2, decay_ratio=decay_ratio)
        assert all(math.isfinite(learning_rate_factor(c, step, 10)) for step in range(1, 11))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lr_scheduler.total_steps 1 --lr_scheduler.warmup_steps 2", "warmup_steps 2 is more than its total_steps 1"),
        ("--checkpoint.folder /tmp/shared", 'checkpoint.folder = "/tmp/shared": expected the name of a folder inside'),
        ("--metrics.save_tb_folder ../tb", "metrics.save_tb_folder"),
        ("--compile.enable --compile.backend inductr", "compile.backend 'inductr' is unknown to torch; known: "),
        ("--compile.enable --compile.components=", "compile.components is empty"),
        ("--checkpoint.exclude_from_loading lm_head.*", "exclude_from_loading has no effect without"),
        ("--profiling.enable_profiling --profiling.profile_freq 2", "profiling.profile_freq = 2"),
        ("--model.rope_theta=-1", "model.rope_theta = -1.0: expected a positive number"),
        ("--job.custom_import .relative", "cannot import '.relative'"),
    ],
)  # fmt: skip
def test_refused_before_a_folder_is_made(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(load([*TINY, *arguments.split()]), 1)


def test_module_that_raises_on_import_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_parts.py").write_text("def (")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="cannot import 'broken_parts': SyntaxError"):
        resolve(load([*TINY, "--job.custom_import", "broken_parts"]), 1)


def test_hf_config_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a JSON list"):
        resolve(load([*TINY, "--model.hf_config_path", str(tmp_path)]), 1)


def test_dropout_is_refused_in_training_alone(tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": "seed_oss", "num_hidden_layers": 2, "intermediate_size": 96, "residual_dropout": 0.05}
    given = [*TINY, "--model.hf_config_path", str(tmp_path)]

    def write(**more: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps(sizes | config | more))

    write()
    with pytest.raises(UserError, match="attention_dropout = 0.1, residual_dropout = 0.05, and dtron trains without"):
        resolve(load(given), 1)  # the one is transformers' default
    resolve(load([*given, "--validation.only", "--checkpoint.initial_load_path", "x"]), 1)
    write(attention_dropout=0, residual_dropout=0.0)
    resolve(load(given), 1)
    write(attention_dropout="x")
    with pytest.raises(UserError, match=r"attention_dropout = 'x'; expected a number in \[0, 1\)"):
        resolve(load(given), 1)


def _evaluate_other_size() -> list[float]:
    """Validation batches of another size than training's, whole and in the configured microbatches, under GPipe."""
    case = Case("pp2", Degrees(2), {"parallelism.pipeline_parallel_schedule": "GPipe"})
    losses = []
    for rows in (2, 8):
        config = with_keys(build_config(case), {"validation.enable": True, "validation.local_batch_size": rows})
        mesh, model = build(case, config)
        tokens, labels = (t[:rows] for t in batch(0))
        model.loss.valid_tokens = torch.ones(())
        loss = model.evaluate(tokens, labels, torch.arange(SEQ).expand(rows, -1))
        dist.all_reduce(loss)
        losses.append(loss.item())
    return losses


def test_validation_batches_may_have_a_size_of_their_own_under_pipeline(ranks: Ranks) -> None:
    model = plain_model(MODELS["small"])
    expected = []
    for rows in (2, 8):
        tokens, labels = (t[:rows] for t in batch(0))
        expected.append(cross_entropy(model(tokens), labels).sum().item())
    assert ranks.run(2, _evaluate_other_size)[0] == pytest.approx(expected, rel=1e-5)
