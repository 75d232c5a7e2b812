"""Hold the planner's time model against published steps, by source, and with each source held out of the fit.

python scripts/bench/plan_error.py [--fit]

published_steps.csv, beside this file, has the steps: nanotron's benchmark_summary (Hugging Face's Ultra-Scale Playbook,
best layout per model and number of nodes; the MFU of its tied models with a pipeline, which counts the embedding twice,
is divided by 1.17 and 1.10), torchtitan's README (H100s of 500 W with slower memory), KempnerForge's README,
NVIDIA NeMo's performance summary, and table 4 of the Llama 3 paper (arXiv 2407.21783). power: share of the GPU's peak
that the cards have; memory_rate: in bytes per second, where it is not the table's.
"""

import argparse
import csv
import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from dtron.models.families import FAMILIES
from dtron.plan.hardware import HARDWARE
from dtron.plan.layout import Layout, Sizes
from dtron.plan.timemodel import COMPILED, EAGER, Constants, Style, predict

DATA = Path(__file__).with_name("published_steps.csv")
STYLES = {
    "eager": EAGER,
    "compiled": COMPILED,
    "nanotron": Style(
        30, 20, 10, 26, 40, fused_projections=True, fsdp=False, gradient_bytes=2, work=1.1, hop_s=1e-3, sync_s=8e-3
    ),
    "megatron": Style(18, 12, 6, 26, 26, attention=1.45, fused_projections=True, hidden_tp=0.5, fsdp=False),
    "meta": Style(18, 12, 6, 26, 26, attention=1.3, fused_projections=True, hidden_tp=0.5, fsdp=False),
}
NANOTRON = {  # dim, layers, heads, kv heads, head size, ffn, vocabulary, tied
    "1.3B": Sizes(2048, 16, 32, 32, 64, 8192, 131072, True),
    "3.6B": Sizes(3072, 28, 32, 32, 96, 8192, 131072, True),
    "8.9B": Sizes(4096, 32, 32, 32, 128, 14336, 131072),
    "80B": Sizes(8192, 80, 64, 64, 128, 28672, 131072),
}
# How far a constant may be from its default, as a share of it.
WIDTH = {"matmul": 0.06, "attention": 0.15, "memory": 0.12, "link": 0.25, "network": 0.25, "launch_s": 0.3}


def read() -> list[dict[str, Any]]:
    rows = []
    with DATA.open() as file:
        for row in csv.DictReader(file):
            family, flavor = row["model"].split("-", 1)
            sizes = NANOTRON[flavor] if family == "nanotron" else Sizes.of(FAMILIES[family][flavor])
            names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "microbatch", "microbatches", "virtual")
            layout = Layout(
                **{name: int(row[name]) for name in names}, recompute=row["recompute"], reshard=row["reshard"] == "1"
            )
            assert layout.gpus == int(row["gpus"]), row
            hardware = HARDWARE[row["hardware"]]
            rate = float(row["memory_rate"] or hardware.memory_rate)
            hardware = dataclasses.replace(hardware, flops=hardware.flops * float(row["power"]), memory_rate=rate)
            rows.append({**row, "sizes": sizes, "layout": layout, "hw": hardware})
    return rows


def log_error(row: dict[str, Any], c: Constants) -> float:
    """log(predicted / published)."""
    p = predict(row["sizes"], row["layout"], int(row["seq_len"]), row["hw"], STYLES[row["style"]], c)
    if row["tokens_per_s"]:
        return math.log(p.tokens_per_s / float(row["tokens_per_s"]))
    of_peak = p.mfu_causal if row["causal"] == "1" else p.mfu_full
    return math.log(of_peak * float(row["power"]) / float(row["mfu"]))


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


# Where the fit starts: prior knowledge of kernels and networks.
START = Constants(
    matmul=0.76, attention=0.42, memory=0.80, link=0.75, network=0.72, launch_s=6e-6, latency_s=15e-6, contention=0.05,
    overlap_tax=0.06, optimizer_s=2e-3,
)  # fmt: skip


def summary(rows: list[dict[str, Any]], c: Constants) -> str:
    errors = [math.exp(log_error(row, c)) - 1 for row in rows]
    median, mean = statistics.median(map(abs, errors)), statistics.mean(map(abs, errors))
    return f"{len(rows):3} steps: median {median:.1%}, mean {mean:.1%}, from {min(errors):+.0%} to {max(errors):+.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants, and show the error of sources held out")
    given = parser.parse_args()
    rows = read()
    c = fit(rows) if given.fit else Constants()
    if given.fit:
        print(c)
    print(f"{'all':12}{summary(rows, c)}")
    ranks = [
        np.argsort(np.argsort(values))
        for values in zip(*[(p + log_error(r, c), p) for r, p in map(_log_mfu, rows)], strict=True)
    ]
    print(f"rank correlation {np.corrcoef(*ranks)[0, 1]:.2f}")
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        print(f"{source:12}{summary(own, c)}")
        if given.fit:
            print(f"{'held out':12}{summary(own, fit([row for row in rows if row['source'] != source]))}")


def _log_mfu(row: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """A row and the logarithm of its published MFU."""
    if row["mfu"]:
        return row, math.log(float(row["mfu"]))
    flops = row["sizes"].flops_per_token(int(row["seq_len"]))
    return row, math.log(float(row["tokens_per_s"]) * flops / row["hw"].flops)


if __name__ == "__main__":
    main()
