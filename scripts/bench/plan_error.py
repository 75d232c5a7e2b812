"""Hold the planner's time model against published steps, by source, and with each source held out of the fit.

python scripts/bench/plan_error.py [--fit] [--rank] [--rows]

published_steps.csv, beside this file, has the steps: nanotron's benchmark_summary (Hugging Face's Ultra-Scale Playbook,
best layout per model and number of nodes; the MFU of its tied models with a pipeline, which counts the embedding twice,
is divided by 1.17 and 1.10), torchtitan's benchmarks/llama3_h100_202412 (H100s of 500 W with slower memory), all rows
with 2,048 tokens in bf16 of MosaicML llm-foundry's scripts/train/benchmarking, the README of IBM's fms-fsdp (nodes with
400 Gbit/s of network for A100s, 800 for H100s), KempnerForge's README (pure bf16), NVIDIA NeMo's performance summary,
and table 4 of the Llama 3 paper (arXiv 2407.21783). power: what the cards may draw, as a share of the data sheet's;
memory_rate and network_rate: in bytes per second and GPU, where they are not the table's.

Not fitted, but a test of the others: mosaic-other, llm-foundry's steps with 512 to 8,192 tokens, mosaic-long, its steps
with more, whose attention is a slow kernel that the model does not know; megatron, those of
Megatron-LM with selective recomputation (table 5 of arXiv 2205.05198; how slow its attention is was guessed), and
float8, torchtitan's with torchao, tensor, pipeline and context parallel (the same file, and llama3-8b_h200_202506; the
first of them is one of those from which float8's rate is, those of cp 2 to 8 are where the ring's cost is from);
nemo-fp8, NVIDIA's performance summaries of NeMo 24.07 and Megatron-Bridge 25.11 on H100s, in float8, which were held
against the finished model once and changed nothing; experts, NeMo AutoModel's, those of Megatron's MoE Model Zoo
without FSDP, and torchtitan's Qwen3-30B on B200s (mlc-ai/pith-train, issue 79).
"""

import argparse
import csv
import dataclasses
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from dtron.models.families import FAMILIES
from dtron.plan.float8 import TENSORWISE, Float8
from dtron.plan.hardware import HARDWARE, Constants
from dtron.plan.layout import Layout, Sizes
from dtron.plan.timemodel import ASYNC_TP, COMPILED, EAGER, Style, predict

DATA = Path(__file__).with_name("published_steps.csv")
FLASH2 = 0.62  # FlashAttention 2's speed beside cuDNN's on Hopper
MEGATRON = Style(18, 12, 6, 26, 26, fused_projections=True, hidden_tp=0.5, fsdp=False, accumulated_bytes=0, rows=6)
STYLES = {
    "eager": dataclasses.replace(EAGER, attention=FLASH2, op_matmuls=0.28),
    "compiled": dataclasses.replace(COMPILED, attention=FLASH2, op_matmuls=0.28),
    "pure-bf16": dataclasses.replace(COMPILED, fsdp=False, accumulated_bytes=0, optimizer_bytes=16),
    "nanotron": Style(
        30, 20, 10, 26, 40, attention=FLASH2, fused_projections=True, hidden_tp=0.3, fsdp=False, gradient_bytes=2,
        messages=9, work=1.1, hop_s=1e-3, sync_s=8e-3,
    ),
    "megatron": MEGATRON,
    "meta": dataclasses.replace(MEGATRON, attention=0.9),
    # LayerNorm and GELU, no rotary embedding, a fused loss; everything in bf16, the gradients' sums too. All its work
    # takes 1.18 times as long, on H100s and A100s alike, which no other source's does.
    "mosaic": dataclasses.replace(
        EAGER, residual=20, heads=6, ffn=4, logits=14, kernels=30, attention=FLASH2, fused_projections=True,
        gradient_bytes=2, work=1.18,
    ),
    # Attention in separate kernels, which the backward runs again; sums of gradients made in matmuls.
    "selective": dataclasses.replace(MEGATRON, residual=24, ffn=6, attention=0.3 * FLASH2, hidden_tp=0.0),
    "fms": dataclasses.replace(COMPILED, attention=FLASH2, gradient_bytes=2),
    "float8": dataclasses.replace(
        COMPILED, attention=FLASH2, float8=Float8(TENSORWISE, gathered=True), op_matmuls=0.28
    ),
    "float8-plain": dataclasses.replace(COMPILED, attention=FLASH2, float8=Float8(TENSORWISE)),
    "float8-async": dataclasses.replace(
        COMPILED, attention=FLASH2, float8=Float8(TENSORWISE), hidden_tp=ASYNC_TP
    ),
    "megatron-fp8": dataclasses.replace(MEGATRON, fused_projections=False, float8=Float8(TENSORWISE)),
    "fsdp-fp8": dataclasses.replace(COMPILED, float8=Float8(TENSORWISE)),
    "fused": COMPILED,
    "fused-op": dataclasses.replace(COMPILED, op_matmuls=0.28),
}  # fmt: skip
NANOTRON = {  # dim, layers, heads, kv heads, head size, ffn, vocabulary, tied
    "1.3B": Sizes(2048, 16, 32, 32, 64, 8192, 131072, True),
    "3.6B": Sizes(3072, 28, 32, 32, 96, 8192, 131072, True),
    "8.9B": Sizes(4096, 32, 32, 32, 128, 14336, 131072),
    "80B": Sizes(8192, 80, 64, 64, 128, 28672, 131072),
}
MPT = {"125m": (768, 12, 12), "350m": (1024, 24, 16), "760m": (1536, 24, 12), "1b": (2048, 24, 16)} | {
    "3b": (2560, 32, 20), "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56), "70b": (8192, 80, 64)
}  # fmt: skip
GPT = {"5B": (4096, 24, 32), "20B": (6144, 44, 48)} | {
    "22B": (6144, 48, 64),
    "175B": (12288, 96, 96),
    "530B": (20480, 105, 128),
    "1T": (25600, 128, 160),
}
LLAMA2 = {
    "7b": Sizes(4096, 32, 32, 32, 128, 11008, 32000),
    "13b": Sizes(5120, 40, 40, 40, 128, 13824, 32000),
    "34b": Sizes(8192, 48, 64, 8, 128, 22016, 32000),
    "70b": Sizes(8192, 80, 64, 8, 128, 28672, 32000),
}
NEMOTRON = {
    "8B": Sizes(4096, 32, 32, 32, 128, 16384, 256000, matrices=2),
    "22B": Sizes(6144, 40, 48, 48, 128, 24576, 256000, matrices=2),
    "340B": Sizes(18432, 96, 96, 8, 192, 73728, 256000, matrices=2),
}
# How far a constant may be from its default, as a share of it.
WIDTH = {"memory": 0.12, "link": 0.25, "network": 0.25, "launch_s": 0.3}


def sizes_of(model: str) -> Sizes:
    """A model by its name in the file, family-flavor."""
    family, flavor = model.split("-", 1)
    if family in ("mpt", "gpt"):
        dim, layers, heads = (MPT | GPT)[flavor]
        vocab = 50368 if family == "mpt" else 51200
        return Sizes(dim, layers, heads, heads, dim // heads, 4 * dim, vocab, tied=True, matrices=2)
    own = {"nanotron": NANOTRON, "llama2": LLAMA2, "nemotron": NEMOTRON}
    return own[family][flavor] if family in own else Sizes.of(FAMILIES[family][flavor])


def style_of(row: dict[str, Any]) -> Style:
    """The shares of A100s are FlashAttention 2's already."""
    style = STYLES[row["style"]]
    if row["hardware"].startswith("a100"):
        return dataclasses.replace(style, attention=style.attention / FLASH2)
    return style


UNSEEN = ("mosaic-other", "mosaic-long", "megatron", "float8", "nemo-fp8", "experts")


def read(unseen: bool = False) -> list[dict[str, Any]]:
    """The steps to which the constants are fitted; unseen: those that nobody has looked at for it."""
    rows = []
    with DATA.open() as file:
        for row in csv.DictReader(file):
            if (row["source"] in UNSEEN) != unseen:
                continue
            names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "microbatch", "microbatches", "virtual")
            layout = Layout(
                **{name: int(row[name]) for name in names},
                ep=int(row["ep"] or 1),
                recompute=row["recompute"],
                reshard=row["reshard"] == "1",
                loss_chunk=0,
            )
            assert layout.gpus == int(row["gpus"]), row
            hardware = HARDWARE[row["hardware"]]
            rates = {name: float(row[name]) for name in ("power", "memory_rate", "network_rate") if row[name]}
            hardware = dataclasses.replace(hardware, **rates)
            rows.append({**row, "sizes": sizes_of(row["model"]), "layout": layout, "hw": hardware})
    return rows


def log_error(row: dict[str, Any], c: Constants) -> float:
    """log(predicted / published)."""
    p = predict(row["sizes"], row["layout"], int(row["seq_len"]), row["hw"], style_of(row), c)
    if row["tokens_per_s"]:
        return math.log(p.tokens_per_s / float(row["tokens_per_s"]))
    return math.log((p.mfu_causal if row["causal"] == "1" else p.mfu_full) / float(row["mfu"]))


def fit(rows: list[dict[str, Any]], rounds: int = 8) -> Constants:
    """Gauss-Newton on the log errors, robust, each source weighing as its root; drawn to the defaults."""
    names = [field.name for field in dataclasses.fields(Constants)]
    widths = [WIDTH.get(name, 0.8) for name in names]
    weights = np.array([sum(r["source"] == row["source"] for r in rows) ** -0.5 for row in rows])
    x = np.zeros(len(names))

    def constants(x: Any) -> Constants:
        start = dataclasses.asdict(START)
        return Constants(**{n: start[n] * math.exp(v * w) for n, v, w in zip(names, x, widths, strict=True)})

    for _ in range(rounds):
        errors = np.array([log_error(row, constants(x)) for row in rows])
        steps = 0.05 * np.eye(len(names))
        slopes = np.array([[log_error(row, constants(x + step)) for step in steps] for row in rows])
        slopes = (slopes - errors[:, None]) / 0.05
        w = (weights / np.maximum(1, np.abs(errors) / 0.12) ** 0.75 / 0.04)[:, None]
        a = (slopes * w**2).T @ slopes + np.eye(len(names))
        x = np.clip(x - 0.7 * np.linalg.solve(a, (slopes * w**2).T @ errors + x), -3, 3)
    return constants(x)


OUTLIER = 0.5  # error of steps that the model does not explain


# Where the fit starts: prior knowledge of kernels and networks.
START = Constants(
    memory=0.80, link=0.75, network=0.72, launch_s=6e-6, contention=0.05, overlap_tax=0.06, optimizer_s=2e-3
)


def summary(rows: list[dict[str, Any]], c: Constants) -> str:
    errors = [math.exp(log_error(row, c)) - 1 for row in rows]
    median, mean = statistics.median(map(abs, errors)), statistics.mean(map(abs, errors))
    return f"{len(rows):3} steps: median {median:.1%}, mean {mean:.1%}, from {min(errors):+.0%} to {max(errors):+.0%}"


def as_text(row: dict[str, Any], c: Constants) -> str:
    """One step: what it is, its published tokens per second and GPU, and by how much the prediction is off."""
    degrees = " ".join(
        f"{name} {row[name]}" for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp") if row[name] != "1"
    )
    flops = row["sizes"].flops_per_token(int(row["seq_len"]), row["causal"] == "1")
    rate = float(row["tokens_per_s"] or float(row["mfu"] or 0) * row["hw"].flops / flops)
    what = f"{row['source']} {row['model']} {row['gpus']} x {row['hardware']} {row['style']}, {degrees or 'one GPU'}, "
    off = math.exp(log_error(row, c))
    return f"{what}{row['seq_len']} tokens: published {rate:,.0f}, predicted {rate * off:,.0f} ({off - 1:+.0%})"


def rank_correlation(rows: list[dict[str, Any]], c: Constants) -> float:
    """Spearman's, of the published MFU and the predicted one."""
    pairs = [(p + log_error(row, c), p) for row, p in map(_log_mfu, rows)]
    places = [np.argsort(np.argsort(values)) for values in zip(*pairs, strict=True)]
    return float(np.corrcoef(*places)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants, and show the error of sources held out")
    parser.add_argument("--rank", action="store_true", help="rank all layouts of nanotron's 26 cases")
    parser.add_argument("--rows", action="store_true", help="show each step, its published and its predicted tokens/s")
    given = parser.parse_args()
    rows = read()
    c = fit(rows) if given.fit else Constants()
    if given.fit:
        print(c)
    print(f"{'all':12}{summary(rows, c)}")
    near = [row for row in rows if abs(math.exp(log_error(row, c)) - 1) < OUTLIER]
    print(f"{'but outliers':12}{summary(near, c)}")
    for text, of in (("rank correlation", rows), ("but outliers", near)):
        print(f"{text} {rank_correlation(of, c):.2f}")
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        print(f"{source:12}{summary(own, c)}")
        if given.fit:
            print(f"{'held out':12}{summary(own, fit([row for row in rows if row['source'] != source]))}")

    print("not fitted:")
    for source in UNSEEN:
        print(f"{source:12}{summary([row for row in read(unseen=True) if row['source'] == source], c)}")
    if given.rows:
        print("\n".join(as_text(row, c) for row in [*rows, *read(unseen=True)]))
    if given.rank:
        print(rank_nanotron([row for row in rows if row["source"] == "nanotron"], c))


def nanotron_memory(s: Sizes, a: Layout) -> float:
    """Bytes that nanotron's benchmark holds: fp32 sums of gradients, and AdamW's state over dp with ZeRO-1."""
    block = 2 * (2 * s.dim / a.tp + 2 * s.dim + 4 * s.dim / a.tp + 4 * s.ffn / a.tp) + 4 * (2 + s.heads) / a.tp
    layers, tokens = -(-s.layers // a.pp), a.tokens(4096)
    held = (layers * s.block_parameters + s.vocab * s.dim * (1 if a.pp > 1 or s.tied else 2)) / a.tp
    logits = tokens * s.vocab / a.tp * 12
    live = min(a.microbatches, a.pp) * layers * block * tokens
    first, last = live + (logits if a.pp == 1 else 0.0), layers * block * tokens + logits
    return held * (6 + 12 / a.dp_shard) + max(first, last)


def rank_nanotron(rows: list[dict[str, Any]], c: Constants) -> str:
    """Where nanotron's best layouts stand among all that fit, by its own formula of the MFU; and what is predicted to
    be lost by taking its best in place of ours."""
    places, regrets = [], []
    for row in rows:
        s, best = row["sizes"], row["layout"]
        inflated = {"1.3B": 1.17, "3.6B": 1.10}.get(row["model"].split("-")[1], 1.0)
        found = {}
        for tp, pp, zero in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32), (0, 1)):
            dp = best.gpus // (tp * pp)
            if best.gpus % (tp * pp) or pp > s.layers or 256 % dp or (dp == 1 and zero):
                continue
            for microbatch in (1, 2, 4, 8, 16):
                if 256 % (dp * microbatch):
                    continue
                degrees = (pp, 1, dp, 1, tp) if zero else (pp, dp, 1, 1, tp)
                a = Layout(
                    *degrees, microbatch=microbatch, microbatches=256 // dp // microbatch, recompute="none",
                    reshard=False, loss_chunk=0,
                )  # fmt: skip
                if nanotron_memory(s, a) <= 76e9:
                    rate = predict(s, a, 4096, row["hw"], STYLES["nanotron"], c).tokens_per_s
                    found[a] = rate * (inflated if pp > 1 else 1.0)
        order = sorted(found, key=lambda a: -found[a])
        places.append(order.index(best) if best in found else len(found))
        regrets.append(1 - found.get(best, 0.0) / found[order[0]])
    top = [sum(place < n for place in places) for n in (3, 10)]
    return (
        f"nanotron's best is among our first 3 in {top[0]} of {len(rows)} cases, among our first 10 in {top[1]}; "
        f"by prediction it is {statistics.median(regrets):.1%} slower than our first in the median, "
        f"{max(regrets):.0%} at most"
    )


def _log_mfu(row: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """A row and the logarithm of its published MFU."""
    if row["mfu"]:
        return row, math.log(float(row["mfu"]))
    flops = row["sizes"].flops_per_token(int(row["seq_len"]))
    return row, math.log(float(row["tokens_per_s"]) * flops / row["hw"].flops)


if __name__ == "__main__":
    main()
