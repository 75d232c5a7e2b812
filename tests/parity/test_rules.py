"""Every rule that parity rests on is seen to matter: without it the same comparison fails."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from parity.layout import CPU, Case, build, build_config, local, local_batches, problems, train
from parity.single import CLIP, MODELS, OPTIMIZERS, batch, plain_model, single_process
from parity.table import (
    ALWAYS,
    CP2,
    CP2_EP2,
    FSDP2,
    FSDP2_EP2,
    HSDP,
    NEVER,
    ONE,
    PP2,
    PP2_FSDP2,
    TP2,
    WHOLE_LOGITS,
    budget,
    compiled,
    schedule,
)  # fmt: skip
from ranks import RankError, Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import dtron.parallel.compose as compose
import dtron.parallel.pipeline as pipeline
from dtron import compat, registry
from dtron import config as dtron_config
from dtron.errors import UserError
from dtron.models import llama
from dtron.models.loss import VocabularyShard
from dtron.models.moe import MixtureOfExperts
from dtron.models.rope import rope_table
from dtron.optim import muon
from dtron.parallel import expert, tensor
from dtron.parallel import loss as parallel_loss
from dtron.parallel.incompatible import check_compatible
from dtron.parallel.tensor import llama_plan
from dtron.train import forward
from dtron.train import step as step_module
from dtron.train.optimizer import squared_gradient_norm
from dtron.train.step import Step

Rule = Callable[[], contextlib.AbstractContextManager[Any]]
BROKEN: dict[str, Rule] = {}


def broken(rule: Rule) -> Rule:
    """Register a way to leave a rule out: a context manager, entered on every rank around the whole job."""
    BROKEN[rule.__name__] = rule
    return rule


def train_without(rule: str, case: Case, references: Any) -> Any:
    """The matrix's job without a rule."""
    with BROKEN[rule]():
        return train(case, references)


def without(ranks: Ranks, rule: str, case: Case) -> list[str]:
    """The differences from the single process, or the error of a rank."""
    names = case.optimizers if case.optimizers != tuple(OPTIMIZERS) else ("SGD",)
    expected = {name: single_process(case.model, name) for name in names}
    arrays = {name: {n: w.numpy() for n, w in run.weights.items()} for name, run in expected.items()}
    try:
        results = ranks.run(case.degrees.world, train_without, rule, case, arrays)
    except RankError as error:  # the others may wait for that rank: the pool has ended them
        return [str(error)]
    return problems(case, results, expected)


# --- the ways to leave a rule out


@broken
def nothing() -> Any:
    return contextlib.nullcontext()


@broken
@contextlib.contextmanager
def divide_factor() -> Iterator[None]:
    """FSDP's own averaging of gradients."""
    with (
        patch.object(FSDPModule, "set_gradient_divide_factor", lambda *a: None),
        patch.object(FSDPModule, "set_force_sum_reduction_for_comms", lambda *a: None),
    ):
        yield


@broken
def forced_sum() -> Any:
    return patch.object(FSDPModule, "set_force_sum_reduction_for_comms", lambda *a: None)


def _with_valid_tokens(count: Callable[[Step, Tensor], Tensor]) -> Any:
    return patch.object(Step, "_count_valid", lambda step, labels: (count(step, labels).float(), False))


@broken
def tokens_of_all_ranks() -> Any:
    """The mean over a rank's own tokens, averaged over ranks."""
    return _with_valid_tokens(lambda step, labels: (labels != -100).sum() * step.mesh.degrees.dp)


@broken
def tokens_of_all_batches() -> Any:
    """The mean over the first batch's tokens, as if all batches had as many."""

    def count(step: Step, labels: Tensor) -> Tensor:
        first, *others = labels.split(step.config.training.local_batch_size)
        return (first != -100).sum() * (1 + len(others))

    return _with_valid_tokens(count)


@broken
def unscaled_gradients() -> Any:
    """torch's default under pipeline parallel."""

    def scaling(name: str) -> Any:
        cls = get(name)

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            cls.__init__(self, *args, **{**kwargs, "scale_grads": True})

        return type(name, (cls,), {"__init__": init})

    get = pipeline.get_schedule_class
    return patch.object(pipeline, "get_schedule_class", scaling)


@broken
@contextlib.contextmanager
def global_positions() -> Iterator[None]:
    """Rotary positions that start at 0 on every context rank, of the right part of the sequence."""
    batches = forward.local_batches

    def restarted(*args: Any) -> Any:
        return [(x, y, torch.arange(x.size(1)).expand(len(x), -1)) for x, y, _ in batches(*args)]

    with patch.object(step_module, "local_batches", restarted):
        yield


def _plan(change: dict[str, Any]) -> Any:
    """The model families with another tensor-parallel plan; None leaves an entry out."""
    plan = {name: style for name, style in {**llama_plan(True), **change}.items() if style is not None}
    models = registry._REGISTRY["model"]
    ours = {name: spec for name, spec in models.items() if spec.tensor_plan is llama_plan}
    return patch.dict(models, {n: replace(spec, tensor_plan=lambda loss_parallel: plan) for n, spec in ours.items()})


@broken
def length_of_the_run() -> Any:
    """A rotary scaling by length that takes the positions of a rank for the whole sequence."""

    def of_positions(rope: Any, positions: Tensor) -> Any:
        return rope_table(replace(rope, scaling=replace(rope.scaling, length=None)), positions)

    return patch.object(llama, "rope_table", of_positions)


@broken
def norms_in_the_plan() -> Any:
    return _plan({"layers.*.input_layernorm": None})


class AddedByEveryRank(RowwiseParallel):
    """The bias of a matrix that is split by columns, added before the sum over the ranks."""

    def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        module = super()._apply(module, mesh)

        def forward(x: Tensor) -> Tensor:
            bias = DTensor.from_local(module.bias.to_local(), mesh, [Partial()], run_check=False)
            return F.linear(x, module.weight) + bias

        module.forward = forward
        return module


@broken
def bias_of_o_added_once() -> Any:
    return _plan({"layers.*.self_attn.o_proj": AddedByEveryRank(output_layouts=Shard(1))})


@broken
def bias_of_down_added_once() -> Any:
    return _plan({"layers.*.mlp.down_proj": AddedByEveryRank(output_layouts=Shard(1))})


@broken
def finished_embedding() -> Any:
    """The embedding by torch's own style, whose output is an asynchronous tensor."""
    return _plan({"embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))})


@broken
def sum_of_tied_gradients() -> Any:
    return patch.object(compose.ParallelModel, "finish_gradients", lambda self: None)


@broken
def tied_counted_once() -> Any:
    def count_all(parameters: Any, aliases: Any, *rest: Any) -> Tensor:
        return squared_gradient_norm(parameters, {}, *rest)

    return patch.object(step_module, "squared_gradient_norm", count_all)


@broken
def weights_gathered_again() -> Any:
    """Weights that an evaluation gathered stay, and the next forward uses them after the optimizer's step."""
    return patch.object(compose, "free_gathered_weights", lambda model: None)


@broken
def own_evaluation_schedule() -> Any:
    """Evaluation by the training schedule's eval()."""
    make = pipeline.Pipeline.__init__

    def shared(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self._evaluate = self._train

    return patch.object(pipeline.Pipeline, "__init__", shared)


@broken
def all_reduce_of_replicas_last() -> Any:
    """Replicas never all-reduced."""
    return patch.object(FSDPModule, "set_requires_all_reduce", lambda self, value: SET_ALL_REDUCE(self, False))


@broken
def sequence_counts_summed() -> Any:
    """The balance loss of each rank's part of a sequence."""
    return patch.object(expert, "_sum_over", lambda groups, counts: counts)


@broken
@contextlib.contextmanager
def router_gradients_summed() -> Iterator[None]:
    """A router under tensor parallel as if every rank had the same tokens."""
    with patch.object(expert, "ROUTER_GRADIENT", Replicate()):
        yield


@broken
def norms_of_own_heads() -> Any:
    """The norm over all heads taken over each rank's own."""

    def own(module: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], module.weight.to_local(), module.eps)

    return patch.object(tensor, "_norm_of_heads", own)


@broken
def activation_gradients_summed() -> Any:
    """Learned numbers of an activation as if every rank had the same hidden values."""
    return patch.object(tensor, "ACTIVATION_GRADIENT", Replicate())


@broken
def experts_summed() -> Any:
    """FSDP's own averaging, of the experts alone."""
    factor = FSDPModule.set_gradient_divide_factor

    def of_experts(self: Any, value: float) -> None:
        factor(self, 2.0 if any(isinstance(m, MixtureOfExperts) for m in self.modules()) else value)

    return patch.object(FSDPModule, "set_gradient_divide_factor", of_experts)


@broken
def order_of_gathered_keys() -> Any:
    """Keys of all ranks as if they came in the order of the sequence."""
    return patch.object(forward, "gathered_positions", lambda seq_len, size, head_tail: torch.arange(seq_len))


@broken
def sinks_in_the_plan() -> Any:
    return _plan({"layers.*.self_attn.sinks": None})


@broken
def kept_weights_are_freed() -> Any:
    """Weights that are kept for a step's microbatches are kept in the next step too."""
    return patch.object(FSDPModule, "set_reshard_after_backward", lambda self, value: SET_RESHARD(self, False))


@broken
def whole_matrices() -> Any:
    """Muon with each rank's shards as if they were matrices."""
    found = muon._matrices

    def own(*args: Any) -> list[Any]:
        return [(dataclasses.replace(m, shape=tuple(m.shard(m.p).shape[-2:])), (None, ())) for m, _ in found(*args)]

    return patch.object(muon, "_matrices", own)


def _shard(change: Callable[[VocabularyShard], VocabularyShard]) -> Any:
    return patch.object(parallel_loss, "vocabulary_shard", lambda weight: change(tensor.vocabulary_shard(weight)))


@broken
def shards_of_the_vocabulary_summed() -> Any:
    """The chunked loss of each rank's own logits."""
    return _shard(lambda shard: VocabularyShard(shard.first))


@broken
def first_row_of_the_shard() -> Any:
    """Labels looked up as if every rank had the vocabulary's first rows."""
    return _shard(lambda shard: replace(shard, first=0))


@broken
def gradients_of_shards_summed() -> Any:
    """The hidden states' gradient by each rank's own rows of the head."""
    return patch.object(tensor, "SHARD_GRADIENT", Replicate())


@broken
def size_of_meshes() -> Any:
    """A memory budget without the leave to take the DeviceMesh in a compiled block for nothing."""
    import torch._functorch.config as functorch

    def set_budget(value: float) -> None:
        functorch.activation_memory_budget = value
        if hasattr(functorch, "unsafe_treat_script_objects_as_zero_size"):
            functorch.unsafe_treat_script_objects_as_zero_size = False

    return patch.object(compat, "set_memory_budget", set_budget)


SET_ALL_REDUCE, SET_RESHARD = FSDPModule.set_requires_all_reduce, FSDPModule.set_reshard_after_backward

# rule -> the case that shows it, and a part of what is seen without it
SEEN = {
    "divide_factor": (Case("fsdp2", FSDP2), "norm"),
    "forced_sum": (Case("fsdp2", FSDP2), "PREMUL_SUM"),
    "tokens_of_all_ranks": (Case("fsdp2", FSDP2), "loss"),
    "tokens_of_all_batches": (Case("one", ONE, batches=4), "loss"),
    "unscaled_gradients": (Case("pp2", PP2), "norm"),
    "global_positions": (Case("cp2", CP2), "loss"),
    "length_of_the_run": (Case("cp2", CP2, model="longrope"), "loss"),
    "norms_in_the_plan": (Case("tp2", TP2), "leaves out layers.0.input_layernorm.weight"),
    "bias_of_o_added_once": (Case("tp2", TP2, model="biases"), "loss"),
    "bias_of_down_added_once": (Case("tp2", TP2, model="biases"), "loss"),
    "finished_embedding": (Case("tp2", TP2, compiled("aot_eager", "model")), "norm"),
    "sum_of_tied_gradients": (Case("pp2 V", PP2, schedule("ZBVZeroBubble"), "tied"), "norm"),
    "tied_counted_once": (Case("pp2", PP2, model="tied"), "norm"),
    "weights_gathered_again": (Case("fsdp2", FSDP2, evaluate=True), "evaluated loss"),
    "all_reduce_of_replicas_last": (Case("hsdp", HSDP), "norm"),
    "sequence_counts_summed": (Case("cp2 ep2", CP2_EP2, model="moe"), "norm"),
    "router_gradients_summed": (Case("tp2", TP2, model="moe"), "norm"),
    "order_of_gathered_keys": (Case("cp2", CP2, model="windows"), "loss"),
    "sinks_in_the_plan": (Case("tp2", TP2, model="scores"), "leaves out layers.0.self_attn.sinks.weight"),
    "norms_of_own_heads": (Case("tp2", TP2, model="apertus"), "loss"),
    "activation_gradients_summed": (Case("tp2", TP2, model="apertus"), "norm"),
    "kept_weights_are_freed": (Case("fsdp2", FSDP2, NEVER), "loss"),
    "whole_matrices": (Case("fsdp2", FSDP2, optimizers=("Muon",)), "weights"),
    "shards_of_the_vocabulary_summed": (Case("tp2", TP2), "loss"),
    "first_row_of_the_shard": (Case("tp2", TP2), "loss"),
    "gradients_of_shards_summed": (Case("tp2", TP2), "norm"),
    "size_of_meshes": (Case("tp2", TP2, {**compiled(), **budget(0.75)}), "Cannot compute the size of"),
    "experts_summed": (Case("fsdp2 ep2", FSDP2_EP2, model="moe"), "norm"),
}
# What torch 2.13 asks for and 2.11 does not: 2.11 compiles an asynchronous input correctly.
NOT_IN_2_11 = ("finished_embedding", "size_of_meshes")


@pytest.mark.parametrize("rule", SEEN)
def test_parity_fails_without(rule: str, ranks: Ranks):
    case, seen = SEEN[rule]
    found = without(ranks, rule, case)
    if rule in NOT_IN_2_11 and compat.TORCH < (2, 12):
        assert found == []
    else:
        assert any(seen in line for line in found), found


def test_the_breaking_harness_is_sound(ranks: Ranks):
    assert without(ranks, "nothing", Case("fsdp2", FSDP2)) == []


@pytest.mark.parametrize("name", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_trap_1_zero_bubble_with_freed_weights_is_wrong_and_refused(name: str, ranks: Ranks):
    case = Case(name, PP2_FSDP2, {**schedule(name), **ALWAYS})
    assert without(ranks, "nothing", case)
    with pytest.raises(UserError, match="reshard"):
        check_compatible(build_config(case))


def test_trap_6_scaled_gradients_are_wrong_with_accumulation(ranks: Ranks):
    assert any("norm" in line for line in without(ranks, "unscaled_gradients", Case("pp2", PP2, batches=2)))


@pytest.mark.parametrize("name", ["1F1B", "Interleaved1F1B"])
def test_trap_7_the_training_schedule_cannot_evaluate(name: str, ranks: Ranks):
    """On torch 2.11 it raises. V-shaped schedules, which hang, are left out; the matrix evaluates under every one."""
    assert without(ranks, "own_evaluation_schedule", Case(name, PP2_FSDP2, schedule(name), evaluate=True))


# --- rules that need a look at more than the comparison


def _schedule_facts(name: str, model_name: str) -> dict[str, Any]:
    """What traps 3, 5 and 8 are about, read from a bf16 model under pipeline parallel."""
    case = Case(name, PP2, schedule(name), model_name)
    config = dtron_config.replace(build_config(case), "training.mixed_precision_param", "bfloat16")
    mesh, model = build(case, config)
    assert model.pipeline
    model.loss.valid_tokens, (part,) = local_batches(0, case, mesh, True)
    loss = model.forward_backward(*part, last=True)
    parameters = dict(model.named_parameters())
    copies = [parameters.get(f"{n}.weight") for n in ("embed_tokens", "lm_head")]
    return {
        "deferred": [getattr(s, "_defer_pp_recv", False) for s in (model.pipeline._train, model.pipeline._evaluate)],
        "loss": loss.item(),
        "finite": all(bool(local(p.grad).isfinite().all()) for p in parameters.values() if p.grad is not None),
        "gradients": sum(p.grad is not None for p in parameters.values()),
        "parameters": len(parameters),
        "one tensor": copies[0] is not None and copies[0] is copies[1],
        "both": None not in copies,
    }


@pytest.mark.parametrize("name", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_traps_3_5_and_8_no_deferred_receives_bf16_metadata_and_no_shared_parameter(name: str, ranks: Ranks):
    facts = ranks.run(2, _schedule_facts, name, "tied")
    assert not any(any(f["deferred"]) for f in facts)
    assert all(f["finite"] and f["gradients"] == f["parameters"] for f in facts)
    assert sum(f["loss"] for f in facts) == pytest.approx(single_process("tied", "SGD").losses[0], rel=1e-2)
    assert not any(f["one tensor"] for f in facts)
    assert facts[0]["both"] == (name in ("ZBVZeroBubble", "DualPipeV"))  # first and last stage on one rank


def _torch_norm(case: Case) -> float:
    """The gradient norm by torch alone."""
    config = build_config(case)
    mesh, model = build(case, config)
    model.loss.valid_tokens, (part,) = local_batches(0, case, mesh, True)
    model.forward_backward(*part, last=True)
    norm = nn.utils.clip_grad_norm_([p for _, p in model.named_parameters()], CLIP)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def test_clip_grad_norm_alone_is_wrong_under_pipeline_parallel(ranks: Ranks):
    expected = single_process("small", "SGD").norms[0]
    for norm in ranks.run(2, _torch_norm, Case("pp2", PP2)):
        assert abs(norm - expected) > 0.05 * expected
    assert ranks.run(2, _torch_norm, Case("fsdp2", FSDP2))[0] == pytest.approx(expected, rel=1e-5)


def _norm_gradient(guarded: bool) -> tuple[Tensor, str]:
    """The gradient of a norm's weight with tp 2, and the global norm's error; unguarded: outside the plan."""

    def unguarded(model: nn.Module, tp: Any, plan: dict[str, Any]) -> None:
        parallelize_module(model, tp, {name: s for name, s in plan.items() if name != "layers.*.input_layernorm"})

    case = Case("tp2", TP2)
    with contextlib.nullcontext() if guarded else patch.object(compose, "apply_tensor_parallel", unguarded):
        mesh, model = build(case, build_config(case))
    model.loss.valid_tokens, (part,) = local_batches(0, case, mesh, True)
    model.forward_backward(*part, last=True)
    gradient = dict(model.named_parameters())["layers.0.input_layernorm.weight"].grad.full_tensor()
    try:
        squared_gradient_norm(model.named_parameters(), model.aliases, 2, CPU)
    except ValueError as error:
        return gradient.numpy(), str(error)
    return gradient.numpy(), ""


def test_a_norm_outside_the_plan_would_be_silently_wrong(ranks: Ranks):
    model = plain_model(MODELS["small"])
    tokens, labels = batch(0)
    (registry.cross_entropy(model(tokens), labels).sum() / (labels != -100).sum()).backward()
    truth = model.layers["0"].input_layernorm.weight.grad
    right, said = ranks.run(2, _norm_gradient, True)[0]
    assert torch.allclose(torch.from_numpy(right), truth, rtol=1e-4, atol=1e-6) and not said
    wrong, said = ranks.run(2, _norm_gradient, False)[0]
    assert not torch.allclose(torch.from_numpy(wrong), truth, rtol=0.05)
    assert "does not span" in said  # the second guard


def _manually_seeded(case: Case) -> Any:
    """The first block's weights when ranks fill DTensors from one seed, the usual way."""

    def seeded(parameters: Any, std: Any, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for _, p in parameters:
                local(p).normal_()

    with patch.object(compose, "initialize", seeded):
        _, model = build(case, build_config(case))
    return dict(model.named_parameters())["layers.0.mlp.up_proj.weight"].full_tensor().detach().numpy()


def test_manual_seed_gives_weights_that_depend_on_the_layout(ranks: Ranks):
    one, sharded = (torch.from_numpy(ranks.run(d.world, _manually_seeded, Case("", d))[0]) for d in (ONE, FSDP2))
    assert not torch.equal(one, sharded)
    assert torch.equal(*sharded.chunk(2))  # and ranks repeat each other's rows


def test_rotating_in_fp32_without_casting_back_fails_in_bf16():
    model = plain_model(MODELS["small"]).bfloat16()
    tokens, _ = batch(0)
    model(tokens)

    def uncast(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    with patch("dtron.models.llama.rotate", uncast), pytest.raises(RuntimeError, match="same dtype"):
        model(tokens)


def _compiled_loss_beside_other_groups(rule: str, others: int) -> float | str:
    """The compiled loss with tp 2 in processes that made `others` groups before: the names of later ones shift."""
    for _ in range(others):
        torch.distributed.new_group([0, 1])
    case = Case("", TP2, compiled("inductor", "loss") | WHOLE_LOGITS)
    with BROKEN[rule]():
        mesh, model = build(case, build_config(case))
        model.loss.valid_tokens, (part,) = local_batches(0, case, mesh, True)
        try:
            return model.forward_backward(*part, last=True).item()
        except RuntimeError as error:
            return str(error)


@broken
@contextlib.contextmanager
def no_autograd_cache() -> Iterator[None]:
    import torch._functorch.config as functorch

    with (
        patch.object(compat, "compile_without_autograd_cache", lambda: None),
        functorch.patch(enable_autograd_cache=True),
    ):
        yield


@pytest.mark.long
def test_the_autograd_cache_would_call_another_layouts_group(tmp_path, monkeypatch):
    """Wrong, silently or not, where the name of the group in the cached function now means another group."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    truth = pytest.approx(single_process("small", "SGD").losses[0], rel=1e-5)
    fresh = Ranks()  # forked with the empty cache folder
    try:
        for rule in ("nothing", "no_autograd_cache"):
            first, second = (fresh.run(2, _compiled_loss_beside_other_groups, rule, others)[0] for others in (0, 3))
            assert first == truth
            assert (second == truth) == (rule == "nothing")
    finally:
        fresh.close()
