"""What a run reports: the clock of its steps, the console, metrics.jsonl, TensorBoard and the summary."""

import contextlib
import logging
import math
import os
import shlex
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dtron.checkpoint.save import Saved
from dtron.config import Config, flatten, to_toml
from dtron.models.spec import attended_tokens
from dtron.observe.console import EtaClock, format_step, format_summary, human_bytes, human_seconds, use_color
from dtron.observe.device import device_name, peak_flops_per_s
from dtron.observe.goodput import Ledger, process_start_s
from dtron.observe.metrics import MetricsWriter, last_row, read_metrics
from dtron.ranks.world import World
from dtron.train.data import RunData
from dtron.train.folder import write_config
from dtron.train.planner import Prediction
from dtron.train.setup import Setup, describe, stages_of
from dtron.train.start import ResumePoint
from dtron.train.versions import versions_comment

__all__ = ["Report", "StepClock", "start_report"]

log = logging.getLogger(__name__)

ONCE = ("checkpoint.allow_restart", "checkpoint.allow_changed_data")  # permissions of one start, not of the next


class StepClock:
    """Seconds per step and seconds waiting for data, as means over the steps since the last reading; and their sums.

    Wall time between readings, without pauses: on a GPU the single steps of a loop that runs ahead mean nothing.
    """

    def __init__(self) -> None:
        self._steps, self._data_s, self._paused_s, self._since = 0, 0.0, 0.0, time.perf_counter()
        self._spent, self._accounted = dict.fromkeys(("data", "validation", "checkpoint"), 0.0), self._since
        self._began = self._since
        self._usual_s: deque[float] = deque(maxlen=50)  # of the last steps during which nothing was saved
        self._saving_s: list[float] = []

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Around the wait for a step's batch."""
        began = self._began = time.perf_counter()
        yield
        self._data_s += time.perf_counter() - began
        self._spent["data"] += time.perf_counter() - began
        self._steps += 1

    @contextlib.contextmanager
    def paused(self, part: str) -> Iterator[None]:
        """Around what is no part of a step: validation, checkpoint."""
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began
        self._spent[part] += time.perf_counter() - began

    def account(self) -> dict[str, float]:
        """Seconds of each part of the goodput that passed since the last account."""
        now = time.perf_counter()
        parts = {**self._spent, "steps": now - self._accounted - sum(self._spent.values())}
        self._spent, self._accounted = dict.fromkeys(self._spent, 0.0), now
        return parts

    def end_step(self, saving: bool) -> None:
        """At the end of a step; saving: a checkpoint is being written meanwhile."""
        (self._saving_s if saving else self._usual_s).append(time.perf_counter() - self._began)

    def slowdown(self) -> float | None:
        """How much longer steps took during the last save than usual; None if there were none of either."""
        saving, self._saving_s = self._saving_s, []
        if not saving or not self._usual_s:
            return None
        return statistics.median(saving) / statistics.median(self._usual_s)

    def read(self) -> tuple[float, float]:
        """(seconds per step, of which waiting for data), and start over."""
        now = time.perf_counter()
        step_s = (now - self._since - self._paused_s) / self._steps
        data_s = self._data_s / self._steps
        self._steps, self._data_s, self._paused_s, self._since = 0, 0.0, 0.0, now
        return step_s, data_s


class Report:
    """Writes on rank 0 only. flops: per token; peak: FLOP/s per GPU, or None; entropy: nats per token, or None.
    recomputed: FLOPs per token that the backward computes again, None where only the compiler knows.

    saved_ledger: what `account` gave for the checkpoint that is resumed.
    """

    def __init__(
        self, world: World, config: Config, config_text: str, run_folder: Path, attempt: int,
        flops: float, peak: float | None, entropy: float | None, saved_ledger: dict[str, Any] | None = None,
        recomputed: float | None = None,
    ) -> None:  # fmt: skip
        self._world, self._config, self._folder = world, config, run_folder
        self._flops, self._peak, self._entropy, self._attempt = flops, peak, entropy, attempt
        self._recomputed = recomputed
        self._prediction: Prediction | None = None
        self._eta = EtaClock(config.training.steps)
        self._color = use_color(sys.stdout, config.metrics.disable_color_printing)
        self._writer = None
        self._began_s = process_start_s()
        self._since = time.monotonic() - (time.time() - self._began_s)  # one clock, that nobody sets back
        if world.rank == 0:
            self._config_file = write_config(run_folder, attempt, config_text)
            before = last_row(run_folder / "metrics.jsonl", "unix_s")
            self._ledger = Ledger(self._began_s, saved_ledger, before)
            self._writer = MetricsWriter(run_folder, config_text, flatten(config), config.metrics, attempt)

    def _now_s(self) -> float:
        return self._began_s + time.monotonic() - self._since

    def started(self) -> None:
        """The first step begins."""
        if self._writer:
            self._ledger.add("startup", self._now_s() - self._began_s)

    def account(self, clock: StepClock) -> dict[str, float]:
        """Where the run's wall time went so far, over all its attempts; empty but on rank 0."""
        if not self._writer:
            return {}
        for part, seconds in clock.account().items():
            self._ledger.add(part, seconds)
        return self._ledger.row(self._now_s()) | {"attempt": self._attempt}

    def step(self, row: dict[str, Any], clock: StepClock) -> float:
        """Complete a row with its times and rates, and write it everywhere. Returns the seconds per step."""
        step_s, data_s = clock.read()
        tokens_per_s = self._config.training.global_batch_size * self._config.training.seq_len / step_s
        per_gpu = tokens_per_s / self._world.size
        flops = row.get("flops_per_token", self._flops)  # under document masks it changes with the documents
        mfu = per_gpu * flops / self._peak if self._peak else None
        rates = {"tokens_per_s": tokens_per_s, "tokens_per_s_per_gpu": per_gpu, "mfu": mfu}
        if self._peak and self._recomputed is not None:
            rates["hfu"] = per_gpu * (flops + self._recomputed) / self._peak
        row = {**row, "step_s": step_s, "data_s": data_s, **rates, **self.account(clock)}
        self._eta.tick(step_s)
        if self._writer:
            self._writer.log(row | self._predicted())
            left = self._eta.seconds_left(row["step"])
            log.info(format_step(row, self._config.training.steps, left, self._color))
        return step_s

    def _predicted(self) -> dict[str, float]:
        """The planner's figures, once they are known; it is asked after the first step, if metrics.plan_hardware is."""
        if hardware := self._config.metrics.plan_hardware:
            self._prediction = self._prediction or Prediction(self._config_file, self._world.size, hardware)
        return self._prediction.row() if self._prediction else {}

    def validation(self, step: int, loss: float) -> None:
        row = {"step": step, "validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
        if self._writer:
            self._writer.log(row)
            beside = f" (unigram entropy of this set {self._entropy:.4f} nats)" if self._entropy else ""
            log.info("step %d: validation loss %.4f nats per token%s", step, loss, beside)

    def saved(self, saved: Saved, failed_saves: int, slowdown: float | None) -> None:
        """A save is over: what it cost, or why it failed."""
        if not self._writer:
            return
        for line in saved.warnings:
            log.warning(line)
        if saved.error:
            self._writer.log({"step": saved.step, "failed_saves": failed_saves})
            log.warning(
                "the checkpoint of step %d could not be saved (%s); those before it are untouched",
                saved.step, saved.error,
            )  # fmt: skip
            return
        row = {"step": saved.step, "checkpoint_stall_s": saved.stall_s, "checkpoint_save_s": saved.save_s}
        self._writer.log({**row, "checkpoint_bytes": saved.bytes, "checkpoint_slowdown": slowdown})
        beside = f", and its steps took {slowdown:.2f} x as long meanwhile" if slowdown else ""
        log.info(
            "step %d: saved %s in %s; training stalled for %.3fs%s",
            saved.step, human_bytes(saved.bytes), human_seconds(saved.save_s), saved.stall_s, beside,
        )  # fmt: skip

    def end(self, step: int, clock: StepClock) -> None:
        """Close the files and print the summary."""
        if not self._writer:
            return
        self._writer.log({"step": step, **self.account(clock)})
        self.close()
        rows = read_metrics(self._folder / "metrics.jsonl")
        more = {"unigram_entropy": self._entropy, "flops_per_token": self._flops, "peak_flops": self._peak}
        log.info(format_summary(rows, self._folder, self._resume_command(), **more))

    def close(self) -> None:
        """Close the files, and ask the planner no more; of a run that failed, too."""
        if self._writer:
            self._writer.close()
        if self._prediction:
            self._prediction.close()

    def _resume_command(self) -> str:
        """The command line of this run; run again it resumes from the newest checkpoint."""
        if not self._config.checkpoint.enable:
            return "nothing: checkpoint.enable is false"
        if self._world.command:
            return self._world.command
        words = [word for word in sys.argv if word.replace("-", "_").lstrip("_") not in ONCE]
        if "LOCAL_WORLD_SIZE" not in os.environ:
            return f"python {shlex.join(words)}"
        nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
        where = "--standalone" if nodes == "1" else f"--nnodes {nodes} RENDEZVOUS_OPTIONS"
        return f"torchrun {where} --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']} {shlex.join(words)}"


def start_report(
    world: World, setup: Setup, config: Config, start: ResumePoint, data: RunData, device: torch.device,
    flops_per_token: Callable[[Sequence[float]], float], recomputed: float | None,
) -> Report:  # fmt: skip
    """Say what is about to be trained, on what and where, and open the report."""
    c, name = config.training, device_name(device)
    flops = flops_per_token(attended_tokens(setup.model_config, c.seq_len))
    forwards = c.global_batch_size // (c.local_batch_size * setup.degrees.dp)
    log.info(
        f"{describe(setup, device)}, {flops / 1e9:.3g} GFLOPs per token\n"
        f"{c.global_batch_size} sequences of {c.seq_len} tokens per step, {forwards} forward(s) per rank\n"
        f"outputs in {start.run_folder}"
    )
    if plan := stages_of(setup):
        for rank, stages in enumerate(plan.of_rank):
            parts = (f"{s} ({plan.modules[s][0]} to {plan.modules[s][-1]})" for s in stages)
            log.info(f"pipeline rank {rank}: stage {', '.join(parts)}")
    peak = peak_flops_per_s(name) if device.type == "cuda" else None
    if device.type == "cuda" and peak is None:
        log.info(f"the peak FLOP/s of {name} is not known here: MFU is left out")
    held_out = data.held_out.dataset if data.held_out else None
    entropy = getattr(held_out, "unigram_entropy", None) if world.rank == 0 else None
    attempt, ledger = start.progress.attempt, start.progress.ledger
    history = f"# changed since attempt {attempt - 1}: {start.changed}\n" if start.changed else ""
    text = history + (versions_comment() if world.rank == 0 else "") + to_toml(config)
    return Report(world, config, text, start.run_folder, attempt, flops, peak, entropy, ledger, recomputed)
