"""What each recompute policy keeps, found by watching which operations the backward runs once more."""

import importlib
import inspect
import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from parity.layout import Case, build, build_config, local_batches
from parity.single import MODELS
from parity.table import EP2, FULL, OP
from ranks import Ranks
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dtron import compat
from dtron.models import moe
from dtron.models.families import FAMILIES
from dtron.models.llama import Llama, LlamaConfig
from dtron.models.moe import Experts, MoEConfig
from dtron.parallel import recompute
from dtron.parallel.recompute import apply_recompute, recomputed_flops_per_token


class Forwards(TorchDispatchMode):
    """Names of the projections whose forward product is computed, and `attention`, in order."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        linears = [(name.rpartition(".")[2], m) for name, m in block.named_modules()]
        self._names = {m.weight.data_ptr(): name for name, m in linears if isinstance(m, nn.Linear)}
        experts = [m for m in block.modules() if isinstance(m, Experts)]
        self._names |= {p.data_ptr(): f"experts.{name}" for m in experts for name, p in m.named_parameters()}
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is compat.cpu_flash_attention:
            self.seen.append("attention")
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            # The forward multiplies by the transposed weight, which begins at the same address and has its strides
            # swapped; the backward multiplies by the weight itself, or by no weight.
            weight = args[-1]
            if weight.data_ptr() in self._names and weight.stride(0) == 1:
                self.seen.append(self._names[weight.data_ptr()])
        if func is torch.ops.dtron.grouped_product.default:  # the backward's have names of their own
            self.seen.append(self._names[args[1].data_ptr()])
        return func(*args, **(kwargs or {}))


def watch(config: LlamaConfig, index: int, mode: str, option: str) -> tuple[list[str], list[str]]:
    """What a block computes in its forward, and again in its backward."""
    torch.manual_seed(0)
    block = Llama(config).layers[str(index)]
    x = torch.randn(2, 8, config.dim, requires_grad=True)
    angle = torch.zeros(2, 8, 1, config.head_size // 2)
    wrapped = apply_recompute(block, index, mode, option)
    with Forwards(block) as forward:
        out = wrapped(x, angle.cos(), angle.sin())
    with Forwards(block) as backward:
        out.sum().backward()
    return forward.seen, backward.seen


ATTENTION = ["q_proj", "k_proj", "v_proj", "attention", "o_proj"]
DENSE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
UNGATED = [*ATTENTION, "up_proj", "down_proj"]
MIXTURE = [*ATTENTION, "gate", "experts.gate_proj", "experts.up_proj", "experts.down_proj"]
SHARED = [*MIXTURE, "gate_proj", "up_proj", "down_proj"]

# (mode, option, index) -> what is computed again.
# The last product of a block, of which only the sum with the residual is needed, is never computed again; the experts'
# is, since what it gives is multiplied by the router's weight. Where a norm follows both o and down, both are needed.
EXPECTED = {
    ("none", "2", 0): "none",
    ("full", "2", 0): "all",
    ("full", "2", 1): "all",
    ("selective", "2", 0): "all",
    ("selective", "2", 1): "none",
    ("selective", "op", 0): "o",
    ("selective", "op", 1): "o",
}
_WITH_SHARED = replace(
    FAMILIES["qwen3_moe"]["debugmodel"], moe=MoEConfig(16, 4, 128, shared_dim=128, n_dense_layers=1, score="sigmoid")
)
# On CPU scores with a soft cap or sinks are computed by the formula, which has no kernel whose result could be kept.
_WITH_KERNEL: dict[str, Any] = {"attention_softcap": None, "attention_sinks": False}
_DEBUG_MODELS = {name: replace(flavors["debugmodel"], **_WITH_KERNEL) for name, flavors in FAMILIES.items()}
CONFIGS = _DEBUG_MODELS | {
    "shared expert": _WITH_SHARED,
    "biases": replace(FAMILIES["llama3"]["debugmodel"], qkv_bias=True, o_bias=True, mlp_bias=True),
}


def products(config: LlamaConfig, index: int) -> list[str]:
    if config.moe is None or index < config.moe.n_dense_layers:
        return DENSE if config.variant.gated else UNGATED
    return SHARED if config.moe.shared_dim else MIXTURE


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("mode", "option", "index"), EXPECTED)
def test_each_policy_recomputes_what_it_does_not_keep(name: str, mode: str, option: str, index: int):
    forward = products(CONFIGS[name], index)
    norm_follows = CONFIGS[name].variant.norms in ("after", "both")
    every = forward if forward is MIXTURE or norm_follows else forward[:-1]
    again = {"none": [], "all": every, "o": [] if norm_follows else ["o_proj"]}[EXPECTED[mode, option, index]]
    assert watch(CONFIGS[name], index, mode, option) == (forward, again)
    counted = recomputed_flops_per_token(Llama(CONFIGS[name]).layers[str(index)], index, 300.0, mode, option)
    assert counted == recomputed_flops(CONFIGS[name], index, again), "what HFU counts beside MFU"


def recomputed_flops(config: LlamaConfig, index: int, names: list[str]) -> float:
    """FLOPs per token of products and of an attention that takes 300 in forward and backward."""
    block = Llama(config).layers[str(index)]
    weights = {n.rpartition(".")[2]: m.weight.numel() for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    if experts := next((m for m in block.modules() if isinstance(m, Experts)), None):
        sizes = ((n, p.numel() // p.size(0)) for n, p in experts.named_parameters() if p.dim() == 3)
        weights |= {f"experts.{n}": size * experts.top_k for n, size in sizes}
    return sum(100.0 if name == "attention" else 2.0 * weights[name] for name in names)


@pytest.mark.parametrize("name", CONFIGS)
def test_by_operation_keeps_the_products_but_o_and_down_and_the_attention(name: str, monkeypatch: pytest.MonkeyPatch):
    kept: list[str] = []

    def contexts(policy: Any) -> Any:
        def recorded(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            answer = policy(ctx, op, *args, **kwargs)
            if answer == CheckpointPolicy.MUST_SAVE and not ctx.is_recompute:
                kept.append("attention" if op is compat.cpu_flash_attention else op.overloadpacket.__name__)
            return answer

        return create_selective_checkpoint_contexts(recorded)

    monkeypatch.setattr(recompute, "create_selective_checkpoint_contexts", contexts)
    qkv = ["addmm" if CONFIGS[name].qkv_bias else "mm"] * 3
    router = "addmm" if CONFIGS[name].moe and CONFIGS[name].moe.biases else "mm"
    after = {  # without o, and without down but of the experts
        id(DENSE): ["addmm" if CONFIGS[name].mlp_bias else "mm"] * 2,
        id(UNGATED): ["addmm" if CONFIGS[name].mlp_bias else "mm"],
        id(MIXTURE): [router, *["grouped_product"] * 3],
        id(SHARED): ["mm", *["grouped_product"] * 3, "mm", "mm"],
    }
    for index in (0, 1):
        kept.clear()
        watch(CONFIGS[name], index, "selective", "op")
        feed_forward = after[id(products(CONFIGS[name], index))]
        if CONFIGS[name].variant.norms in ("after", "both"):
            assert kept == [*qkv, "attention", "mm", *feed_forward, "mm"]
        else:
            assert kept == [*qkv, "attention", *feed_forward]


class AllToAlls(TorchDispatchMode):
    """How many all-to-alls run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func is torch.ops._c10d_functional.all_to_all_single.default
        return func(*args, **(kwargs or {}))


def all_to_alls(keys: dict[str, Any]) -> int:
    """Of a step on ep 2, per layer."""
    case = Case("ep2", EP2, keys, "moe", optimizers=("SGD",))
    mesh, model = build(case, config := build_config(case))
    valid, parts = local_batches(0, case, mesh, bool(config.parallelism.context_parallel_load_balancer))
    model.loss.valid_tokens = valid
    with AllToAlls() as mode:
        model.forward_backward(*parts[0], last=True)
    return mode.seen // MODELS["moe"].n_layers


def test_by_operation_repeats_no_all_to_all(ranks: Ranks):
    """Counts, rows and rows back, then two in the backward; full recomputation repeats the first three."""
    for keys, expected in (({}, 5), (OP, 5), (FULL, 8)):
        assert ranks.run(2, all_to_alls, keys) == [expected, expected]


class Products(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class ScaledProduct(torch.autograd.Function):
    """x @ weight.t() in float8, with the gradients of the product in bf16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        one, rows = torch.ones(()), x.flatten(0, -2).to(torch.float8_e4m3fn)
        out = torch._scaled_mm(rows, weight.to(torch.float8_e4m3fn).t(), one, one, out_dtype=torch.bfloat16)
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return g @ weight, g.flatten(0, -2).t() @ x.flatten(0, -2)


def watch_products(config: LlamaConfig, linear: Any = None) -> tuple[Counter[str], Counter[str]]:
    """Operations of a bf16 block's forward and backward under recompute by operation."""
    torch.manual_seed(0)
    block = Llama(config).layers["0"].bfloat16()
    for module in block.modules():
        if linear and isinstance(module, nn.Linear):
            module.forward = partial(lambda m, x: linear(x, m.weight), module)  # type: ignore[method-assign]
    x = torch.randn(2, 8, config.dim, dtype=torch.bfloat16, requires_grad=True)
    angle = torch.zeros(2, 8, 1, config.head_size // 2)
    wrapped = apply_recompute(block, 0, "selective", "op")
    with Products() as forward:
        out = wrapped(x, angle.cos(), angle.sin())
    with Products() as backward:
        out.sum().backward()
    return forward.seen, backward.seen


def test_by_operation_keeps_products_in_float8():
    forward, backward = watch_products(FAMILIES["llama3"]["debugmodel"], ScaledProduct.apply)
    assert forward["_scaled_mm"] == len(DENSE) - 1 and forward["mm"] == 0
    # `o` again, and `down`, whose Function gives its inputs away when it ends; two for each of seven matrices.
    assert backward["_scaled_mm"] == 2 and backward["mm"] == 14


def test_by_operation_keeps_grouped_products(monkeypatch: pytest.MonkeyPatch):
    """Those of a GPU, which are torch's own operation."""
    monkeypatch.setattr(
        moe, "grouped_product", lambda rows, w, ends: F.grouped_mm(rows, w.transpose(-2, -1), offs=ends)
    )
    forward, backward = watch_products(FAMILIES["qwen3_moe"]["debugmodel"])
    assert forward["_grouped_mm"] == 3
    assert backward["_grouped_mm"] == 6  # two for each of three matrices, and none again


# --- the memory budget

LLAMA_8B = LlamaConfig(64, 512, 1, 4, 1, 1792)  # the ratios of its dimensions


def compiled_block(budget: float, mode: str = "none", option: str = "2") -> tuple[float, int, int]:
    """Of a compiled block: bytes that it keeps per token and hidden unit, products and attentions in its backward."""
    torch._dynamo.reset()
    compat.set_memory_budget(budget)
    backwards: list[Counter[str]] = []

    def note(graph: Any, _: Any) -> Any:
        backwards.append(Counter(str(n.target) for n in graph.graph.nodes if n.op == "call_function"))
        return make_boxed_func(graph.forward)

    torch.manual_seed(0)
    block = Llama(LLAMA_8B).layers["0"].bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=note,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    run = torch.compile(apply_recompute(block, 0, mode, option), backend=backend, fullgraph=True)
    x = torch.randn(1, 128, 512, dtype=torch.bfloat16, requires_grad=True)
    angle = torch.zeros(1, 128, 1, 64)
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = t.nbytes
        return t

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = run(x, angle.cos(), angle.sin())
        out.sum().backward()
    finally:
        compat.set_memory_budget(1.0)
        torch._dynamo.reset()  # ranks are forked from here
    (seen,) = backwards
    return sum(kept.values()) / 128 / 512, seen["aten.mm.default"], seen[str(compat.cpu_flash_attention)]


def test_a_memory_budget_of_three_quarters_keeps_what_by_operation_keeps_and_repeats_no_product():
    everything, products, attentions = compiled_block(1.0)
    assert (products, attentions) == (14, 0)  # two for each of seven matrices
    by_operation = compiled_block(1.0, "selective", "op")
    assert by_operation[1:] == (15, 0)  # `o` again
    usual = compiled_block(0.75)
    assert usual[1:] == (14, 0) and usual[0] < 1.1 * by_operation[0] < 0.75 * everything
    nothing = compiled_block(0.0)
    assert nothing[1:] == (20, 1) and nothing[0] < 0.1 * everything  # all but `down`


def test_torchs_warning_of_operations_in_place_is_not_shown_by_each_rank():
    wrap = importlib.import_module("torch._higher_order_ops.wrap")
    text = "context_fn is passed to torch.utils.checkpoint"
    assert text in inspect.getsource(wrap), "torch says it otherwise"
    apply_recompute(Llama(LLAMA_8B).layers["0"], 0, "selective", "op")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    wrap.log.addHandler(handler)
    try:
        wrap.log.warning("Detected that %s under torch.compile.", text)
        wrap.log.warning("Detected that " + text)
        wrap.log.warning("another")
    finally:
        wrap.log.removeHandler(handler)
    assert seen[-1] == "another" and len(seen) == 1
