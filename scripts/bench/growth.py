"""How a step's cost grows with ranks, sequence, layers and microbatches, in CPU seconds of all ranks on this machine.

    python scripts/bench/growth.py [--axes ranks seq_len layers microbatches] [--steps 2] [--rounds 3] [--out FOLDER]
        [--toy]

Each axis is varied alone from one base: a Llama of 4 layers and width 256, 512 tokens in a sequence, 16 sequences per
step. Along `ranks` the work of a step stays the same and is divided by FSDP, so that a flat line is a perfect split and
its slope is what every rank costs; `layers`, `seq_len` and `microbatches` are of one rank. Beside each point of `ranks`
stands its ratio to the plain loop of the same run. FOLDER gets growth.json and growth.png. CPU seconds, not the clock:
ranks share the machine's cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
AXES: dict[str, list[int]] = {
    "ranks": [1, 2, 4, 8, 16],
    "seq_len": [128, 256, 512, 1024, 2048],
    "layers": [2, 4, 8, 16],
    "microbatches": [1, 2, 4, 8, 16],
}
SEQUENCES, SEQ_LEN, LAYERS = 16, 512, 4
TOY = {"ranks": [1, 2], "seq_len": [32, 64], "layers": [1, 2], "microbatches": [1, 2]}


def command(axis: str, value: int, options: argparse.Namespace) -> list[str]:
    """step.py's of one point."""
    seq_len, sequences = (32, 4) if options.toy else (SEQ_LEN, SEQUENCES)
    width = "--model.dim 64 --model.n_heads 4 --model.n_kv_heads 2 --model.ffn_dim 128 --model.vocab_size 512"
    if not options.toy:
        width = "--model.dim 256 --model.n_heads 8 --model.n_kv_heads 4 --model.ffn_dim 1024 --model.vocab_size 4096"
    ranks = value if axis == "ranks" else 1
    keys = {
        "model.n_layers": value if axis == "layers" else 1 if options.toy else LAYERS,
        "training.seq_len": value if axis == "seq_len" else seq_len,
        "training.global_batch_size": sequences,
        "training.local_batch_size": sequences // (ranks * (value if axis == "microbatches" else 1)),
        "training.mixed_precision_param": "float32",
        "training.device": "cpu",
        "activation_checkpoint.mode": "none",
    }
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    bench = ["--bench.rounds", str(options.rounds), "--bench.steps", str(options.steps), "--bench.warmup", "1"]
    bench += [] if axis == "ranks" else ["--bench.only", "dtron"]
    words = [word for key, setting in keys.items() for word in (f"--{key}", str(setting))]
    return [*start, str(ROOT / "scripts" / "bench" / "step.py"), *bench, *width.split(), *words]


def point(axis: str, value: int, options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds per step of all ranks, and where the plain loop ran beside it their ratio."""
    done = subprocess.run(command(axis, value, options), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"error: {axis} {value}: {done.stderr.strip()[-2000:]}")
    result = json.loads(done.stdout)
    return {
        axis: value,
        "cpu_s": statistics.median(result["dtron"]["step_cpu_s"]),
        "cpu_over_plain": result["cpu_over_plain"],
        "max_memory_bytes": result["dtron"]["max_memory_bytes"],
    }


def slope(rows: list[dict[str, Any]], axis: str) -> tuple[float, float]:
    """(CPU seconds at 0, CPU seconds per unit of the axis) of the straight line with the least squares."""
    fit = statistics.linear_regression([row[axis] for row in rows], [row["cpu_s"] for row in rows])
    return fit.intercept, fit.slope


def draw(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """A panel for each axis, with its line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(4 * len(found), 3.4), squeeze=False, layout="constrained")
    for panel, (axis, rows) in zip(panels[0], found.items(), strict=True):
        values, (at_zero, per_unit) = [row[axis] for row in rows], slope(rows, axis)
        panel.plot(values, [row["cpu_s"] for row in rows], "o", label="measured")
        panel.plot(values, [at_zero + per_unit * v for v in values], "--", label=f"{at_zero:.3g} + {per_unit:.3g} x")
        panel.set(xlabel=axis, ylabel="CPU seconds per step, all ranks", ylim=(0, None))
        panel.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), metavar="AXIS")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps per round (2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds, of which the median is taken (3)")
    parser.add_argument("--out", type=Path, default=Path("growth"), metavar="FOLDER")
    parser.add_argument("--toy", action="store_true", help="two tiny points on each axis")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for axis in options.axes:
        found[axis] = []
        for value in (TOY if options.toy else AXES)[axis]:
            row = point(axis, value, options)
            found[axis].append(row)
            over = f", {row['cpu_over_plain']:.3f} of a plain loop" if row["cpu_over_plain"] else ""
            print(f"{axis} {value}: {row['cpu_s']:.3f} CPU-s per step{over}", flush=True)
        print("{}: {:.3g} + {:.3g} x CPU-s".format(axis, *slope(found[axis], axis)), flush=True)
    (options.out / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, options.out / "growth.png")


if __name__ == "__main__":
    main()
