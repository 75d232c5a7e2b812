"""Truth from outside: dtron's losses, norms and learning rates are those of a loop that imports nothing of it."""

import ast
from pathlib import Path

import numpy as np
import parity.outside as outside
import pytest
import torch
import torch.distributed as dist
from parity.layout import CPU, Weights, local, with_keys
from ranks import Ranks
from torch.distributed.tensor import distribute_tensor
from transformers import LlamaForCausalLM

from dtron import registry
from dtron.config.sections import Config
from dtron.mesh import Degrees, Mesh
from dtron.models.llama import LlamaConfig
from dtron.parallel.compose import parallelize
from dtron.parallel.context import local_positions
from dtron.train.optimizer import build_optimizers, clip_gradients, learning_rate_factor, squared_gradient_norm

MODEL = LlamaConfig(outside.VOCABULARY, 32, 4, 4, 2, 64)


def _config(degrees: Degrees, shape: str) -> Config:
    keys = {
        "parallelism.pipeline_parallel_degree": degrees.pp,
        "training.local_batch_size": outside.ROWS // degrees.dp,
        "training.seq_len": outside.SEQ,
        "training.steps": outside.STEPS,
        "training.mixed_precision_param": "float32",
        "activation_checkpoint.mode": "none",
        "optimizer.lr": outside.PEAK,
        "optimizer.eps": 1e-6,
        "lr_scheduler.warmup_steps": outside.WARMUP,
        "lr_scheduler.min_lr_factor": outside.FLOOR,
        "lr_scheduler.decay_type": "cosine" if shape == "cosine" else "linear",
        "lr_scheduler.decay_ratio": None if shape == "cosine" else 0.25,
    }
    return with_keys(Config(), keys)


def _train(degrees: Degrees, shape: str, weights: Weights) -> list[tuple[float, float, float]]:
    """The same rows as outside.train, by dtron's parts, from the same weights."""
    config, mesh = _config(degrees, shape), Mesh(degrees, "cpu")
    spec = registry.look_up("model", "llama3", "model.name")
    model = parallelize(spec, MODEL, config, mesh, CPU, registry.cross_entropy, [])
    with torch.no_grad():
        for name, p in model.named_parameters():
            whole = torch.from_numpy(weights[name])
            local(p).copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local())
    (optimizer, *others) = build_optimizers(model, config.optimizer)
    assert not others
    positions = local_positions(outside.SEQ, mesh.cp_rank, degrees.cp)
    mine = slice(mesh.dp_rank * outside.ROWS // degrees.dp, (mesh.dp_rank + 1) * outside.ROWS // degrees.dp)
    rows = []
    for step in range(1, outside.STEPS + 1):
        tokens, labels = outside.batch(step)
        model.loss.valid_tokens = (labels != -100).sum().float()
        own_positions = positions.expand(len(tokens[mine]), -1)
        loss = model.forward_backward(tokens[mine][:, positions], labels[mine][:, positions], own_positions, last=True)
        model.finish_gradients()
        square = squared_gradient_norm(model.named_parameters(), model.aliases, degrees.stage, CPU)
        sums = torch.stack([square, loss.double() / degrees.tp])
        dist.all_reduce(sums)
        clip_gradients([optimizer], sums[0].sqrt(), outside.CLIP)
        rate = config.optimizer.lr * learning_rate_factor(config.lr_scheduler, step, config.training.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        rows.append((sums[1].item(), sums[0].sqrt().item(), rate))
    return rows


ONE, DP2, DP2_TP2, PP2_CP2 = Degrees(), Degrees(dp_shard=2), Degrees(dp_shard=2, tp=2), Degrees(pp=2, cp=2)


@pytest.mark.parametrize(
    ("shape", "degrees"),
    [
        ("cosine", ONE),
        ("wsd", ONE),
        pytest.param("wsd", DP2, marks=pytest.mark.long),
        pytest.param("cosine", DP2_TP2, marks=pytest.mark.long),
        pytest.param("wsd", DP2_TP2, marks=pytest.mark.long),
        pytest.param("wsd", PP2_CP2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_twenty_steps_equal_a_loop_of_transformers(shape: str, degrees: Degrees, ranks: Ranks):
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(outside.config())
    weights = {name.removeprefix("model."): p.detach().numpy().copy() for name, p in theirs.named_parameters()}
    expected = np.array(outside.train(theirs, shape))
    assert expected[-1, 0] < expected[0, 0] - 0.2  # it learns
    for rows in ranks.run(degrees.world, _train, degrees, shape, weights):
        np.testing.assert_allclose(np.array(rows), expected, rtol=1e-4)


def test_the_outside_imports_nothing_of_the_project():
    tree = ast.parse(Path(outside.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} == {"math", "torch", "transformers"}
