"""Muon: torch's own update to the last bit, on any layout; each matrix orthogonalized once; its keys."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from parity.layout import Case, build, build_config, local
from parity.single import MODELS, plain_model
from parity.table import FSDP2, FSDP2_TP2_EP4, FSDP4, HSDP_EP2, ONE, PP2_FSDP2
from ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from dtron.config import load
from dtron.config import optimizer as section
from dtron.config.optimizer import Optimizer
from dtron.errors import UserError
from dtron.mesh import Degrees
from dtron.optim import muon
from dtron.train.optimizer import block_matrices, build_optimizers
from dtron.train.resolve import resolve

MUON = Optimizer(name="Muon", lr=0.02, weight_decay=0.1, muon=section.Muon(adjust_lr_fn="original"))
SHAPES = [(64, 32), (32, 64), (48, 48), (5, 7)]


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(name.encode()) + 1000 * step)
    return torch.randn(shape, generator=g)


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_torchs_to_the_last_bit(adjust_lr_fn: Any, nesterov: bool) -> None:
    ours, theirs = ([0.02 * gradient("p", shape, 0) for shape in SHAPES] for _ in range(2))
    own = muon.Muon([{"params": ours, "weight_decay": 0.1}], 0.02, 0.9, nesterov, 4, adjust_lr_fn)
    torchs = torch.optim.Muon(theirs, 0.02, 0.1, 0.9, nesterov, ns_steps=4, adjust_lr_fn=adjust_lr_fn)
    for step in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = gradient("g", tuple(p.shape), step)
        own.step()
        torchs.step()
    assert all(map(torch.equal, ours, theirs))


def test_a_rank_may_hold_none_of_the_experts() -> None:
    """Five on four ranks are two, two, one and none."""
    p, other = torch.empty(0, 6, 4), gradient("p", (6, 4), 0)
    p.grad, other.grad, before = torch.empty_like(p), gradient("g", (6, 4), 0), other.clone()
    optimizer = muon.Muon([{"params": [p, other]}], 0.02)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].shape == p.shape == (0, 6, 4)
    assert not torch.equal(other, before)  # the matrices beside them go on


def test_clipping_and_skipping_inside() -> None:
    def train(inside: bool) -> tuple[Tensor, Tensor]:
        p = gradient("p", (6, 4), 0)
        optimizer = muon.Muon([{"params": [p]}], 0.02)
        for step in range(3):
            p.grad = gradient("g", (6, 4), step) * (1 if inside else 0.5)
            if inside:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(step == 1))
                p.grad += float("nan") if step == 1 else 0.0
            if inside or step != 1:
                optimizer.step()
        return p, optimizer.state[p]["momentum_buffer"]

    assert all(map(torch.equal, train(True), train(False)))


def step_on_layout(case: Case) -> tuple[list[str], int, int, int]:
    """Two steps on gradients that are functions of the name: what differs from torch's Muon on whole matrices.

    And how many matrices this rank orthogonalized, how many there are of its stages, and how many stages.
    """
    mesh, model = build(case, build_config(case))
    whole = dict(plain_model(MODELS[case.model]).named_parameters())
    matrices = {id(p) for part in model.parts for p in block_matrices(part)}
    named = [(name, p) for name, p in model.named_parameters() if id(p) in matrices]
    optimizers = [o for o in build_optimizers(model, MUON) if isinstance(o, muon.Muon)]
    wrong, experts = [], 0
    with patch.object(muon, "orthogonalize", Mock(wraps=muon.orthogonalize)) as done:
        for step in range(2):
            for name, p in named:
                full = gradient(name, tuple(p.shape), step)
                p.grad = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]
            for optimizer in optimizers:
                optimizer.step()
    for name, p in named:
        parts = whole[name].detach().unbind() if p.ndim == 3 else [whole[name].detach()]
        experts += len(parts)
        torchs = torch.optim.Muon([part.requires_grad_() for part in parts], 0.02, 0.1)
        for step in range(2):
            full = gradient(name, tuple(p.shape), step)
            for part, grad in zip(parts, full.unbind() if p.ndim == 3 else [full], strict=True):
                part.grad = grad
            torchs.step()
        expected = torch.stack(parts) if p.ndim == 3 else parts[0]
        shard = distribute_tensor(expected.detach(), p.device_mesh, p.placements, src_data_rank=None).to_local()  # type: ignore[attr-defined]
        if not torch.equal(local(p), shard):
            wrong.append(f"{name} {p.placements}: {(local(p) - shard).abs().max()}")  # type: ignore[attr-defined]
    return wrong, sum(len(call.args[0]) for call in done.call_args_list), 2 * experts, len(model.parts)


LAYOUTS = [
    Case("one", ONE, model="shallow"),
    Case("fsdp4 uneven", FSDP4, model="uneven"),
    Case("hsdp2x2 tp2", Degrees(1, 2, 2, 1, 2), model="shallow"),
    Case("hsdp2x2 ep2", HSDP_EP2, model="moe all"),
    Case("fsdp2 tp2 ep4", FSDP2_TP2_EP4, model="moe all"),
    Case("pp2 fsdp2", PP2_FSDP2, {"parallelism.pipeline_parallel_schedule": "ZBVZeroBubble"}),
    Case("fsdp8 ep1 tp2", Degrees(dp_shard=8, tp=2), model="moe", long=True),  # fewer experts than ranks
    Case("cp2 tp2 ep4", Degrees(cp=2, tp=2, ep=4), model="moe", long=True),
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.long] if case.long else []) for case in LAYOUTS]
)
def test_every_layout_takes_the_same_step_and_no_rank_repeats_another(case: Case, ranks: Ranks) -> None:
    results = ranks.run(case.degrees.world, step_on_layout, case)
    wrong, done, there, stages = zip(*results, strict=True)
    assert wrong == ([],) * case.degrees.world
    assert sum(done) == sum(there[:: case.degrees.stage])
    if MODELS[case.model].moe is None:
        assert max(done) - min(done) <= 2 * stages[0]  # one matrix per step and stage


def record_step(case: Case) -> str:
    """What a step does on one rank, in letters: Send, wait, Compute."""
    _, model = build(case, build_config(case))
    (optimizer,) = [o for o in build_optimizers(model, MUON) if isinstance(o, muon.Muon)]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    seen, send, compute = list[str](), dist.all_to_all_single, muon.orthogonalize

    def sent(*args: Any, **kwargs: Any) -> Any:
        seen.append("S")
        work = send(*args, **kwargs)
        return SimpleNamespace(wait=lambda: (seen.append("w"), work.wait()))

    def computed(matrices: Tensor, steps: int) -> Tensor:
        seen.append("C")
        return compute(matrices, steps)

    with patch.object(dist, "all_to_all_single", sent), patch.object(muon, "orthogonalize", computed):
        optimizer.step()
    return "".join(seen)


def record_step_of_small_buckets(case: Case) -> str:
    with patch.object(muon, "BUCKET_BYTES", 0):  # one round each
        return record_step(case)


def test_messages_are_sent_before_the_computation_that_they_overlap_with(ranks: Ranks) -> None:
    rounds = 7 * MODELS["small"].n_layers // 2
    expected = ""
    for i in range(rounds + 2):  # the shards of the next bucket; the present one, and its results; the one before
        expected += "S" * (i < rounds) + "wCS" * (1 <= i <= rounds) + "w" * (i >= 2)
    assert ranks.run(2, record_step_of_small_buckets, Case("", FSDP2)) == [expected] * 2


def test_matrices_of_one_shape_are_multiplied_together(ranks: Ranks) -> None:
    """Of all layers, and all experts of all layers."""
    shapes = {p.shape[-2:] for p in block_matrices(plain_model(MODELS["moe all"]))}
    assert ranks.run(1, record_step, Case("", ONE, model="moe all")) == [len(shapes) * "C"]


def test_matrices_of_blocks_are_muons_and_the_rest_is_adamws(ranks: Ranks) -> None:
    names, rates = ranks.run(1, names_and_rates)[0]
    assert [kind for kind, _ in names] == ["Muon", "AdamW"]
    assert all(name.startswith("layers.") and "norm" not in name for name in names[0][1])
    rest = names[1][1]
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight", "layers.0.input_layernorm.weight"} < set(rest)
    assert "layers.1.mlp.gate.e_score_correction_bias" not in (*names[0][1], *rest)
    assert "layers.1.mlp.experts.up_proj" in names[0][1]
    assert rates == [0.5, None]


def names_and_rates() -> tuple[list[tuple[str, list[str]]], list[float | None]]:
    case = Case("", ONE, model="moe all")
    _, model = build(case, build_config(case))
    named = {id(p): name for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, Optimizer(name="Muon", lr=0.1, muon=section.Muon(lr=0.5)))
    groups = [(type(o).__name__, o.param_groups) for o in optimizers]
    names = [(kind, [named[id(p)] for group in all_of for p in group["params"]]) for kind, all_of in groups]
    return names, [all_of[0].get("initial_lr") for _, all_of in groups]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--training.device cuda --training.enable_cpu_offload", "Muon and CPU offload are incompatible"),
        ("--optimizer.muon.momentum 0.999 --optimizer.state_dtype bfloat16", "muon.momentum 0.999: above 0.99"),
    ],
)
def test_what_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(load(["--training.device", "cpu", "--optimizer.name", "Muon", *arguments.split()]), 1)
