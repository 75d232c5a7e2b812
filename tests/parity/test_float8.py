"""float8, emulated: every layout and recipe against one process that torchao converts; and what refuses it.

Equal but for roundings: where the last bit of a sum in fp32 decides which of two float8 numbers a value becomes, all
that follows differs a little. Of 42 runs below, of two steps each, 38 had none: their weights differ by at most 6e-6 of
the way they went (root mean squares of a matrix). The others had one, which moved a loss by up to 2e-6, a norm by
1.2e-3 and a matrix by 0.023 of its way. Hence these tolerances. With other scales it is 0.38 and more.
"""

from typing import Any

import numpy as np
import pytest
import torch
from parity.layout import CPU, Case, _train_once, build, build_config, with_keys
from parity.single import MODELS, in_float8, plain_model, single_process
from parity.table import CP2, FSDP2, FSDP2_TP2, ONE, OP, PP2, PP2_CP2, PP2_FSDP2, TP2, compiled, schedule
from ranks import Ranks, kept
from torch.distributed.tensor import DTensor

from dtron import registry
from dtron.config import Config
from dtron.errors import UserError
from dtron.mesh import Degrees, Mesh
from dtron.models.llama import Llama
from dtron.parallel.compose import parallelize
from dtron.parallel.float8 import check_float8, to_float8

pytest.importorskip("torchao")
LOSS, NORM, WEIGHT = 2e-4, 3e-3, 0.05
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def in_recipe(name: str, degrees: Degrees, recipe: str, **more: Any) -> Case:
    keys = {
        "model.converters": ["float8"],
        "quantize.linear.float8.recipe_name": recipe,
        "quantize.linear.float8.emulate": True,
    }
    return Case(f"{recipe} {name}", degrees, {**keys, **more.pop("keys", {})}, **more)


CASES = [
    in_recipe("fsdp2 tp2", FSDP2_TP2, "tensorwise"),
    in_recipe("pp2 cp2", PP2_CP2, "tensorwise"),
    in_recipe("fsdp2 tp2", FSDP2_TP2, "rowwise"),
    in_recipe("tp2 compiled", TP2, "rowwise", keys=compiled(), long=True),
    in_recipe("tp2", TP2, "rowwise_with_gw_hp"),
    in_recipe("fsdp2 by operation", FSDP2, "tensorwise", keys=OP),
]
LONG = [
    *[
        in_recipe(name, degrees, recipe, long=True)
        for recipe in RECIPES
        for name, degrees in (("one", ONE), ("fsdp2", FSDP2), ("tp2 only", TP2), ("cp2", CP2), ("pp2", PP2))
    ],
    in_recipe("pp2 fsdp2 Interleaved1F1B", PP2_FSDP2, "tensorwise", keys=schedule("Interleaved1F1B"), long=True),
    in_recipe("fsdp2 tp2 compiled", FSDP2_TP2, "tensorwise", keys=compiled(), long=True),
]


def train(case: Case, optimizer: str, plain_scales: bool = False) -> tuple[list[float], list[float], dict[str, Any]]:
    """The job of one rank: losses, norms and whole weights. plain_scales: as torchao rounds them by itself."""
    config = build_config(case)
    if plain_scales:
        mesh, spec = kept(Mesh, case.degrees, "cpu", False), registry.look_up("model", "llama3", "model.name")

        def convert(model: Any, _: Config) -> Any:
            in_float8(model, "tensorwise", powers_of_two=False)
            return model

        model = parallelize(spec, MODELS[case.model], config, mesh, CPU, registry.cross_entropy, [convert])
    else:
        mesh, model = build(case, config)
    trained = _train_once(case, config, mesh, model, optimizer)
    weights = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}
    plain = {name: getattr(weight, "_tensor", weight) for name, weight in weights.items()}  # of one gathered as float8
    return trained.losses, trained.norms, {name: weight.numpy() for name, weight in plain.items()}


def differences(case: Case, ranks: Ranks, optimizer: str, plain_scales: bool = False) -> tuple[float, float, float]:
    """Of the loss and the norm, relative, and of a matrix, in shares of the way it went: root mean squares."""
    recipe = "plain scales" if plain_scales else case.keys["quantize.linear.float8.recipe_name"]
    expected = single_process(case.model, optimizer, recipe=recipe)
    results = ranks.run(case.degrees.world, train, case, optimizer, plain_scales, share=case.degrees)
    (losses, norms, _), weights = results[0], {name: w for result in results for name, w in result[2].items()}
    assert weights.keys() == expected.weights.keys()
    off = off_its_way(weights, {name: w.numpy() for name, w in expected.weights.items()})
    relative = [
        max(abs(got - want) / want for got, want in zip(*pair, strict=True))
        for pair in ((losses, expected.losses), (norms, expected.norms))
    ]
    return relative[0], relative[1], off


def off_its_way(weights: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of a matrix in two runs, in shares of the way that it went."""
    start = {name: p.detach().numpy() for name, p in plain_model(MODELS["small"]).named_parameters()}
    pairs = [(weights[name] - w, w - start[name]) for name, w in expected.items()]
    return max(float(np.sqrt(np.square(off).mean() / np.square(way).mean())) for off, way in pairs)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.long] if c.long else []) for c in [*CASES, *LONG]]
)
def test_layout_equals_one_process(case: Case, optimizer: str, ranks: Ranks) -> None:
    loss, norm, weight = differences(case, ranks, optimizer)
    assert loss < LOSS and norm < NORM and weight < WEIGHT


def test_scales_that_are_no_powers_of_two_depend_on_the_layout(ranks: Ranks) -> None:
    assert differences(Case("fsdp2", FSDP2), ranks, "SGD", plain_scales=True)[2] > 5 * WEIGHT


GATHERED = {"quantize.linear.float8.enable_fsdp_float8_all_gather": True}


@pytest.mark.parametrize(
    "case",
    [
        in_recipe("fsdp2 gathered", FSDP2, "tensorwise", keys=GATHERED),
        pytest.param(in_recipe("pp2 cp2 gathered", PP2_CP2, "tensorwise", keys=GATHERED), marks=pytest.mark.long),
        pytest.param(
            in_recipe("fsdp2 gathered compiled", FSDP2, "tensorwise", keys={**GATHERED, **compiled()}),
            marks=pytest.mark.long,
        ),
    ],
    ids=lambda case: case.name,
)
def test_weights_gathered_as_float8_equal_those_of_one_rank(case: Case, ranks: Ranks) -> None:
    """Of whole weights, the scales are the same on every layout without tensor parallel."""
    alone = in_recipe("one gathered", ONE, "tensorwise", keys=GATHERED)
    expected = ranks.run(1, train, alone, "AdamW", share=alone.degrees)[0]
    results = ranks.run(case.degrees.world, train, case, "AdamW", share=case.degrees)
    weights = {name: w for result in results for name, w in result[2].items()}
    assert weights.keys() == expected[2].keys()
    assert off_its_way(weights, expected[2]) < WEIGHT
    assert results[0][0] == pytest.approx(expected[0], rel=LOSS)
    assert results[0][1] == pytest.approx(expected[1], rel=NORM)
    other = single_process("small", "AdamW", recipe="tensorwise")  # whose scales are powers of two
    assert abs(expected[0][0] - other.losses[0]) > 1e-6


def test_what_is_converted_and_that_it_matters() -> None:
    from torchao.float8.float8_linear import Float8Linear

    config = with_keys(Config(), {"quantize.linear.float8.emulate": True, "quantize.linear.float8.filter_fqns": ["k_"]})
    with torch.device("meta"):
        plain, moe = Llama(MODELS["small"]), Llama(MODELS["qwen3 moe"])
    names = [name for name, _ in plain.named_parameters()]
    model = to_float8(plain, config)
    assert [name for name, _ in model.named_parameters()] == names
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    matrices = (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    assert converted == {f"layers.{i}.{name}" for i in range(4) for name in matrices}
    attention = {
        name.split(".")[-1] for name, m in to_float8(moe, config).named_modules() if isinstance(m, Float8Linear)
    }
    assert attention == {"q_proj", "v_proj", "o_proj"}  # neither router nor experts
    in_fp32, in_float8_ = (single_process("small", "SGD", recipe=recipe).losses for recipe in ("", "tensorwise"))
    assert 1e-5 < abs(in_fp32[0] - in_float8_[0]) / in_fp32[0] < 5e-2


@pytest.mark.parametrize(
    ("keys", "tp", "said"),
    [
        ({"quantize.linear.float8.emulate": False}, 1, "the device is cpu; set quantize.linear.float8.emulate"),
        (
            {"quantize.linear.float8.filter_fqns": ["attention.wq"]},
            1,
            "'attention.wq' is in no name.*layers.0.self_attn",
        ),
        ({}, 4, "layers.0.self_attn.q_proj is 32 x 32 over 4 tensor-parallel ranks; add it to"),
        (
            {
                "quantize.linear.float8.enable_fsdp_float8_all_gather": True,
                "quantize.linear.float8.recipe_name": "rowwise",
            },
            1,
            "recipe_name is rowwise; set recipe_name tensorwise",
        ),
        ({"training.seq_len": 20, "training.local_batch_size": 2}, 1, "multiple of 16 tokens.*a microbatch has 40"),
    ],
)
def test_what_cannot_be_done_is_refused(keys: dict[str, Any], tp: int, said: str) -> None:
    base = {"model.converters": ["float8"], "training.device": "cpu", "quantize.linear.float8.emulate": True}
    config = with_keys(Config(), base | keys)

    def build_model() -> Llama:
        with torch.device("meta"):
            return Llama(MODELS["small"])

    with pytest.raises(UserError, match=said):
        check_float8(config, build_model, tp, 1)
    check_float8(with_keys(config, {"model.converters": []}), build_model, tp, 1)


@pytest.mark.parametrize(
    ("recipe", "capability", "need"),
    [("tensorwise", (8, 6), "8.9"), ("rowwise", (8, 9), "9.0"), ("tensorwise", (8, 9), "")],
)
def test_gpus_without_float8_are_refused(
    monkeypatch: pytest.MonkeyPatch, recipe: str, capability: tuple[int, int], need: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A40")
    keys = {"model.converters": ["float8"], "training.device": "cuda", "quantize.linear.float8.recipe_name": recipe}
    config = with_keys(Config(), keys)
    with torch.device("meta"):
        model = Llama(MODELS["small"])
    if need:
        with pytest.raises(UserError, match=f"{recipe} needs compute capability {need}.*A40 has"):
            check_float8(config, lambda: model, 1, 1)
    else:
        check_float8(config, lambda: model, 1, 1)
