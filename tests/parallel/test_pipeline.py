"""The pipeline split and CSV schedules: pure functions of the model and the configuration."""

import itertools
from pathlib import Path

import pytest
import torch
from parity.single import MODELS

from dtron import registry
from dtron.config.sections import Config, Parallelism
from dtron.errors import UserError
from dtron.models.families import FAMILIES
from dtron.models.llama import Llama
from dtron.models.spec import meta_model
from dtron.parallel.compose import stage_plan
from dtron.parallel.pipeline import keep_modules, plan_stages, split_by_cost
from dtron.parallel.schedules import read_schedule, schedule_stages


def dearest(counts: list[int], block: float, first: float, last: float) -> float:
    costs = [count * block for count in counts]
    costs[0] += first
    costs[-1] += last
    return max(costs)


@pytest.mark.parametrize("n_layers, n_stages", [(4, 2), (5, 2), (9, 3), (10, 4), (12, 5), (8, 8)])
@pytest.mark.parametrize("first, last", [(0, 0), (0, 3.8), (1, 1), (2.5, 0.5)])
def test_the_split_is_the_best_of_all(n_layers: int, n_stages: int, first: float, last: float):
    counts = split_by_cost(n_layers, n_stages, 1.0, first, last)
    assert sum(counts) == n_layers and len(counts) == n_stages and min(counts) >= 1
    every = (
        [b - a for a, b in itertools.pairwise((0, *cuts, n_layers))]
        for cuts in itertools.combinations(range(1, n_layers), n_stages - 1)
    )
    assert dearest(counts, 1.0, first, last) == min(dearest(other, 1.0, first, last) for other in every)


def test_the_head_weighs():
    """Llama-3.2-1B: the head costs as much as 3.8 layers, so the last of 4 stages holds fewer."""
    config = Config()
    config.training.seq_len = 4096
    config.parallelism.pipeline_parallel_degree = 4
    spec = registry.look_up("model", "llama3.2", "")
    plan = stage_plan(spec, FAMILIES["llama3.2"]["1B"], config)
    layers = [[name for name in part if name.startswith("layers.")] for part in plan.modules]
    assert [len(part) for part in layers] == [5, 5, 5, 1]
    assert [name for part in layers for name in part] == [f"layers.{i}" for i in range(16)]
    assert plan.modules[0][0] == "embed_tokens" and plan.modules[-1][-2:] == ["norm", "lm_head"]


def small(p: Parallelism, model: str = "deep"):
    config = Config()
    config.parallelism = p
    return stage_plan(registry.look_up("model", "llama3", ""), MODELS[model], config)


def test_less_layers_override_the_costs():
    p = Parallelism(pipeline_parallel_degree=2, pipeline_parallel_first_stage_less_layers=0.0)
    p.pipeline_parallel_last_stage_less_layers = 4.0
    assert [sum("layers" in name for name in part) for part in small(p).modules] == [6, 2]


def test_layers_a_stage_and_module_names():
    looped = Parallelism(pipeline_parallel_degree=2, pipeline_parallel_schedule="Interleaved1F1B")
    assert schedule_stages(looped, 8)[0] == [(0, 2), (1, 3)]
    looped.pipeline_parallel_layers_per_stage = 1
    assert small(looped).of_rank == [(0, 2, 4, 6), (1, 3, 5, 7)]
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
    for names in plan_stages(p, whole, 1.0, 1.0, 0.0).modules:
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
        (GOOD.replace("0B1", "0B0"), "0B0 stands twice"),
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
