"""Everything that one GPU can answer, in under ten minutes: constants, then whole training steps, most wanted first.

    python scripts/bench/gpu.py [--seconds 570] [--out FOLDER] [--only PART] [--list] [--toy]

Each case is a process of its own with a time limit, as one line of step.py or another bench; its row is printed and
kept in FOLDER/results.json when it ends, so that a run that is cut off has all rows until then. A case that does not
fit into what is left of --seconds is left out, and so is one that needs more memory than the GPU has. The last part
predicts each case by `dtron plan` from the rates that preflight measured on this GPU. FOLDER/gpu.log has all output.

--only runs the cases whose names contain PART. --toy runs every case on a CPU at a tiny size, to see that it runs.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GIB = 2**30

SMOLLM = "--model.name smollm --model.flavor 1.7B --training.seq_len 2048 --training.local_batch_size 8"
LLAMA = "--model.name llama3 --model.flavor 8B --training.seq_len 4096 --training.local_batch_size 2"
LONG = "--model.name llama3 --model.flavor 8B --training.seq_len 8192 --training.local_batch_size 1"
PART_OF_8B = f"{LLAMA} --model.n_layers 12"
COMPILED = "--compile.enable"
WHOLE_LOGITS = "--training.loss_chunk_tokens 0"
BUDGET = "--activation_checkpoint.mode memory_budget --activation_checkpoint.memory_budget 0.75"
BF16 = "--optimizer.state_dtype bfloat16"
FULL = "--activation_checkpoint.mode full"
BY_OPERATION = "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op"
BATCH = "--training.global_batch_size 8"
FLOAT8 = "--model.converters float8 --quantize.linear.float8.recipe_name"
TOY_SIZES = "--model.n_layers 2 --model.dim 64 --model.n_heads 4 --model.n_kv_heads 2 --model.ffn_dim 128"
TOY_MODEL = f"{TOY_SIZES} --model.vocab_size 512 --training.seq_len 64 --training.device cpu"


@dataclasses.dataclass(frozen=True)
class Case:
    """seconds: it is expected to take. gib: of GPU memory that it needs. most_gib: it is for GPUs with less than that.

    script: of this folder; "-m dtron ..." for a command. step: whether `arguments` are step.py's, of a training.
    """

    name: str
    seconds: float
    arguments: str
    gib: float = 0.0
    most_gib: float = float("inf")
    script: str = "step.py"

    @property
    def step(self) -> bool:
        """Whether it is a training step."""
        return self.script == "step.py"


CASES = [
    Case("constants", 60, "--models llama3/8B smollm/1.7B", script="constants.py"),
    Case("preflight", 25, "", script="-m dtron preflight"),
    Case("1.7B as it was", 75, f"{SMOLLM} {BATCH} {COMPILED} {WHOLE_LOGITS} {BY_OPERATION}", 60),
    Case("1.7B everything on", 60, f"{SMOLLM} {BATCH} {COMPILED} {BUDGET}", 60),
    Case("8B fp32 moments, full recompute", 85, f"{LLAMA} {BATCH} {COMPILED} {FULL}", 130),
    Case("8B everything on", 85, f"{LLAMA} {BATCH} {COMPILED} {BUDGET} {BF16}", 120),
    Case("8B float8 tensorwise", 85, f"{LLAMA} {BATCH} {COMPILED} {BUDGET} {BF16} {FLOAT8} tensorwise", 120),
    Case("8B float8 rowwise", 85, f"{LLAMA} {BATCH} {COMPILED} {BUDGET} {BF16} {FLOAT8} rowwise", 120),
    Case("12 layers of 8B, as it was", 60, f"{PART_OF_8B} {BATCH} {COMPILED} {WHOLE_LOGITS} {FULL}", 60, 120),
    Case("12 layers of 8B, everything on", 60, f"{PART_OF_8B} {BATCH} {COMPILED} {BUDGET} {BF16}", 60, 120),
    Case(
        "12 layers of 8B, float8 tensorwise", 60,
        f"{PART_OF_8B} {BATCH} {COMPILED} {BUDGET} {BF16} {FLOAT8} tensorwise", 60, 120,
    ),
    Case("8B 8192 tokens, everything on", 80, f"{LONG} --training.global_batch_size 4 {COMPILED} {BUDGET} {BF16}", 120),
    Case("1.7B plain loop", 60, f"--bench.only plain {SMOLLM} {BATCH} {COMPILED} {BY_OPERATION}", 60),
    Case("loss: whole, chunks, Triton", 45, "", script="loss.py"),
    Case("1.7B Triton loss", 50, f"{SMOLLM} {BATCH} {COMPILED} {BUDGET} --training.loss_kernel triton", 60),
    Case("1.7B eager", 40, f"{SMOLLM} {BATCH} {BY_OPERATION}", 60),
    Case("optimizers", 40, "--model.name smollm --model.flavor 135M --bench.compile", script="optimizers.py"),
]  # fmt: skip


def command(case: Case, toy: bool, out: Path) -> list[str]:
    """Of a case, as it is typed."""
    words = case.arguments.split()
    if case.script.startswith("-m"):
        return [sys.executable, *case.script.split(), *words, "--out", str(out / "preflight.json")]
    script = [sys.executable, str(HERE / case.script)]
    if case.script == "constants.py":
        models = ["--models", "smollm/135M", "--toy"] if toy else words
        return [*script, *models, "--out", str(out / "constants.json")]
    if not case.step:
        return [*script, *words, *(TOY_OF[case.script].split() if toy else [])]
    alone = [] if "--bench.only" in words else ["--bench.only", "dtron"]
    often = ["--bench.rounds", "1" if toy else "3", "--bench.steps", "1" if toy else "3", "--bench.warmup", "2"]
    bench = [word for word in words if word.startswith("--bench")]
    at = words.index(bench[0]) if bench else 0
    bench, rest = (words[at : at + 2], words[:at] + words[at + 2 :]) if bench else ([], words)
    device = ["--training.device", "cuda"]
    return [*script, *alone, *often, *bench, "--bench.profile", *device, *rest, *(tiny(rest) if toy else [])]


TOY_OF = {
    "loss.py": "--toy",
    "optimizers.py": f"{TOY_SIZES} --training.device cpu --bench.steps 1 --model.vocab_size 512",
}


def tiny(words: list[str]) -> list[str]:
    """What makes a case of step.py one for a CPU."""
    more = TOY_MODEL.split()
    if "--compile.enable" in words:
        more += ["--compile.backend", "aot_eager_decomp_partition"]
    if "float8" in words:
        more += ["--quantize.linear.float8.emulate"]
    if "triton" in words:
        more += ["--training.loss_kernel", "torch"]
    return more


def row_of(case: Case, result: dict[str, Any]) -> str:
    """What is printed of a step."""
    f = result["plain" if result["dtron"] is None else "dtron"]
    if f["error"]:
        return f"{case.name}: {f['error']}"
    step_ms = [1e3 * s for s in f["step_s"]]
    text = f"{case.name}: {f['tokens_per_s']:,.0f} tokens/s, step {min(step_ms):.0f} to {max(step_ms):.0f} ms"
    if f["mfu"]:
        text += f", MFU {f['mfu']:.1%}, {f['share_of_matmul_rate']:.1%} of the measured matmul rate"
    text += f", host {1e3 * min(f['step_cpu_s']):.0f} CPU-ms, first step {f['first_step_s']:.0f} s"
    text += f", reserved {f['max_memory_bytes'] / GIB:.1f} GiB"
    if f["allocated_bytes"]:
        text += f", allocated {f['allocated_bytes'] / GIB:.1f}, retries {f['retries']}"
    if (w := f["watched"]) and "busy_ms" in w:  # of a GPU
        kinds = ", ".join(f"{kind} {ms:.0f}" for kind, ms in sorted(w["kinds_ms"].items(), key=lambda item: -item[1]))
        text += f"; busy {w['busy_ms']:.0f} of {w['wall_ms']:.0f} ms ({kinds}); waits {w['synchronisations'] or 'none'}"
    return f"{text}; first loss {f['first_loss']:.4f}"


class Run:
    """The cases one after another, until the time is over."""

    def __init__(self, seconds: float, out: Path, toy: bool) -> None:
        self.end, self.out, self.toy = time.monotonic() + seconds, out, toy
        self.results: list[dict[str, Any]] = []
        # Compiled code is kept from case to case.
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(out / "inductor"))
        self.env = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}

    def case(self, case: Case) -> None:
        """Run it, if there is time, and keep its row."""
        left = self.end - time.monotonic()
        if left < (5 if self.toy else case.seconds):
            print(f"{case.name}: left out, {left:.0f} s left", flush=True)
            return
        began, words = time.monotonic(), command(case, self.toy, self.out)
        row: dict[str, Any] = {"case": case.name, "command": " ".join(words[1:])}
        try:
            limit = left if self.toy else min(left, 2.5 * case.seconds)
            done = subprocess.run(words, capture_output=True, text=True, env=self.env, cwd=ROOT, timeout=limit)
        except subprocess.TimeoutExpired:
            row["error"] = f"stopped after {time.monotonic() - began:.0f} s"
        else:
            with (self.out / "gpu.log").open("a") as log:
                log.write(f"== {case.name}\n{row['command']}\n{done.stdout}\n{done.stderr[-8000:]}\n")
            if done.returncode:
                last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
                row["error"] = f"exit code {done.returncode}: {''.join(last)[:300]}"
            elif case.step:
                row["result"] = json.loads(done.stdout)
            else:
                row["output"] = done.stdout[-20000:]
        row["seconds"] = round(time.monotonic() - began, 1)
        self.results.append(row)
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        said = row_of(case, row["result"]) if "result" in row else f"{case.name}: {row.get('error', 'done')}"
        print(f"{said} ({row['seconds']:.0f} s)", flush=True)

    def predict(self, cases: list[Case]) -> None:
        """`dtron plan` of the cases that ran, from preflight's figures; CPU work, which the GPU is not disturbed by."""
        measured = self.out / "preflight.json"
        ran = {row["case"] for row in self.results if "result" in row}
        for case in cases:
            words = [word for word in case.arguments.split() if not word.startswith("--bench")]
            if case.name not in ran or {"plain", "float8"} & {*words} or not measured.exists() or self.toy:
                continue
            if self.end - time.monotonic() < 15:
                return print("the rest was not predicted: no time left")
            hardware = ["--gpus", "1", "--hardware", str(measured), "--json"]
            plan = [sys.executable, "-m", "dtron", "plan", *words, *hardware]
            done = subprocess.run(plan, capture_output=True, text=True, cwd=ROOT, env=self.env)
            try:
                best = json.loads(done.stdout)[0]
                speed, peak = best["tokens_per_s_per_gpu"], best["peak_bytes"] / GIB
                print(f"predicted, {case.name}: {speed:,.0f} tokens/s, peak {peak:.1f} GiB", flush=True)
            except (ValueError, LookupError):
                print(f"predicted, {case.name}: {(done.stderr.strip().splitlines() or ['nothing'])[-1][:200]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=570, metavar="S", help="for everything (570)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="PART", help="the cases whose names contain it")
    parser.add_argument("--list", action="store_true", help="the commands of the cases, and nothing else")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"--only {options.only}: no such case; there are: {'; '.join(case.name for case in CASES)}")
    if options.list:
        for case in cases:
            print(f"{case.name} ({case.seconds:.0f} s): {' '.join(command(case, options.toy, options.out))}")
        return
    if not options.toy:
        import torch  # late: --list and --toy's own process need none

        if not torch.cuda.is_available():
            parser.error("no GPU was found; --toy runs tiny sizes on the CPU")
        gib = torch.cuda.get_device_properties(0).total_memory / GIB
        print(f"{torch.cuda.get_device_name()}, {gib:.0f} GiB, torch {torch.__version__}", flush=True)
        cases = [case for case in cases if case.gib <= gib < case.most_gib]
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out} is not empty; name another folder, or move it away")
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.seconds, options.out, options.toy)
    for case in cases:
        run.case(case)
    run.predict(cases)
    sys.exit(any("error" in row for row in run.results))


if __name__ == "__main__":
    main()
