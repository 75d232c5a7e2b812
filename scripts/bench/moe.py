"""Speed of a mixture of experts: tokens/s, MFU and the share of the dispatch, per router and number of experts.

    python scripts/bench/moe.py [--bench.routers softmax,sigmoid] [--bench.experts 8,64] [--bench.rounds 5]
        [--bench.steps 5] [--bench.warmup 2] [--bench.out FILE] --job.config_file FILE.toml [--section.key value ...]

    # one node of 8 GPUs (not run yet)
    torchrun --standalone --nproc-per-node 8 scripts/bench/moe.py --bench.experts 32,64,128 --bench.out moe.json
        --job.config_file configs/qwen3-30b-a3b.toml --model.n_layers 12 --training.global_batch_size 16

All but the --bench options is train.py's command line; its model is a mixture of experts, whose router and number of
experts are replaced (a token takes as many as before, if there are). Two results, one JSON object:

* `products`: the experts of a layer, forward and backward, by one grouped product per matrix (dtron's own) and by a
  loop over experts, alternating, on the same rows: those of one local batch, spread unevenly, ep 1. `loop_over_grouped`
  is the median of the rounds' ratios: above 1 the grouped product is faster.
* `training`: the trainer's step on all ranks, as scripts/bench/step.py times it, and `dispatch_share`: the time in
  all-to-alls, waiting for other ranks included, over that of one profiled step, on rank 0. Leave pp and cp at 1: NCCL
  names their messages as it names an all-to-all. `--bench.routers none` leaves it out.
"""

import argparse
import dataclasses
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import step  # noqa: E402 - this also finds the checkout's dtron
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from contest import Contestant, matmul_rate  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from dtron.config import Config, HelpRequested  # noqa: E402
from dtron.errors import UserError  # noqa: E402
from dtron.models.families import FAMILIES  # noqa: E402
from dtron.models.flops import active_parameters  # noqa: E402
from dtron.models.moe import MoEConfig, swiglu_of_experts  # noqa: E402
from dtron.models.spec import meta_model  # noqa: E402
from dtron.observe.device import peak_flops_per_s  # noqa: E402
from dtron.ranks.world import World  # noqa: E402
from dtron.train.resolve import resolve  # noqa: E402
from dtron.train.setup import Setup  # noqa: E402

ALL_TO_ALL = ("gloo:all_to_all", "ncclDevKernel_SendRecv")  # the profiler's names


# --- the products


def loop_of_experts(rows: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What `swiglu_of_experts` computes, one expert after the other."""
    parts = rows.split(counts.tolist())
    return torch.cat([F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)
                      for x, g, u, d in zip(parts, gate, up, down, strict=True)])  # fmt: skip


def compare_products(setup: Setup, moe: MoEConfig, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of a forward and backward of both, and their ratio."""
    c, dim = setup.config.training, setup.model_config.dim
    dtype = getattr(torch, c.mixed_precision_param)
    generator = torch.Generator(device).manual_seed(0)
    tokens = c.local_batch_size * c.seq_len
    shares = torch.rand(tokens, moe.n_experts, device=device, generator=generator)
    # A trained router is uneven too: scores that grow with the expert's number.
    chosen = (shares * torch.linspace(1, 2, moe.n_experts, device=device)).topk(moe.top_k).indices
    counts = torch.bincount(chosen.flatten(), minlength=moe.n_experts)

    def random(*shape: int) -> Tensor:
        return (0.02 * torch.randn(*shape, device=device, generator=generator)).to(dtype).requires_grad_()

    shape = (moe.n_experts, moe.expert_dim, dim)
    inputs = random(tokens * moe.top_k, dim), random(*shape), random(*shape), random(shape[0], dim, moe.expert_dim)
    upstream = random(tokens * moe.top_k, dim).detach()
    seconds: dict[str, list[float]] = {"grouped": [], "loop": []}
    contestants: dict[str, Callable[..., Tensor]] = {"grouped": swiglu_of_experts, "loop": loop_of_experts}
    for turn in range(rounds + 1):  # the first warms up
        for name in sorted(contestants, reverse=turn % 2 == 1):
            _wait(device)
            began = time.perf_counter()
            torch.autograd.grad(contestants[name](inputs[0], counts, *inputs[1:]), inputs, upstream)
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    ratios = [loop / grouped for loop, grouped in zip(seconds["loop"], seconds["grouped"], strict=True)]
    medians = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    rows = {"experts": moe.n_experts, "rows": int(counts.sum()), "busiest_expert_rows": int(counts.max())}
    return {**rows, **medians, "loop_over_grouped": statistics.median(ratios)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- the training


def measure_training(setup: Setup, world: World, device: torch.device, options: Any) -> dict[str, Any]:
    """Figures of step.py's, and the share of the dispatch in one more step."""
    share = 0.0

    def build() -> step.Step:
        nonlocal share
        one = step.dtron_step(setup, world)
        one()  # the first step makes optimizer state, and compiles
        share = dispatch_share(one, device)
        return one

    contestant = Contestant(build, device, options)
    contestant.start()
    for _ in range(options.rounds):
        contestant.block()
    contestant.finish()
    rate = matmul_rate(device, getattr(torch, setup.config.training.mixed_precision_param)) * world.size
    peak = peak_flops_per_s(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    model, moe = meta_model(setup.spec, setup.model_config), setup.model_config.moe
    about = {"router": moe.score, "experts": moe.n_experts, "top_k": moe.top_k}
    about |= {"parameters": sum(p.numel() for p in model.parameters()), "active_parameters": active_parameters(model)}
    return about | {"dispatch_share": share} | step.summary(contestant.figures, setup, peak, rate)


def dispatch_share(one: step.Step, device: torch.device) -> float:
    """Time in all-to-alls over that of a step."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, acc_events=True) as recorded:
        _wait(device)
        began = time.perf_counter()
        one()
        _wait(device)
        whole = time.perf_counter() - began
    inside = sum(e.time_range.elapsed_us() for e in recorded.events() if e.name.startswith(ALL_TO_ALL)) / 1e6
    return float(inside / whole)


# --- the program


def variant(config: Config, score: str, n_experts: int) -> Config:
    """The configuration with a flavor of its model that has this router and so many experts."""
    family = FAMILIES.get(config.model.name, {})
    base = family.get(config.model.flavor)
    if base is None or base.moe is None:
        raise UserError(
            f"model {config.model.name} {config.model.flavor} has no experts; choose one of docs/experts.md"
        )
    moe = dataclasses.replace(base.moe, score=score, n_experts=n_experts, top_k=min(base.moe.top_k, n_experts))
    flavor = f"{config.model.flavor}-{score}-{n_experts}"
    family[flavor] = dataclasses.replace(base, moe=moe)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, flavor=flavor))


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--bench.routers", dest="routers", default="softmax,sigmoid")
    parser.add_argument("--bench.experts", dest="experts", default="8,64")
    ours, rest = parser.parse_known_args(argv)
    if "--help" in rest or "-h" in rest:
        raise HelpRequested((__doc__ or "").strip())
    options, config = step.parse(rest)
    options.routers = [] if ours.routers == "none" else ours.routers.split(",")
    experts = ours.experts.split(",")
    if wrong := [name for name in options.routers if name not in ("softmax", "sigmoid")]:
        raise UserError(
            f"--bench.routers: {wrong[0]!r} is no router; expected softmax, sigmoid, softmax,sigmoid or none"
        )
    if wrong := [number for number in experts if not number.isdecimal() or number == "0"]:
        raise UserError(f"--bench.experts: {wrong[0]!r}; expected numbers of experts with commas between, as in 8,64")
    options.experts = [int(number) for number in experts]
    return options, config


def run(options: argparse.Namespace, setups: list[Setup], world: World) -> dict[str, Any]:
    first = setups[0]
    device = torch.device("cuda", world.local_rank) if first.device_type == "cuda" else torch.device("cpu")
    of_numbers = {setup.model_config.moe.n_experts: setup for setup in setups}
    products = [compare_products(s, s.model_config.moe, device, options.rounds) for s in of_numbers.values()]
    c = first.config
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["moe.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "ranks": world.size,
        "layout": str(first.degrees),
        "dim": first.model_config.dim,
        "expert_dim": first.model_config.moe.expert_dim,
        "compute_dtype": c.training.mixed_precision_param,
        "products": products,
        "training": [measure_training(setup, world, device, options) for setup in setups if options.routers],
    }


def setups_of(options: argparse.Namespace, config: Config, size: int) -> list[Setup]:
    """Of every variant; of none the products alone are measured."""
    variants = [variant(config, score, n) for score in options.routers or ["softmax"] for n in options.experts]
    return [resolve(each, size) for each in variants]


if __name__ == "__main__":
    step.command(parse, setups_of, run)
