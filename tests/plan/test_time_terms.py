"""Terms of the time model against figures that are computed by hand, or recorded."""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_peak import MODEL, setup_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtron.config import load
from dtron.models.families import FAMILIES
from dtron.models.moe import MixtureOfExperts, MoEConfig
from dtron.plan.dryrun import dry_run
from dtron.plan.float8 import MODULES, Float8, float8_of
from dtron.plan.hardware import HARDWARE, Constants
from dtron.plan.layout import Layout, Sizes
from dtron.plan.memory import closed_form_peak
from dtron.plan.muon import muon_s, newton_schulz_s
from dtron.plan.single import layout_of
from dtron.plan.timemodel import COMPILED, EAGER, predict, stage_times
from dtron.train.resolve import resolve

BENCH = Path(__file__).resolve().parents[2] / "scripts/bench/plan_error.py"
H100, C = HARDWARE["h100"], Constants()
LLAMA = Sizes.of(FAMILIES["llama3"]["8B"])
RATE, MEMORY = H100.flops * H100.matmul, H100.memory_rate * C.memory
WHOLE = Layout(dp_shard=8, recompute="none", loss_chunk=0)


def test_a_loss_in_chunks_moves_fewer_bytes_and_reads_the_heads_gradient_for_each() -> None:
    v, e, t = LLAMA.vocab, LLAMA.dim, 8192
    chunked = dataclasses.replace(WHOLE, loss_chunk=2048)
    whole, four, many = (
        predict(LLAMA, a, t, H100) for a in (WHOLE, chunked, dataclasses.replace(WHOLE, loss_chunk=128))
    )
    # 16 bytes for each logit; 8, and 14 for each parameter of the head and 4 for each hidden unit.
    assert whole.memory_bound_s - four.memory_bound_s == pytest.approx((8 * t * v - 14 * v * e - 4 * t * e) / MEMORY)
    assert four.matmul_s == pytest.approx(whole.matmul_s, rel=0.01), "2048 rows keep the matmuls busy"
    # With 128 rows, 64 times the head is read in bf16 for two products, and its gradient in fp32 read and written for
    # the third, which takes longer than the products.
    more = 64 * (2 + 2 + 8) * v * e / MEMORY - 6 * t * v * e / RATE
    assert many.matmul_s - four.matmul_s == pytest.approx(more, rel=0.05)
    assert many.memory_bound_s == four.memory_bound_s


def test_a_loss_in_chunks_makes_its_gradients_in_the_forward() -> None:
    whole, chunked = (
        stage_times(LLAMA, Layout(pp=4, dp_shard=2, microbatches=8, recompute="none", loss_chunk=n), 8192, H100)
        for n in (0, 2048)
    )
    head = 6 * 8192 * LLAMA.vocab * LLAMA.dim / RATE
    more, less = chunked.forward[-1] - whole.forward[-1], whole.inputs[-1] + whole.weights[-1]
    assert head / 2 < more < head and chunked.inputs[-1] + chunked.weights[-1] < less - head / 2


def test_muons_flops_and_state_are_those_of_a_recorded_step() -> None:
    keys = "--optimizer.name Muon --training.mixed_precision_param bfloat16 --training.seq_len 32"
    setup = setup_of(keys, 1)
    s, layout = Sizes.of(setup.model_config), layout_of(setup)
    assert layout.muon_steps == 5
    kv = s.kv_heads * s.head_size
    shapes = [(s.dim, s.dim)] * 2 + [(s.dim, kv)] * 2 + [(s.dim, s.ffn)] * 3
    flops = sum(5 * (4 * min(m) ** 2 * max(m) + 2 * min(m) ** 3) for m in shapes) * s.layers
    record = dry_run(setup, 0)
    assert record.flops["update"] == flops
    parts = record.peak.parts
    state = parts["parameters"] + parts["optimizer state"]
    assert closed_form_peak(s, layout, 32).state == pytest.approx(state, rel=0.02)
    adam = layout_of(setup_of(keys.replace("Muon", "AdamW"), 1))
    assert adam.muon_steps == 0 and closed_form_peak(s, adam, 32).state > 1.2 * state


def test_muon_deals_matrices_out_to_the_ranks() -> None:
    """Llama 3 8B on a rank and on 8: an eighth of the matrices, and each shard sent to its owner and back in bf16."""
    alone, eight = (Layout(dp_shard=n, recompute="none", muon_steps=5) for n in (1, 8))
    square, ffn = newton_schulz_s(4096, 4096, 5, H100, C), newton_schulz_s(14336, 4096, 5, H100, C)
    kv = newton_schulz_s(1024, 4096, 5, H100, C)
    assert square == pytest.approx(30 * 4096**3 / RATE, rel=0.15)
    assert ffn == pytest.approx(5 * (4 * 4096**2 * 14336 + 2 * 4096**3) / RATE, rel=0.15)
    matrices = LLAMA.attention_parameters + LLAMA.expert_parameters
    moved = 74 * 32 * matrices / MEMORY
    one = 32 * (2 * square + 2 * kv + 3 * ffn)
    assert muon_s(LLAMA, alone, H100, C) == pytest.approx(one + moved)
    sent = 2 * 2 * 32 * matrices / 8 * 7 / 8 / (H100.link_rate * C.link)
    # While a bucket is computed the next is sent, so that messages are hidden, but for those of one of the buckets.
    assert sent < (one + moved) / 8
    assert muon_s(LLAMA, eight, H100, C) == pytest.approx((one + moved) / 8 + sent / 55, rel=0.03)
    # On 1,024 ranks the 224 matrices are one round, as long as one of the largest.
    many = muon_s(LLAMA, Layout(dp_shard=1024, muon_steps=5), H100, C)
    assert ffn < many < ffn + one / 1024 + 0.02
    adam = predict(LLAMA, dataclasses.replace(eight, muon_steps=0), 8192, H100)
    muon = predict(LLAMA, eight, 8192, H100)
    assert muon.step_s - adam.step_s == pytest.approx(muon.optimizer_s - adam.optimizer_s)
    assert muon.optimizer_s > 4 * adam.optimizer_s


def test_many_small_experts_are_bound_by_the_host() -> None:
    """On each of 8 ranks 16 whole experts of 3 MiB per layer, orthogonalized one by one, by 21 kernels each."""
    s = Sizes.of(FAMILIES["qwen3_moe"]["30B-A3B"])
    whole = muon_s(s, Layout(dp_shard=8, ep=8, muon_steps=5), H100, C)
    assert 48 * 3 * 16 * 21 * C.launch_s < whole < 1.3 * 48 * 3 * 16 * 21 * C.launch_s
    # On 256 ranks each has parts of experts: these travel, and each has kernels of its own.
    assert muon_s(s, Layout(dp_shard=256, ep=8, muon_steps=5), H100, C) > 48 * 3 * 16 * 12 * C.launch_s


def test_float8_is_faster_by_its_products_less_its_casts() -> None:
    plain = dataclasses.replace(WHOLE, microbatch=2)
    bf16 = predict(LLAMA, plain, 8192, H100)
    float8 = predict(LLAMA, plain, 8192, H100, dataclasses.replace(COMPILED, float8=Float8(1.6)))
    matrices, t = 32 * (LLAMA.attention_parameters + LLAMA.expert_parameters), 2 * 8192
    assert bf16.matmul_s - float8.matmul_s == pytest.approx(6 * t * matrices / RATE * (1 - 1 / 1.6), rel=0.03)
    e, f, kv = 4096, 14336, 1024
    inputs, outputs = e + e + e + f, e + 2 * kv + e + 2 * f + e
    casts = 32 * t * (2 * 3 * inputs + 4 * outputs) + 2 * 3 * matrices
    assert float8.memory_bound_s - bf16.memory_bound_s == pytest.approx(casts / MEMORY)
    gathered = Float8(1.6, gathered=True)
    less = predict(LLAMA, plain, 8192, H100, dataclasses.replace(COMPILED, float8=gathered))
    assert float8.memory_bound_s - less.memory_bound_s == pytest.approx(2 * 3 * matrices / MEMORY)
    assert gathered.gathered_parameters(LLAMA) == matrices // 32 and Float8(1.6).gathered_parameters(LLAMA) == 0
    assert less.data_s < float8.data_s
    # The gradients of weights in bf16; two of seven layers left out.
    some = Float8(1.6, weights=False, modules=frozenset(MODULES) - {"mlp.up_proj", "mlp.down_proj"})
    fewer = predict(LLAMA, plain, 8192, H100, dataclasses.replace(COMPILED, float8=some))
    left = 32 * (LLAMA.attention_parameters + e * f)
    assert bf16.matmul_s - fewer.matmul_s == pytest.approx(4 * t * left / RATE * (1 - 1 / 1.6), rel=0.03)


def test_what_a_configuration_asks_of_float8() -> None:
    words = "--model.converters float8 --quantize.linear.float8.filter_fqns=k_proj,v_proj"
    section = "--quantize.linear.float8"
    for recipe, rate, weights in (
        ("tensorwise", 1.75, True),
        ("rowwise", 1.45, True),
        ("rowwise_with_gw_hp", 1.45, False),
    ):
        found = float8_of(load(f"{words} {section}.recipe_name {recipe}".split()))
        assert found and (found.rate, found.weights, found.gathered) == (rate, weights, False)
        assert frozenset(MODULES) - found.modules == {"self_attn.k_proj", "self_attn.v_proj"}
    assert (
        float8_of(load(["--training.steps", "1"])) is None
        and float8_of(load(f"{words} {section}.emulate".split())) is None
    )
    experts = Sizes.of(FAMILIES["qwen3_moe"]["30B-A3B"])
    assert Float8(2.0).faster(experts) == [2.0] * 4 + [1.0] * 3


def test_torchtitans_float8_is_predicted() -> None:
    """8B on 8 H100s of 500 W, tensorwise and gathered as float8: 6,667 tokens per second in bf16, 8,532 in float8."""
    bench = runpy.run_path(str(BENCH))
    (row,) = [r for r in bench["read"]() if r["source"] == "torchtitan" and r["tokens_per_s"] == "6667"]
    style = bench["style_of"](row) if "style_of" in bench else bench["STYLES"][row["style"]]
    float8 = dataclasses.replace(style, float8=Float8(1.75, gathered=True))
    before, after = (predict(row["sizes"], row["layout"], 8192, row["hw"], s).tokens_per_s for s in (style, float8))
    assert after == pytest.approx(8532, rel=0.08)
    assert after / before == pytest.approx(8532 / 6667, rel=0.05)


@pytest.mark.parametrize("gathered", [False, pytest.param(True, marks=pytest.mark.long)])
def test_float8_is_recorded(gathered: bool) -> None:
    """torchao's tensors around others are counted once; compiled, a block keeps less."""
    pytest.importorskip("torchao")
    keys = "--training.mixed_precision_param bfloat16 --training.seq_len 256 --training.local_batch_size 8"
    float8 = "--model.converters float8" + " --quantize.linear.float8.enable_fsdp_float8_all_gather" * gathered
    setups = [
        resolve(load(f"{MODEL} {keys} {more}".replace("--training.device cpu", "").split()), 2, "cuda")
        for more in ("", float8)
    ]
    plain, narrow = (dry_run(setup, 0) for setup in setups)
    for kind in ("parameters", "optimizer state"):
        assert narrow.peak.parts[kind] == plain.peak.parts[kind]
    assert narrow.peak.total < 1.2 * plain.peak.total
    assert narrow.flops["forward"] == plain.flops["forward"] and narrow.flops["backward"] == plain.flops["backward"]
    gathers = [
        sum(c.bytes for c in r.collectives if c.operation == "all_gather" and c.phase != "update")
        for r in (plain, narrow)
    ]
    blocks = 2 * 2 * 3 * sum(k * n for k, n in Float8(1.0)._widths(Sizes.of(setups[0].model_config)).values())
    assert gathers[0] - gathers[1] == pytest.approx(blocks / 2 * gathered, rel=0.01)


def test_rows_of_experts_are_read_and_written_as_the_operators_of_a_mixture_do() -> None:
    """Eager: all that a mixture's operators read and write beside its products and SwiGLU, forward and backward."""
    d, f, k, tokens = 512, 64, 8, 2048
    with torch.device("meta"):
        mixture = MixtureOfExperts(d, MoEConfig(n_experts=16, top_k=k, expert_dim=f), None).to(dtype=torch.bfloat16)
        x = torch.empty(1, tokens, d, dtype=torch.bfloat16, requires_grad=True)
        with Moved(at_least=tokens * k * d) as moved:
            out = mixture(x)
            torch.autograd.backward(out, torch.empty_like(out))
    assert moved.bytes / (tokens * k * d) == pytest.approx(3 * EAGER.rows, rel=0.1)
    s = Sizes.of(FAMILIES["qwen3_moe"]["30B-A3B"])
    alone, sharded = (
        predict(s, Layout(dp_shard=8, ep=ep, recompute="none"), 4096, H100).memory_bound_s for ep in (1, 8)
    )
    rows = 4096 * s.top_k * s.dim * s.layers
    assert sharded - alone == pytest.approx(3 * 8 * rows / MEMORY), "two sorts more, of rows read and written in bf16"
    with_rows, without = (
        predict(s, WHOLE, 4096, H100, dataclasses.replace(COMPILED, rows=n)).memory_bound_s for n in (6, 0)
    )
    assert with_rows - without == pytest.approx(3 * 6 * rows / MEMORY)


class Moved(TorchDispatchMode):
    """Bytes of the tensors of at least so many elements that operators read or write; views and products not."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least, self.bytes = at_least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or "grouped" in str(func) or "empty" in str(func)):
            for t in tree_leaves((args, kwargs, out)):
                if isinstance(t, torch.Tensor) and t.numel() >= self.at_least:
                    self.bytes += min(t.numel() * t.element_size(), t.untyped_storage().nbytes())  # not of expand
        return out
