"""CPU and wall seconds of an optimizer's step on one rank, and the bytes that a parameter takes, for each optimizer.

    python scripts/bench/optimizers.py [--bench.steps 5] [--bench.compile] --job.config_file FILE.toml
        [--section.key value ...]

All but the --bench options is train.py's command line; the model is whole, in fp32, with random gradients.
--bench.compile adds AdamW with bf16 moments as one compiled pass. Optimizers take turns; figures are medians. JSON on
stdout.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's dtron, also where another copy is installed

from dtron.config import load, replace  # noqa: E402
from dtron.config.sections import Compile  # noqa: E402
from dtron.errors import UserError, quiet_broken_pipe  # noqa: E402
from dtron.models.spec import meta_model  # noqa: E402
from dtron.train.optimizer import build_optimizers  # noqa: E402
from dtron.train.resolve import resolve  # noqa: E402

KINDS = {
    "AdamW": {},
    "AdamW bf16": {"optimizer.state_dtype": "bfloat16"},
    "Muon": {"optimizer.name": "Muon"},
}


def measure(arguments: list[str], steps: int, compiled: bool) -> dict[str, Any]:
    """Seconds of a step by optimizer, each on a model of its own."""
    config = load(arguments)
    setup = resolve(config, 1)
    device = setup.device(0)
    kinds = KINDS | ({"AdamW bf16 compiled": KINDS["AdamW bf16"]} if compiled else {})
    made: dict[str, list[torch.optim.Optimizer]] = {}
    for name, keys in kinds.items():
        c = config
        for key, value in keys.items():
            c = replace(c, key, value)
        model = meta_model(setup.spec, setup.model_config).to_empty(device=device)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
            p.grad = torch.randn_like(p)
        parts: Any = SimpleNamespace(parts=[model], aliases={}, named_parameters=model.named_parameters)
        made[name] = build_optimizers(parts, c.optimizer, Compile(enable=name.endswith("compiled")))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for turn in range(steps + 1):  # the first makes the state, and compiles
        for name, optimizers in made.items():
            figures = timed(optimizers, device)
            if turn:
                seconds[name].append(figures)
    rows = {name: row(seconds[name], optimizers) for name, optimizers in made.items()}
    for figures in rows.values():
        figures["cpu_over_adamw"] = figures["cpu_s"] / rows["AdamW"]["cpu_s"]
    return {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads(), "optimizers": rows}


def timed(optimizers: list[torch.optim.Optimizer], device: torch.device) -> tuple[float, float]:
    """CPU and wall seconds of a step."""
    began = time.process_time(), time.perf_counter()
    for optimizer in optimizers:
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() - began[0], time.perf_counter() - began[1]


def row(seconds: list[tuple[float, float]], optimizers: list[torch.optim.Optimizer]) -> dict[str, float]:
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    state = [t for optimizer in optimizers for values in optimizer.state.values() for t in values.values()]
    n = sum(p.numel() for p in parameters)
    cpu_s, wall_s = (statistics.median(values) for values in zip(*seconds, strict=True))
    held = sum(t.nbytes for t in state if t.ndim) / n
    return {"cpu_s": cpu_s, "wall_s": wall_s, "parameters": n, "state_bytes_per_parameter": held}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench.steps", dest="steps", type=int, default=5)
    parser.add_argument("--bench.compile", dest="compile", action="store_true")
    options, rest = parser.parse_known_args()
    try:
        print(json.dumps(measure(rest, options.steps, options.compile), indent=1))
    except UserError as error:
        print(f"optimizers.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with quiet_broken_pipe():
        sys.exit(main())
