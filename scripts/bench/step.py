"""Tokens/s, MFU and peak memory of one configuration, beside a plain PyTorch loop of the same model.

    python scripts/bench/step.py [--bench.rounds 5] [--bench.steps 5] [--bench.warmup 2] [--bench.out FILE]
        [--bench.only dtron|plain] [--bench.profile] --job.config_file FILE.toml [--section.key value ...]

All but the --bench options is train.py's command line. On one rank the two take turns: each round builds one of
them anew, warms it up, times a block of steps and frees it; odd rounds begin with the other one. Under torchrun both
are built once, the plain loop on rank 0 alone, with the whole global batch, while the others wait; on GPUs dtron alone.
Figures are medians over the blocks; `speed_over_plain` is the median of the rounds' own ratios of wall time (above 1:
dtron is faster), `cpu_over_plain` that of CPU seconds, summed over ranks (below 1: dtron needs less), which a machine
that others use disturbs least. Both train on the same random tokens and start from the same weights; `first_loss` of
the two must agree. `share_of_matmul_rate` is MFU with the best rate that a square matrix product reached here in place
of the data sheet's. --bench.profile watches some more steps, see watch.py. The result is one JSON object on
stdout (and in --bench.out); the rest goes to stderr.
"""

import argparse
import dataclasses
import datetime
import json
import logging
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's dtron, also where another copy is installed

from contest import Contestant, Figures, Step, compete, matmul_rate, median_ratio  # noqa: E402

from dtron import registry  # noqa: E402
from dtron.config import Config, HelpRequested, load  # noqa: E402
from dtron.data.loader import StepLoader  # noqa: E402
from dtron.data.order import Mixture  # noqa: E402
from dtron.errors import UserError, quiet_broken_pipe  # noqa: E402
from dtron.models.flops import flops_per_token  # noqa: E402
from dtron.models.init import initial_rows  # noqa: E402
from dtron.models.spec import attended_tokens, meta_model  # noqa: E402
from dtron.observe.device import peak_flops_per_s  # noqa: E402
from dtron.parallel.recompute import apply_recompute  # noqa: E402
from dtron.ranks.world import World  # noqa: E402
from dtron.train.report import StepClock  # noqa: E402
from dtron.train.resolve import check_batch, resolve  # noqa: E402
from dtron.train.setup import Setup  # noqa: E402
from dtron.train.trainer import Trainer  # noqa: E402


class RandomTokens:
    """Sequence i is drawn from a generator seeded by i; what the tokens are does not change the work."""

    tokenizer_json = None

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        self.seq_len, self.vocab_size = seq_len, vocab_size

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        text = np.random.default_rng(i).integers(0, self.vocab_size, self.seq_len + 1)
        return text[:-1], text[1:]


# --- the two contestants: a function that builds and returns a step


def dtron_step(setup: Setup, world: World) -> Step:
    """The trainer's own step, with its check for finite numbers."""
    trainer, clock = Trainer(setup, world), StepClock()

    def step() -> torch.Tensor:
        stats, local_loss = trainer.train_step(clock)
        trainer.step.guard.watch(trainer.progress.step, stats, local_loss)
        return stats[0]

    return step


def plain_step(setup: Setup, world: World) -> Step:
    """What one would write for one device: bf16 by autocast, fused AdamW, torch's clipping; same recompute, compile."""
    c, device = setup.config, _device(setup, world)
    model = _plain_model(setup, device)
    o = c.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    loss_fn = registry.look_up("loss", c.training.loss, "training.loss")
    if c.compile.enable and "loss" in c.compile.components:
        loss_fn = torch.compile(loss_fn, backend=c.compile.backend, fullgraph=True)
    size = c.training.local_batch_size
    loader = StepLoader(
        [RandomTokens(c.training.seq_len, setup.model_config.vocab_size)],
        Mixture([1]),
        global_batch_size=check_batch(c, setup.degrees, c.training.global_batch_size),
        dp_rank=0,
        dp_size=1,
        seed=c.debug.seed,
        options=c.training.dataloader,
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.training.mixed_precision_param == "bfloat16")

    def step() -> torch.Tensor:
        tokens, labels = next(loader)[:2]
        total = torch.zeros((), device=device)
        for x, y in zip(tokens.split(size), labels.split(size), strict=True):
            with autocast:
                logits = model(x.to(device, non_blocking=True))
            loss = loss_fn(logits, y.to(device, non_blocking=True)).sum() / labels.numel()
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.training.max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _plain_model(setup: Setup, device: torch.device) -> torch.nn.Module:
    """The model on one device with dtron's initial weights, recomputing and compiled as configured."""
    c, spec = setup.config, setup.spec
    with torch.device(device):
        model = spec.build(setup.model_config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = spec.init_std(name, setup.model_config)
            p.copy_(initial_rows(name, p.shape, 0, p.shape[0], std, c.debug.seed, device))
    mode, option = c.activation_checkpoint.mode, c.activation_checkpoint.selective_ac_option
    for name, block in model.layers.items():
        if c.compile.enable and "model" in c.compile.components:
            block.compile(fullgraph=True, backend=c.compile.backend)
        model.layers[name] = apply_recompute(block, int(name), mode, option)
    return model


# --- the result


def _device(setup: Setup, world: World) -> torch.device:
    return torch.device("cuda", world.local_rank) if setup.device_type == "cuda" else torch.device("cpu")


def summary(figures: Figures, setup: Setup, peak: float | None, matmul: float) -> dict[str, Any]:
    """Rates from the median block. peak: FLOP/s of a device; matmul: of all ranks together, as measured."""
    c = setup.config
    rates = ("tokens_per_s", "tokens_per_s_per_gpu", "mfu", "share_of_matmul_rate")
    result = dataclasses.asdict(figures) | dict.fromkeys(rates)
    if figures.error is None and figures.step_s:
        sequences = check_batch(c, setup.degrees, c.training.global_batch_size)
        tokens_per_s = sequences * c.training.seq_len / statistics.median(figures.step_s)
        per_gpu = tokens_per_s / setup.degrees.world
        result |= {"tokens_per_s": tokens_per_s, "tokens_per_s_per_gpu": per_gpu}
        result["mfu"] = per_gpu * _flops_per_token(setup) / peak if peak else None
        result["share_of_matmul_rate"] = tokens_per_s * _flops_per_token(setup) / matmul
    return result


def _flops_per_token(setup: Setup) -> float:
    spec, m = setup.spec, setup.model_config
    attention = [spec.attention_flops(m, n) for n in attended_tokens(m, setup.config.training.seq_len)]
    return flops_per_token(meta_model(spec, m), attention)


# --- the program


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """The --bench options, and the configuration the rest makes, with all that is no part of a step turned off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, default, meaning in (
        ("rounds", 5, "timed blocks per contestant"),
        ("steps", 5, "optimizer steps per block"),
        ("warmup", 2, "steps before a block, after building"),
    ):
        text = f"{meaning} ({default})"
        parser.add_argument(f"--bench.{name}", dest=name, type=int, default=default, metavar="N", help=text)
    parser.add_argument("--bench.out", dest="out", type=Path, metavar="FILE", help="also write the JSON here")
    parser.add_argument("--bench.only", dest="only", choices=("dtron", "plain"), help="leave the other one out")
    parser.add_argument("--bench.profile", dest="profile", action="store_true", help="watch some more steps")
    options, rest = parser.parse_known_args(argv)
    if min(options.rounds, options.steps, options.warmup) < 1:
        parser.error("--bench.rounds, --bench.steps and --bench.warmup are 1 or more")
    config = load(rest)
    replace = dataclasses.replace
    return options, replace(
        config,
        training=replace(config.training, dataset="random_tokens", dataset_path=None),
        validation=replace(config.validation, enable=False),
        checkpoint=replace(config.checkpoint, enable=False, initial_load_path=None),
        metrics=replace(config.metrics, enable_tensorboard=False),
        profiling=replace(config.profiling, enable_profiling=False),
    )


def start(setup: Setup) -> World:
    """Join torchrun's ranks, or be the only one."""
    # On stderr, so that stdout holds the result alone.
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    rank, size, local = (int(os.environ.get(key, d)) for key, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    logging.getLogger("dtron").setLevel(logging.WARNING if rank else logging.INFO)
    backend = "gloo"
    if setup.device_type == "cuda":
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, local, size, dist.HashStore())


def run(options: argparse.Namespace, setup: Setup, world: World) -> dict[str, Any]:
    """Measure, and describe what was measured."""
    device, dtype = _device(setup, world), getattr(torch, setup.config.training.mixed_precision_param)
    rate = matmul_rate(device, dtype)
    builders = {"dtron": lambda: dtron_step(setup, world), "plain": lambda: plain_step(setup, world)}
    names = [options.only] if options.only else list(builders)
    if world.size > 1 and device.type == "cuda":
        names = ["dtron"]
    contestants = {
        name: Contestant(builders[name] if name == "dtron" or world.rank == 0 else _nothing, device, options, alone)
        for name in names
        for alone in (name == "plain" and world.size > 1,)
    }
    compete(contestants, world, options.rounds)
    figures = {name: contestant.figures for name, contestant in contestants.items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    peak = peak_flops_per_s(name) if device.type == "cuda" else None
    c = setup.config
    results = {key: summary(value, setup, peak, rate * world.size) for key, value in figures.items()}
    ratios = [median_ratio(figures, "step_s", inverse=True), median_ratio(figures, "step_cpu_s")]
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["step.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "device": name,
        "ranks": world.size,
        "layout": str(setup.degrees),
        "model": f"{c.model.name} {c.model.flavor}",
        "parameters": sum(p.numel() for p in meta_model(setup.spec, setup.model_config).parameters()),
        "flops_per_token": _flops_per_token(setup),
        "peak_flops_per_s": peak,
        "matmul_flops_per_s": rate,
        "seq_len": c.training.seq_len,
        "sequences_per_step": check_batch(c, setup.degrees, c.training.global_batch_size),
        "sequences_per_forward": c.training.local_batch_size,
        "compute_dtype": c.training.mixed_precision_param,
        "recompute": c.activation_checkpoint.mode,
        "compile": c.compile.backend if c.compile.enable else None,
        "steps_per_block": options.steps,
        "dtron": results.get("dtron"),
        "plain": results.get("plain"),
        "speed_over_plain": ratios[0],
        "cpu_over_plain": ratios[1],
    }


def _nothing() -> Step:
    """What other ranks do in the plain loop's turn."""
    return lambda: torch.zeros(())


def _cpu_name() -> str:
    """The processor's name and the threads torch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else 'of unknown name'}, {torch.get_num_threads()} thread(s)"


def command(
    parse: Callable[[list[str]], tuple[argparse.Namespace, Config]],
    setups_of: Callable[[argparse.Namespace, Config, int], list[Setup]],
    run: Callable[[argparse.Namespace, list[Setup], World], dict[str, Any]],
) -> None:
    """A benchmark on every rank: arguments -> the setups for the world's size -> a result, printed by rank 0."""
    registry.register("dataset", "random_tokens", lambda config, section, split, s, v, log: RandomTokens(s, v))
    try:
        options, config = parse(sys.argv[1:])
        with tempfile.TemporaryDirectory() as outputs:
            config = dataclasses.replace(config, job=dataclasses.replace(config.job, dump_folder=outputs))
            setups = setups_of(options, config, int(os.environ.get("WORLD_SIZE", 1)))
            world = start(setups[0])
            result = json.dumps(run(options, setups, world), indent=1)
            dist.barrier()
    except HelpRequested as text:
        with quiet_broken_pipe():
            print(text)
        return
    except UserError as error:
        sys.exit(f"error: {error}")
    if world.rank == 0:
        print(result)
        if options.out:
            options.out.write_text(result + "\n")
    dist.destroy_process_group()


def main() -> None:
    command(parse, lambda _, config, size: [resolve(config, size)], lambda o, setups, world: run(o, setups[0], world))


if __name__ == "__main__":
    main()
