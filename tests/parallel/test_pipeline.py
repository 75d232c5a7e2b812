"""The pipeline split, CSV schedules, and what a stage knows of its neighbours before the first microbatch."""

import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from parity.layout import CPU, Case, build_config, csv_file, local, local_batches, with_keys
from parity.single import MODELS, SEQ
from parity.table import CSV, PP2, PP2_FSDP2, PP2_TP2, QUARTERS, schedule
from ranks import RankError, Ranks, _end
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import dtron.parallel.compose as compose
from dtron import registry
from dtron.config.sections import Config, Parallelism, Training
from dtron.errors import UserError
from dtron.mesh import Degrees, Mesh
from dtron.models.families import FAMILIES
from dtron.models.llama import Llama
from dtron.models.spec import layers_of, meta_model
from dtron.parallel.compose import ParallelModel, parallelize, stage_plan
from dtron.parallel.pipeline import keep_modules, plan_stages, split_by_cost
from dtron.parallel.schedules import read_schedule, schedule_stages


def bottleneck(counts: list[int], block: float, first: float, last: float) -> float:
    costs = [count * block for count in counts]
    costs[0] += first
    costs[-1] += last
    return max(costs)


@pytest.mark.parametrize("n_layers, n_stages", [(4, 2), (5, 2), (9, 3), (10, 4), (12, 5), (8, 8)])
@pytest.mark.parametrize("first, last", [(0, 0), (0, 3.8), (1, 1), (2.5, 0.5)])
def test_the_split_minimises_the_bottleneck_stage(n_layers: int, n_stages: int, first: float, last: float):
    counts = split_by_cost([1.0] * n_layers, n_stages, first, last)
    assert sum(counts) == n_layers and len(counts) == n_stages and min(counts) >= 1
    splits = (
        [b - a for a, b in itertools.pairwise((0, *cuts, n_layers))]
        for cuts in itertools.combinations(range(1, n_layers), n_stages - 1)
    )
    assert bottleneck(counts, 1.0, first, last) == min(bottleneck(other, 1.0, first, last) for other in splits)


@pytest.mark.parametrize("layers", [[1, 3, 3, 3], [3, 3, 1, 1, 1, 1], [1, 2, 4, 8, 4], [5, 1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("n_stages", [2, 3, 4])
@pytest.mark.parametrize("first, last", [(0, 0), (0, 3.8), (2.5, 0.5)])
def test_layers_of_different_costs_are_split_by_them(layers: list[float], n_stages: int, first: float, last: float):
    def cost(counts: list[int]) -> float:
        parts = [sum(layers[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(len(counts))]
        return max(part + first * (i == 0) + last * (i == n_stages - 1) for i, part in enumerate(parts))

    counts = split_by_cost(layers, n_stages, first, last)
    assert sum(counts) == len(layers) and len(counts) == n_stages and min(counts) >= 1
    cuts = itertools.combinations(range(1, len(layers)), n_stages - 1)
    splits = [[b - a for a, b in itertools.pairwise((0, *cut, len(layers)))] for cut in cuts]
    assert cost(counts) == min(map(cost, splits))


def test_the_head_counts():
    """Llama-3.2-1B: the head costs as much as 3.8 layers, so the last of 4 stages holds fewer."""
    config = Config(training=Training(seq_len=4096), parallelism=Parallelism(pipeline_parallel_degree=4))
    spec = registry.look_up("model", "llama3.2", "")
    plan = stage_plan(spec, FAMILIES["llama3.2"]["1B"], config)
    layers = [[name for name in part if name.startswith("layers.")] for part in plan.modules]
    assert [len(part) for part in layers] == [5, 5, 5, 1]
    assert [name for part in layers for name in part] == [f"layers.{i}" for i in range(16)]
    assert plan.modules[0][0] == "embed_tokens" and plan.modules[-1][-2:] == ["norm", "lm_head"]


def test_layers_with_a_window_cost_less():
    """At 64 times the window the two full layers of eight cost most of the attention, and one stage each."""
    config = Config(training=Training(seq_len=2**20), parallelism=Parallelism(pipeline_parallel_degree=2))
    windows = (None, None, *[2**14] * 6)
    model = dataclasses.replace(MODELS["deep"], windows=windows)
    plan = stage_plan(registry.look_up("model", "llama3", ""), model, config)
    assert [sum("layers" in name for name in part) for part in plan.modules] == [1, 7]
    assert [sum("layers" in name for name in part) for part in small(config.parallelism).modules] == [4, 4]


def small(p: Parallelism, model: str = "deep"):
    return stage_plan(registry.look_up("model", "llama3", ""), MODELS[model], Config(parallelism=p))


def test_less_layers_override_the_costs():
    less = {"pipeline_parallel_first_stage_less_layers": 0.0, "pipeline_parallel_last_stage_less_layers": 4.0}
    p = Parallelism(pipeline_parallel_degree=2, **less)
    assert [sum("layers" in name for name in part) for part in small(p).modules] == [6, 2]


def test_layers_per_stage_and_module_names():
    looped = Parallelism(pipeline_parallel_degree=2, pipeline_parallel_schedule="Interleaved1F1B")
    assert schedule_stages(looped, 8)[0] == [(0, 2), (1, 3)]
    single_layers = dataclasses.replace(looped, pipeline_parallel_layers_per_stage=1)
    assert small(single_layers).of_rank == [(0, 2, 4, 6), (1, 3, 5, 7)]
    v_shaped = Parallelism(pipeline_parallel_degree=2, pipeline_parallel_schedule="ZBVZeroBubble")
    assert schedule_stages(v_shaped, 8)[0] == [(0, 3), (1, 2)]
    names = [["embed_tokens", "layers.0"], ["layers.1", "layers.2", "layers.3", "norm", "lm_head"]]
    assert small(Parallelism(pipeline_parallel_degree=2, module_fqns_per_model_part=names), "small").modules == names


def test_a_stage_holds_its_modules_under_their_names():
    whole = meta_model(registry.look_up("model", "llama3", ""), MODELS["small"])
    expected = [name for name, _ in whole.named_parameters() if name.startswith(("layers.2.", "layers.3.", "norm"))]
    stage = keep_modules(whole, ["layers.2", "layers.3", "norm"])
    assert [name for name, _ in stage.named_parameters()] == expected


def test_stages_in_sequence_are_the_model():
    config = MODELS["small"]
    tokens = torch.arange(12).view(2, 6)
    torch.manual_seed(0)
    whole = Llama(config)
    p = Parallelism(pipeline_parallel_degree=4)
    h = tokens
    for names in plan_stages(p, whole, [1.0] * len(layers_of(whole)), 1.0, 0.0).modules:
        stage = keep_modules(Llama(config), names)
        stage.load_state_dict({k: v for k, v in whole.state_dict().items() if k in stage.state_dict()})
        h = stage(h)
    torch.testing.assert_close(h, whole(tokens))


GOOD = "0F0,0F1,,0B0,0B1\n,1F0,1B0,1F1,1B1\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "2F0\n", "3 rows"),
        (GOOD.replace("1F1", "1X1"), "STAGE ACTION MICROBATCH"),
        (GOOD.replace("1F1", "hello"), "STAGE ACTION MICROBATCH"),
        (GOOD.replace("0B1", "0B0"), "0B0 appears twice"),
        (GOOD.replace(",1B1", ""), "every microbatch needs F"),
        (GOOD.replace(",1B1", ",1I1"), "every microbatch needs F"),
        (GOOD.replace("1F0", "0F5"), "on one row only"),
        (GOOD.replace("1", "2"), "stages are"),
    ],
)
def test_a_csv_schedule_that_cannot_run_is_refused(text: str, said: str, tmp_path: Path):
    path = tmp_path / "schedule.csv"
    path.write_text(GOOD)
    assert len(read_schedule(str(path), 2)) == 2
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_schedule(str(path), 2)
    assert str(path) in str(error.value)


def test_a_csv_schedule_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="cannot read"):
        read_schedule(str(tmp_path / "none.csv"), 2)


# --- the shape of hidden states: given, or found by the stages


Batch = tuple[Tensor, ...]


def build(case: Case, given: bool) -> tuple[ParallelModel, Batch, Batch]:
    """This rank's part of a model, a batch to train on and one of shorter sequences to evaluate.

    given: the stages are given the shape of the hidden states.
    """
    keys = {"training.mixed_precision_param": "bfloat16", "validation.seq_len": SEQ // 2}
    spec = replace(registry.look_up("model", "llama3", ""), standard_hidden_states=given)
    with csv_file(case, with_keys(build_config(case), keys)) as config:
        mesh = Mesh(case.degrees, "cpu")
        model = parallelize(spec, MODELS[case.model], config, mesh, CPU, registry.cross_entropy, [])
    model.loss.valid_tokens, (batch,) = local_batches(0, case, mesh, True)
    return model, batch, tuple(t[:, : SEQ // 2] for t in batch)


def results(case: Case, given: bool) -> dict[str, Any]:
    """Losses and gradients of an evaluation and a training batch."""
    model, batch, shorter = build(case, given)
    losses = {"evaluated": model.evaluate(*shorter).item(), "loss": model.forward_backward(*batch, last=True).item()}
    return losses | {name: local(p.grad).numpy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "case",
    [
        Case("1F1B", PP2, schedule("1F1B")),
        Case("Interleaved1F1B, tp", PP2_TP2, schedule("Interleaved1F1B")),
        Case("ZBVZeroBubble, fsdp", PP2_FSDP2, schedule("ZBVZeroBubble")),
        Case("DualPipeV", PP2, schedule("DualPipeV"), "tied"),
        Case("csv", PP2, QUARTERS, csv=CSV),
    ],
    ids=lambda case: case.name,
)
def test_given_shapes_train_as_found_ones_do(case: Case, ranks: Ranks):
    """In bf16, where a receive buffer of the wrong dtype would make NaN. Two stages on one rank too, also on 2.11."""
    found, given = (ranks.run(case.degrees.world, results, case, given) for given in (False, True))
    for one, other in zip(found, given, strict=True):
        assert one.keys() == other.keys() and len(one) > 10
        for name in one:
            assert (one[name] == other[name]).all() if hasattr(one[name], "all") else one[name] == other[name], name


def given_another_dtype(evaluate: bool) -> None:
    hidden_states = compose.hidden_states

    def wrong(*args: Any) -> Any:
        return tuple(hidden.float() for hidden in hidden_states(*args))

    with patch.object(compose, "hidden_states", wrong):
        model, batch, shorter = build(Case("1F1B", PP2), True)
    model.evaluate(*shorter) if evaluate else model.forward_backward(*batch, last=True)


@pytest.mark.parametrize("evaluate", [False, True])
def test_hidden_states_of_another_dtype_than_given_are_refused(evaluate: bool, ranks: Ranks):
    with pytest.raises(RankError, match=r"stage 0 returns torch.bfloat16 \(1, .*expects torch.float32 \(1, .*standard"):
        ranks.run(2, given_another_dtype, evaluate)


def messages_on_a_fake_group(rank: int, name: str) -> list[int]:
    """Point-to-point messages of a first and a second step and two evaluations, with no other rank there."""
    degrees = Degrees(pp=4, tp=2)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degrees.world)
    try:
        model, batch, shorter = build(Case(name, degrees, schedule(name), "deep"), True)
        train, evaluate = partial(model.forward_backward, *batch, last=True), partial(model.evaluate, *shorter)
        counts = []
        for step in (train, train, evaluate, evaluate):
            with patch.object(dist, "P2POp", side_effect=dist.P2POp) as messages:
                step()
            counts.append(messages.call_count)
        return counts
    finally:
        _end()


@pytest.fixture(scope="module")
def another_process() -> Iterator[ProcessPoolExecutor]:
    """Not forked: this one's threads of autograd and OpenMP would be missing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("name", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("rank", [0, 3, 7])
def test_one_rank_alone_runs_a_step(rank: int, name: str, another_process: ProcessPoolExecutor):
    """No message is needed to start: the first step sends what every step sends, as a dry run wants it."""
    first, second, evaluated, again = another_process.submit(messages_on_a_fake_group, rank, name).result()
    assert first == second > evaluated == again > 0
