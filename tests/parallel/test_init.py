"""Initial weights: a function of names, whatever the layout; no rank generates much more than it holds."""

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from parity.layout import Case, build, build_config
from parity.single import MODELS, plain_model
from ranks import Ranks
from torch.distributed.tensor import DTensor

import dtron.models.init as init
import dtron.parallel.materialize as materialize
from dtron.mesh import Degrees

BATCH = {"training.local_batch_size": 8}  # no batch is run here; it must only divide
LAYOUTS = [
    Degrees(dp_shard=2),
    Degrees(dp_shard=8),  # rows do not divide: some ranks hold fewer, or none
    Degrees(tp=2),
    Degrees(dp_shard=3, tp=2),
    Degrees(dp_replicate=2, dp_shard=2, tp=2),
    Degrees(pp=2, dp_shard=2),
    Degrees(pp=2, cp=2, tp=2),
]


def _weights(case: Case) -> dict[str, Any]:
    _, model = build(case, build_config(case))
    with torch.no_grad():
        return {name: p.full_tensor().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", ["uneven", "tied"])
def test_every_layout_starts_from_the_same_weights(degrees: Degrees, model: str, ranks: Ranks):
    truth = {name: p.detach() for name, p in plain_model(MODELS[model]).named_parameters()}
    seen = set()
    for answer in ranks.run(degrees.world, _weights, Case("", degrees, BATCH, model)):
        for name, weight in answer.items():
            first = "embed_tokens.weight" if model == "tied" and name == "lm_head.weight" else name
            assert torch.equal(torch.from_numpy(weight), truth[first]), name
            seen.add(first)
    assert seen == set(truth)


def test_names_and_seeds_give_different_weights():
    shape = torch.Size([6, 4])
    make = {
        (name, seed): init.initial_rows(name, shape, 0, 6, 1.0, seed, torch.device("cpu"))
        for name in ("layers.0.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight")
        for seed in (0, 1)
    }
    values = list(make.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert init.initial_rows("norm.weight", shape, 2, 5, None, 0, torch.device("cpu")).tolist() == [[1.0] * 4] * 3


def test_any_rows_are_those_of_the_whole():
    with patch.object(init, "BLOCK_ELEMENTS", 12):  # 3 rows per block
        whole = init.initial_rows("w", torch.Size([11, 4]), 0, 11, 0.5, 0, torch.device("cpu"))
        for first in range(11):
            for last in range(first, 12):
                part = init.initial_rows("w", torch.Size([11, 4]), first, last, 0.5, 0, torch.device("cpu"))
                assert torch.equal(part, whole[first:last])


def _made(case: Case, block: int) -> list[tuple[str, int, int, int]]:
    """Name, elements made, elements held and columns of every matrix on this rank, with blocks of `block` elements."""
    made: Counter[str] = Counter()
    real_rows, real_normal = init.initial_rows, torch.Tensor.normal_
    current = ""

    def rows(name: str, *args: Any) -> Any:
        nonlocal current
        current = name
        return real_rows(name, *args)

    def normal(self: Any, *args: Any, **kwargs: Any) -> Any:
        made[current] += self.numel()
        return real_normal(self, *args, **kwargs)

    with (
        patch.object(init, "BLOCK_ELEMENTS", block),
        patch.object(materialize, "initial_rows", rows),
        patch.object(torch.Tensor, "normal_", normal),
    ):
        _, model = build(case, build_config(case))
    named = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor) and p.dim() == 2}
    return [(name, made[name], p.to_local().numel(), p.shape[1]) for name, p in named.items()]


@pytest.mark.parametrize("degrees", [Degrees(dp_shard=4), Degrees(dp_shard=4, tp=2)], ids=str)
def test_a_rank_makes_its_own_rows_and_two_blocks_more(degrees: Degrees, ranks: Ranks):
    block = 256
    for answer in ranks.run(degrees.world, _made, Case("", degrees, BATCH), block):
        for name, made, held, columns in answer:
            split_by_columns = degrees.tp if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            assert 0 < made <= held * split_by_columns + 2 * max(block, columns), name
