"""What `dtron verify` runs and prints."""

import argparse
import json
import logging
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dtron.config import Config, read
from dtron.errors import UserError
from dtron.mesh import Degrees
from dtron.models.spec import meta_model
from dtron.verify.draws import alike
from dtron.verify.layout import TIMEOUT_S, Seen, train_layout
from dtron.verify.outputs import first_that_differs
from dtron.verify.plain import Truth, train_plain
from dtron.verify.small import Proof, make_proof

__all__ = ["StepSeen", "compare", "main"]

# fp32 on other layouts differs by less than a tenth of these (tests/verify); the faults of tests/verify by more than
# ten times as much.
LOSS_RTOL, NORM_RTOL, WAY_RTOL = 1e-5, 1e-4, 1e-3
WORST = 5  # parameters that are shown


@dataclass(frozen=True)
class StepSeen:
    """A step, of the plain loop and of the layout. off: of the parameters, worst first, how far the layout's are from
    the plain loop's, as a share of the way that they have gone.
    """

    step: int
    loss: tuple[float, float]
    norm: tuple[float, float]
    off: dict[str, float]

    @property
    def equal(self) -> bool:
        """Whether all of it is within the tolerances."""
        near = _difference(*self.loss) <= LOSS_RTOL and _difference(*self.norm) <= NORM_RTOL
        return near and all(value <= WAY_RTOL for value in self.off.values())


def _difference(expected: float, seen: float) -> float:
    """Relative; infinite for what is no number."""
    found = abs(seen - expected) / max(abs(expected), 1e-30)
    return found if found == found else float("inf")


def compare(truth: Truth, ranks: Sequence[Seen], degrees: Degrees) -> tuple[list[StepSeen], list[str]]:
    """The steps, and what is wrong besides: parameters that no rank holds whole, draws of dropout."""
    steps = []
    for number, (loss, norm) in enumerate(zip(truth.losses, truth.norms, strict=True)):
        worst: dict[str, float] = {}
        for seen in ranks:
            for name, value in seen.off[number].items():
                value = value if value == value else float("inf")
                worst[name] = max(value, worst.get(name, 0.0))
        ordered = dict(sorted(worst.items(), key=lambda item: -item[1]))
        first = ranks[0]
        steps.append(StepSeen(number + 1, (loss, first.losses[number]), (norm, first.norms[number]), ordered))
    wrong = [*_not_whole(truth, ranks), *_wrong_draws(ranks, degrees)]
    if not steps[0].equal and (module := first_that_differs(truth.outputs, [r.outputs for r in ranks], degrees.tp)):
        wrong.append(
            f"the first output that differs, in the forward of step 1, is that of {module}: look at its plan, its "
            "inputs and its parameters"
        )
    return steps, wrong


def _not_whole(truth: Truth, ranks: Sequence[Seen]) -> list[str]:
    held: dict[str, int] = {}
    for seen in ranks:
        for name, number in seen.elements.items():
            held[name] = held.get(name, 0) + number
    lost = [name for name, value in truth.start.items() if held.get(name, 0) < value.numel()]
    return [f"no rank trains {', '.join(lost)}, or not the whole of it"] if lost else []


def _wrong_draws(ranks: Sequence[Seen], d: Degrees) -> list[str]:
    """Between ranks of one pipeline stage, which run the same modules."""
    for stage in range(d.pp):
        first = stage * d.stage
        if found := alike([seen.draws for seen in ranks[first : first + d.stage]]):
            i, j, module = found
            return [
                f"dropout at or after {module} is wrong on ranks {first + i} and {first + j}: ranks that hold "
                "different values must draw differently, and ranks that hold the same values alike"
            ]
    return []


# --- processes


def _on_rank(rank: int, world: int, folder: str, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The body of a process: its result, or its error with the time of it, goes to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch warns of its own internals, on every rank
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        limit = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
        answer = job(*args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        text = "" if isinstance(error, UserError) else traceback.format_exc()  # a mistake needs none
        Path(folder, f"error-{rank}").write_bytes(pickle.dumps((time.time(), _said(error), text)))
        raise SystemExit(1) from None
    Path(folder, f"answer-{rank}").write_bytes(pickle.dumps(answer))


def _said(error: BaseException) -> str:
    """The first cause, in one line: a pipeline's own error only says which action failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


class RankError(Exception):
    """The error of the rank that failed first. text: its traceback."""

    def __init__(self, rank: int, said: str, text: str) -> None:
        super().__init__(f"rank {rank} failed: {said}")
        self.text = text


def _run_ranks(world: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """job(*args) on each of `world` gloo ranks, in processes of their own: their results. RankError."""
    # Forked from a process that has imported torch, and has run nothing: importing it costs seconds a rank.
    method = "spawn" if sys.platform == "darwin" else "forkserver"
    if method == "forkserver":
        mp.get_context(method).set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # which says which processes it ends
        try:
            mp.start_processes(_on_rank, (world, folder, job, args), world, start_method=method)
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            failed = [(*pickle.loads(file.read_bytes()), file) for file in Path(folder).glob("error-*")]
            if not failed:
                raise RankError(error.error_index, str(error), "") from None
            _, said, text, file = min(failed, key=lambda one: one[0])
            raise RankError(int(file.name.partition("-")[2]), said, text) from None
        return [pickle.loads(Path(folder, f"answer-{rank}").read_bytes()) for rank in range(world)]


def _plain_job(config: Config, gpus: int | None, ranks: int, full: bool, steps: int) -> Truth:
    return train_plain(make_proof(config, gpus, ranks, full), steps)


def _layout_job(config: Config, gpus: int | None, ranks: int, full: bool, truth: Truth) -> Seen:
    return train_layout(make_proof(config, gpus, ranks, full), truth)


# --- the command


def main(given: argparse.Namespace, keys: list[str]) -> int:
    """Run the command; returns the exit code. UserError for what cannot be proved."""
    if given.steps < 1 or given.ranks < 1 or (given.gpus is not None and given.gpus < 1):
        raise UserError("--steps, --ranks and --gpus must be 1 or more")
    reading = read(["--job.config_file", given.config, *keys])
    reading.mistakes.raise_any()
    asked = reading.config, given.gpus, given.ranks, given.full
    proof = make_proof(*asked)
    if not given.json:
        print("\n".join(describe(proof, given.ranks)), flush=True)
    steps: list[StepSeen] = []
    failure, of_what = "", "one process with the plain model"
    try:
        (truth,) = _run_ranks(1, _plain_job, *asked, given.steps)
        of_what = "the layout"
        ranks = _run_ranks(proof.setup.degrees.world, _layout_job, *asked, truth)
        steps, wrong = compare(truth, ranks, proof.setup.degrees)
    except RankError as error:
        wrong, failure = [f"{of_what}: {error}"], error.text
    equal = not wrong and all(step.equal for step in steps)
    if given.json:
        print(json.dumps(_as_json(proof, steps, wrong, equal), indent=1))
        return 0 if equal else 1
    if failure:
        print(failure, file=sys.stderr)
    print("\n".join(table(steps, wrong, color=sys.stdout.isatty())))
    return 0 if equal else 1


def describe(proof: Proof, most: int) -> list[str]:
    """What is proved, and what is not. most: ranks that were asked for."""
    asked, setup = proof.asked, proof.setup
    d, m, c = setup.degrees, setup.model_config, setup.config.training
    same = asked.degrees == d
    of = "" if same else f", for {asked.degrees} on {asked.degrees.world}"
    total = sum(p.numel() for p in meta_model(setup.spec, m).parameters())
    p = setup.config.parallelism
    in_forward = f"{c.local_batch_size} in a forward"
    if d.pp > 1:
        size, name = (
            p.pipeline_parallel_microbatch_size,
            p.pipeline_parallel_schedule_csv or p.pipeline_parallel_schedule,
        )
        in_forward = f"{c.local_batch_size // size} microbatches of {size} in each pass of {name}"
    of_layers = "" if m.n_layers == asked.model_config.n_layers else f" of {asked.model_config.n_layers}"
    return [
        f"layout    {d}: {d.world} rank{'s' * (d.world > 1)} on this machine{of}",
        *([f"          more than --ranks {most}: no degree goes down to 1"] if d.world > most else []),
        f"model     {asked.config.model.name}: {m.n_layers}{of_layers} layers, hidden size {m.dim}, {m.n_heads} heads, "
        f"{m.n_kv_heads} key/value heads, {total / 1e3:,.0f}k parameters",
        f"batch     {c.global_batch_size} sequences of {c.seq_len} random tokens, {in_forward}",
        f"not here  {', '.join(proof.left_out)}",
        "",
    ]


def table(steps: Sequence[StepSeen], wrong: Sequence[str], color: bool) -> list[str]:
    """Loss and gradient norm of both, relative differences, and the worst parameter of each step; then the verdict."""
    green, red, end = ("\033[32m", "\033[31m", "\033[0m") if color else ("", "", "")
    lines = []
    if steps:
        lines.append(
            f"{'step':>4}  {'loss':>10} {'layout':>10} {'off by':>8}  {'norm':>10} {'layout':>10} {'off by':>8}  "
            "worst parameter"
        )
    for s in steps:
        name, off = next(iter(s.off.items()))
        mark = f"{green}equal{end}" if s.equal else f"{red}DIFFERS{end}"
        lines.append(
            f"{s.step:>4}  {s.loss[0]:10.6f} {s.loss[1]:10.6f} {_difference(*s.loss):8.0e}  {s.norm[0]:10.6f} "
            f"{s.norm[1]:10.6f} {_difference(*s.norm):8.0e}  {name} {off:.0e}  {mark}"
        )
    if parted := next((s for s in steps if not s.equal), None):
        shown = [(name, off) for name, off in parted.off.items() if off > WAY_RTOL][:WORST]
        more = sum(off > WAY_RTOL for off in parted.off.values()) - len(shown)
        lines += ["", f"step {parted.step}: {len(shown) + more} of {len(parted.off)} parameters differ; the worst"]
        lines += [f"  {name}: by {off:.1%} of the way it should have gone" for name, off in shown]
    lines += ["", *(f"{red}{line}{end}" for line in wrong)] if wrong else []
    if wrong or parted:
        verdict = "The layout does not train as one process does." if steps else "Nothing was compared."
        return [*lines, "", f"{red}{verdict}{end}"]
    worst = max(off for s in steps for off in s.off.values())
    return [
        *lines, "",
        f"{green}Equal: loss within {LOSS_RTOL:.0e}, gradient norm within {NORM_RTOL:.0e}, every parameter within "
        f"{WAY_RTOL:.1%} of the way it went (worst {worst:.4%}).{end}",
    ]  # fmt: skip


def _as_json(proof: Proof, steps: Sequence[StepSeen], wrong: Sequence[str], equal: bool) -> dict[str, Any]:
    return {
        "equal": equal,
        "asked": asdict(proof.asked.degrees),
        "degrees": asdict(proof.setup.degrees),
        "left_out": proof.left_out,
        "wrong": list(wrong),
        "tolerances": {"loss": LOSS_RTOL, "norm": NORM_RTOL, "parameters": WAY_RTOL},
        "steps": [asdict(step) | {"equal": step.equal} for step in steps],
    }
