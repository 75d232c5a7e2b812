"""The time model against published steps, and rules of it against what a step does."""

import dataclasses
import math
import re
import runpy
import statistics
from pathlib import Path

import pytest
from test_peak import setup_of

from dtron.config import load
from dtron.models.families import FAMILIES
from dtron.plan.dryrun import dry_run
from dtron.plan.hardware import HARDWARE, Constants
from dtron.plan.layout import Layout, Sizes
from dtron.plan.timemodel import ASYNC_TP, COMPILED, EAGER, predict, style_of

BENCH = Path(__file__).resolve().parents[2] / "scripts/bench/plan_error.py"
H100, LLAMA = HARDWARE["h100"], Sizes.of(FAMILIES["llama3"]["8B"])


def test_published_steps_are_predicted() -> None:
    bench = runpy.run_path(str(BENCH))
    log_error, rows, c = bench["log_error"], bench["read"](), Constants()
    off = [abs(math.expm1(log_error(row, c))) for row in rows]
    assert len(off) == 131
    assert statistics.median(off) < 0.04 and statistics.mean(off) < 0.08
    assert bench["rank_correlation"](rows, c) > 0.9
    others = bench["read"](unseen=True)
    # Those of mosaic-long have an attention kernel that the model does not know.
    old = [row for row in others if row["source"] in ("mosaic-other", "megatron", "float8")]
    unseen = [abs(math.expm1(log_error(row, c))) for row in old]
    (float8,) = (bench["as_text"](row, c) for row in others if row["tokens_per_s"] == "8532")
    assert re.fullmatch(
        r"float8 llama3-8B 8 x h100 float8, dp_shard 8, 8192 tokens: published 8,532, predicted [\d,]+ \([+-]\d+%\)",
        float8,
    )
    assert len(unseen) == 98
    assert statistics.median(unseen) < 0.06 and statistics.mean(unseen) < 0.08
    # Held against the model when it was finished: NVIDIA's in float8. Experts are off by more.
    nemo, experts = (
        [abs(math.expm1(log_error(row, c))) for row in others if row["source"] == name]
        for name in ("nemo-fp8", "experts")
    )
    assert len(nemo) == 15 and statistics.median(nemo) < 0.07 and statistics.mean(nemo) < 0.08
    assert len(experts) == 7 and statistics.median(experts) < 0.22
    # FSDP on 128 to 512 H100s loses 2 to 10%, of which the latency of messages is most.
    large = [row for row in rows if row["source"] == "mosaic" and int(row["gpus"]) in (128, 512)]
    h100 = {(row["model"], row["gpus"]): log_error(row, c) for row in large if row["hardware"] == "h100"}
    assert len(h100) == 12
    assert all(abs(h100[model, "512"] - h100[model, "128"]) < 0.04 for model, _ in h100)


def test_a_ring_and_asynchronous_messages_are_priced() -> None:
    debug = "--job.config_file", str(BENCH.parents[2] / "configs/debug.toml")
    hidden = "--parallelism.enable_async_tensor_parallel", "--compile.enable", "--training.device", "cuda", "--tp", "2"
    style = style_of(load([*debug, *hidden]), H100)
    assert style.hidden_tp == ASYNC_TP and style_of(load(list(debug)), H100).hidden_tp == 0
    deep = dataclasses.replace(LLAMA, layers=64)
    waits, hides = (  # of 32 blocks, without the head's messages
        predict(deep, Layout(tp=8), 8192, H100, s).tensor_s - predict(LLAMA, Layout(tp=8), 8192, H100, s).tensor_s
        for s in (COMPILED, style)
    )
    assert hides == pytest.approx(waits * (1 - ASYNC_TP))
    one, ring = (predict(LLAMA, Layout(cp=cp), 32768 * cp, H100).attention_s for cp in (1, 4))
    assert ring == pytest.approx(4 * one * (1 + 2 * COMPILED.ring))


@pytest.mark.parametrize("matrices", [2, 3])
def test_fused_projections_are_as_many_products(matrices: int) -> None:
    """Those of a feed-forward without a gate, too."""
    s = dataclasses.replace(LLAMA, matrices=matrices)
    fused, apart = (
        predict(s, Layout(), 8192, H100, dataclasses.replace(COMPILED, fused_projections=flag)).matmul_s
        for flag in (True, False)
    )
    assert fused == pytest.approx(apart, rel=0.03)


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_stops_before_the_last_matmul_but_in_a_compiled_block(compiled: bool) -> None:
    """By the FLOPs of a recorded step."""
    keys = "--activation_checkpoint.mode full --training.seq_len 256 --training.mixed_precision_param bfloat16"
    setup = setup_of(f"{keys} {'--compile.enable' if compiled else ''}", 1)
    s = Sizes.of(setup.model_config)
    flops, plain = (dry_run(one, 0).flops for one in (setup, setup_of(keys.replace("full", "none"), 1)))
    tokens = setup.config.training.local_batch_size * 256
    forward = flops["forward"] - 3 * 2 * tokens * s.vocab * s.dim  # the loss in chunks makes its gradients, too
    again = flops.get("recompute", 0) + flops["backward"] - plain["backward"]
    last = 2 * tokens * s.ffn * s.dim * s.layers
    assert again == forward - (0 if compiled else last)
    layout = Layout(dp_shard=8, recompute="full")
    late = dataclasses.replace(EAGER, stops_early=False)
    saved = [predict(LLAMA, layout, 8192, H100, style).recompute_s for style in (late, EAGER)]
    assert saved[0] - saved[1] == pytest.approx(32 * 2 * 8192 * 4096 * 14336 / (H100.flops * H100.matmul), rel=0.05)
    assert not COMPILED.stops_early


def test_recomputation_by_operation_repeats_one_product() -> None:
    """Of a Llama's seven, by the FLOPs of a recorded step: `o`."""
    keys = (
        "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op --training.seq_len 256"
    )
    setup = setup_of(f"{keys} --training.mixed_precision_param bfloat16", 1)
    s, tokens = Sizes.of(setup.model_config), setup.config.training.local_batch_size * 256
    assert dry_run(setup, 0).flops["recompute"] == 2 * tokens * s.dim * s.heads * s.head_size * s.layers
    layout = Layout(dp_shard=8, recompute="op")
    none, one = (predict(LLAMA, layout, 8192, H100, dataclasses.replace(COMPILED, op_matmuls=x)) for x in (0.0, None))
    more = one.recompute_s - none.recompute_s
    assert more == pytest.approx(32 * 2 * 8192 * 4096**2 / (H100.flops * H100.matmul), rel=0.05)


def test_latency_of_the_messages_of_fsdp_grows_with_the_ranks() -> None:
    few, many = (
        predict(LLAMA, Layout(dp_shard=n, microbatch=4, recompute="none"), 8192, H100).data_s for n in (64, 1024)
    )
    # Three messages of each block, each of 960 hops more: 840 within nodes, 120 between them.
    assert many - few > 32 * 3 * (840 * 1.9e-6 + 120 * 4e-6)


def test_the_all_reduce_of_replicas_is_behind_the_backward() -> None:
    one, hsdp = (
        predict(LLAMA, Layout(dp_replicate=r, dp_shard=8, microbatch=4, recompute="none"), 8192, H100) for r in (1, 8)
    )
    block = 2 * 4 * LLAMA.block_parameters / 8 / 50e9  # as long as one takes at the network's peak, twice as many bytes
    ends = block * 2 * LLAMA.vocab * LLAMA.dim / LLAMA.block_parameters  # of the embedding and the head: not hidden
    assert block + ends < hsdp.data_s - one.data_s < 2 * (block + ends) < (32 * block + ends) / 2
