"""Every case of the table equals the single process: loss, gradient norm and every weight, under SGD and AdamW."""

import pytest
import torch
from parity.layout import Case, build_config, problems, train, with_keys
from parity.single import MODELS, OPTIMIZERS, off, plain_model, single_process
from parity.table import CASES, LAYOUTS, REQUIRED, REQUIRED_LAYOUTS
from ranks import Ranks

from dtron import compat
from dtron.parallel.incompatible import FEATURES, check_compatible

# Cases of the same degrees in a row: they share a world, and what torch has worked out in it.
DEGREES = list(dict.fromkeys(case.degrees for case in CASES))
IN_ROWS = sorted(CASES, key=lambda case: DEGREES.index(case.degrees))


def marks_of(case: Case) -> list[pytest.MarkDecorator]:
    """Long ones, and those of experts that torch 2.11 cannot do, which `check_experts` refuses."""
    experts = MODELS[case.model].moe and (case.degrees.ep > 1 or case.degrees.tp > 1)
    newer = [name for name in ("zero-bubble schedule", "compiled blocks", "recompute by operation") if experts]
    needs_2_13 = any(FEATURES[name](build_config(case)) for name in newer) and not compat.has_units_of_two_meshes
    skipped = [pytest.mark.skip("experts beside these need torch 2.13")] if needs_2_13 else []
    return [*skipped, *([pytest.mark.long] if case.long else [])]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=marks_of(case)) for case in IN_ROWS])
def test_layout_equals_one_process(case: Case, ranks: Ranks):
    expected = {o: single_process(case.model, o, masked=case.masked) for o in case.optimizers}
    arrays = {name: {n: w.numpy() for n, w in run.weights.items()} for name, run in expected.items()}
    results = ranks.run(case.degrees.world, train, case, arrays, share=case.degrees)
    assert problems(case, results, expected) == []


def test_no_layout_and_no_optimizer_is_skipped():
    for degrees in REQUIRED_LAYOUTS:
        plain = [case for case in LAYOUTS if case.degrees == degrees and not case.keys and case.batches == 1]
        assert any(set(case.optimizers) == {"SGD", "AdamW"} for case in plain), degrees
        assert degrees.world > 16 or not all(case.long for case in plain), degrees


@pytest.mark.parametrize("feature", REQUIRED)
def test_every_feature_has_a_case(feature: str):
    cases = [case for case in CASES if REQUIRED[feature](case) and not case.long]
    cases = [case for case in cases if case.masked == feature.startswith("documents")]
    assert any(set(case.optimizers) == set(OPTIMIZERS) == {"SGD", "AdamW"} for case in cases)


def test_cases_have_names_of_their_own_and_are_legal():
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        config = build_config(case)
        reduce = "every_microbatch" if case.degrees.pp > 1 else "last_microbatch"
        device = "cuda" if config.training.enable_cpu_offload else "cpu"
        config = with_keys(config, {"parallelism.gradient_reduce": reduce, "training.device": device})
        check_compatible(config)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_noise_is_far_below_the_tolerance_and_the_weights_move_far_above_it(model: str, optimizer: str):
    one, four = single_process(model, optimizer), single_process(model, optimizer, microbatches=4)
    noise = max(off(four.weights[name], weight) for name, weight in one.weights.items())
    assert noise < 0.25
    assert min(one.gap, four.gap) > 5e-5 and one.counts == four.counts, "rounding could choose another expert"
    for name, start in plain_model(MODELS[model]).named_parameters():
        if name.endswith("e_score_correction_bias"):
            continue  # moves by steps of a fixed size
        moved = (one.weights[name] - start.detach()).abs() / (1e-4 * one.weights[name].abs() + 1e-6)
        assert moved.square().mean().sqrt() > 15, name


def test_the_usual_eps_lets_rounding_noise_through(monkeypatch):
    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    monkeypatch.setitem(OPTIMIZERS, "AdamW 1e-8", adam)
    runs = [[single_process(model, "AdamW 1e-8", n).weights for n in (1, 4)] for model in MODELS]
    assert max(off(four[name], one[name]) for one, four in runs for name in one) > 1


def test_a_difference_is_seen():
    weight = torch.tensor([1.0, -2.0])
    assert off(weight * (1 + 0.9e-4), weight) < 1 < off(weight * (1 + 1.1e-4), weight)
    assert off(torch.tensor([float("nan"), -2.0]), weight) == float("inf")
