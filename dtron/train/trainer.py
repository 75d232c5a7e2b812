"""The training loop. `Trainer` can be subclassed: `next_batch`, `build_loss` and `build_optimizers` are its hooks."""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dtron import compat, registry
from dtron.data.loader import Batch
from dtron.mesh import Mesh
from dtron.models.flops import flops_per_token
from dtron.models.spec import attended_tokens, experts_of, layers_of, meta_model
from dtron.observe.phases import Phases
from dtron.observe.profiler import profiler
from dtron.observe.snapshot import MemorySnapshots
from dtron.parallel.compose import parallelize
from dtron.parallel.float8 import scale_gathered_weights
from dtron.parallel.recompute import recomputed_flops_per_token
from dtron.ranks.agree import from_rank_0, warn_on_rank_0
from dtron.ranks.control import LONG_S, StopBeforeStartError
from dtron.ranks.watchdog import Watchdog
from dtron.ranks.world import World
from dtron.train.balance import Balance, unread_keys
from dtron.train.data import HeldOut, open_data
from dtron.train.forward import StopCheck, mean_loss, to_host
from dtron.train.guard import UNLABELLED, StepGuard
from dtron.train.initial import check_vocabulary
from dtron.train.optimizer import build_optimizers
from dtron.train.report import StepClock, start_report
from dtron.train.saving import Saving
from dtron.train.setup import Setup
from dtron.train.slowest import Slowest
from dtron.train.start import load_start, resolve_global_batch, start_run
from dtron.train.step import Step
from dtron.train.tally import Tally

__all__ = ["Trainer"]

log = logging.getLogger(__name__)

MARGIN_S = 60.0  # beside a timeout of [comm], for the watchdog to report what it was
SLOWER = 10  # times the slowest step so far: a step may take longer than ranks may wait for each other


class Trainer:
    """One run on one rank, from a checked `Setup` inside a started process group."""

    def __init__(self, setup: Setup, world: World) -> None:
        self.setup, self.world = setup, world
        self.device = setup.device(world.local_rank)
        self.start = start_run(setup, world)
        self.run_folder, self.progress = self.start.run_folder, self.start.progress
        comm = setup.config.comm
        self._heartbeat("starting")
        sees_all = setup.device_type == "cuda"
        self.watchdog = Watchdog(world, comm, self.run_folder, lambda: self.progress.step, sees_all=sees_all)
        self.watchdog.start()
        self.config = resolve_global_batch(setup, self.start)
        self.mesh = Mesh(setup.degrees, setup.device_type, experts_of(setup.model_config) is not None)
        compat.set_timeout(comm.init_timeout_seconds)  # torch gives the groups of a mesh 30 minutes
        self.model = parallelize(
            setup.spec, setup.model_config, self.config, self.mesh, self.device, self.build_loss(),
            [registry.look_up("converter", name, "model.converters") for name in self.config.model.converters],
        )  # fmt: skip
        self.optimizers = self.build_optimizers()
        self._end_on_stop()
        self._heartbeat("opening the data")
        vocab_size = setup.model_config.vocab_size
        try:
            self.data = open_data(self.config, vocab_size, setup.degrees, self.mesh.dp_rank, world, self.progress)
        except StopBeforeStartError:
            self._end_on_stop()
        self._end_on_stop()
        self._heartbeat("loading")
        if not self.start.resume_from:
            check_vocabulary(self.config, self.data.first)
        load_start(self.start, setup, self.model, self.optimizers)
        scale_gathered_weights(self.config, self.model.parts)
        self.phases, self.slowest = Phases(self.device), Slowest(world, self.mesh, self.device)
        self.step = self._build_step()
        self.report = start_report(
            world,
            setup,
            self.config,
            self.start,
            self.data,
            self.device,
            self._flops_per_token(),
            self._recomputed_flops_per_token(),
        )
        self.saving = Saving(setup, self.config, self.start, self.data, self.step, self.report, world)
        self._logged_step = 0

    # --- the hooks

    def build_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(logits [B, S, V], labels [B, S]) -> loss of every token [B, S]; the trainer sums and divides them."""
        return registry.look_up("loss", self.config.training.loss, "training.loss")

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimizers that have each parameter of `self.model.parts` once."""
        return build_optimizers(self.model, self.config.optimizer, self.config.compile)

    def next_batch(self) -> Batch | tuple[Tensor, Tensor]:
        """This data-parallel rank's rows of the next optimizer step; or tokens and labels alone."""
        return next(self.data.loader)

    # --- the loop

    def run(self) -> None:
        """Train until `training.steps`; validate, save and log on the way."""
        c, steps, first = self.config, self.config.training.steps, self.progress.step + 1
        if first > steps:
            log.info("nothing to do: step %d is done, of training.steps %d; raise it to continue", first - 1, steps)
            self.world.stop.arm()
            if self.saving.export():  # a finished run may be asked for it later
                self.world.control.done(first - 1)
            return
        self._end_on_stop()
        gc.disable()  # collections at different times on different ranks would make all wait for each
        self.world.stop.arm()
        self.report.started()
        clock = StepClock()
        folder, rank, done = self.run_folder, self.world.rank, self.progress.step
        with (
            profiler(c.profiling, folder, rank, steps_done=done) as trace,
            MemorySnapshots(c.profiling, folder, rank, self.device, steps_done=done) as snapshots,
        ):
            deadline_s, slowest_s = LONG_S, 0.0  # the first step compiles
            for step in range(first, steps + 1):
                self.world.control.heartbeat("training", deadline_s, step - 1)
                began_s = time.monotonic()
                saving = self.saving.busy
                stats, local_loss = self.train_step(clock)
                self.step.guard.watch(step, stats, local_loss)
                clock.end_step(saving)
                trace.step()
                snapshots.step()
                took_s = time.monotonic() - began_s
                slowest_s = took_s if step <= first + 1 else max(slowest_s, took_s)
                deadline_s = max(c.comm.train_timeout_seconds + MARGIN_S, SLOWER * slowest_s)
                if step % c.training.gc_freq == 0:
                    gc.collect(1)
                if step in (first, steps) or step % c.metrics.log_freq == 0:
                    self._log(stats, clock)
                if step == first:
                    compat.set_timeout(c.comm.train_timeout_seconds)
                    self.watchdog.first_step_done()
                    self.saving.first_step_done()
                if step == steps or not self.step.guard.stop_requested:  # else saved at once: the time is short
                    self._after_step(step, clock)
                if self.step.guard.stop_requested and step < steps:
                    if self._logged_step != step:
                        self._log(stats, clock)
                    break
        self._heartbeat("finishing")
        with clock.paused("checkpoint"):
            self.saving.finish(clock)
        self.watchdog.stop()
        gc.enable()
        self.report.end(self.progress.step, clock)
        if self.saving.export() and self.progress.step == steps:
            self.world.control.done(steps)

    def train_step(self, clock: StepClock) -> tuple[Tensor, Tensor]:
        """The next batch and one optimizer step on it: what `Step` returns."""
        with clock.data():
            batch = Batch(*self.next_batch())
        return self.step(batch)

    def _after_step(self, step: int, clock: StepClock) -> None:
        """What is done between two steps where it is due: a checkpoint, validation.

        Both may take long, so a stop that is requested meanwhile is noted in the guard here, and not by another step.
        """
        c = self.config
        with clock.paused("checkpoint"):
            if self.saving.is_due(step):
                self._heartbeat("saving")
                self.saving.save(clock)  # before the validation: one that fails costs no step
                self.step.guard.stop_requested |= StopCheck(self._stop_requested)(torch.zeros(1, device=self.device))
            else:
                self.saving.poll(clock)
        held_out = self.data.held_out
        if held_out and (step == c.training.steps or step % c.validation.freq == 0):
            self._heartbeat("validating")
            with clock.paused("validation"):
                self._validate(step, held_out)

    def _validate(self, step: int, held_out: HeldOut) -> None:
        """Report the loss on the validation set; a stop ends it, for there may be little time left."""
        guard, found = self.step.guard, None
        if not guard.stop_requested:
            until = StopCheck(self._stop_requested)
            found = mean_loss(self.model, held_out.loader, self.config, self.mesh, self.device, until)
        if found is not None:
            self.report.validation(step, found[0])
            return
        guard.stop_requested = True
        log.info("step %d: no validation, because a stop was requested", step)

    def _log(self, stats: Tensor, clock: StepClock) -> None:
        self._logged_step = self.progress.step
        tally, balance = self.step.tally, self.step.balance
        of_step, by_source, *experts = to_host(stats, tally.by_source, *([balance.counted()] if balance else []))
        loss, norm, _, verdict, _ = of_step.tolist()
        of_labels = {} if verdict == UNLABELLED else {"loss": loss, "grad_norm": norm}
        row = {
            "step": self.progress.step,
            **of_labels,
            "lr": self.step.learning_rate(self.progress.step),
            "tokens": self.progress.tokens,
            **self.slowest.reduce(self.phases),
            **tally.reduce(self.progress.consumed, by_source),
            **self.data.metrics(self.progress.consumed),
            **(balance.reduce(*experts) if balance else {}),
        }
        if self.progress.skipped:
            row["skipped_steps"] = self.progress.skipped
        self.slowest.warn(row, self.report.step(row, clock))
        self.data.say_epochs(row)

    # --- parts

    def _end_on_stop(self) -> None:
        """Before the first step: StopBeforeStartError on all ranks if there is a STOP."""
        control, start = self.world.control, self.start
        if not from_rank_0(control.stop_requested):
            return
        if self.world.rank == 0:
            control.saved(start.progress.step, str(start.resume_from or ""), "the file STOP")
        raise StopBeforeStartError("stopped by the file STOP before the first step: there was nothing to save")

    def _stop_requested(self) -> bool:
        """Whether this rank knows a reason to save and end."""
        stop, control = self.world.stop, self.world.control
        return bool(stop.signal_name or self.data.lost_worker or self.data.problem) or control.stop_requested()

    def _heartbeat(self, phase: str) -> None:
        """The beginning of a phase that has no time limit of its own."""
        self.world.control.heartbeat(phase, LONG_S, self.progress.step)

    def _flops_per_token(self) -> Callable[[Sequence[float]], float]:
        """Forward and backward, given to how many tokens each layer attends."""
        spec, m = self.setup.spec, self.setup.model_config
        whole = meta_model(spec, m)
        return lambda attended: flops_per_token(whole, [spec.attention_flops(m, n) for n in attended])

    def _recomputed_flops_per_token(self) -> float | None:
        """What the backward computes again; None where only the compiler knows, and on a CPU, which has no HFU."""
        spec, m, ac = self.setup.spec, self.setup.model_config, self.config.activation_checkpoint
        if self.device.type != "cuda" or ac.mode == "memory_budget":
            return None
        blocks = layers_of(meta_model(spec, m)).values()
        attended = attended_tokens(m, self.config.training.seq_len)
        again = [
            recomputed_flops_per_token(block, i, spec.attention_flops(m, n), ac.mode, ac.selective_ac_option)
            for i, (block, n) in enumerate(zip(blocks, attended, strict=True))
        ]
        return sum(again)

    def _build_step(self) -> Step:
        c = self.config.training
        guard = StepGuard(c, self.optimizers, self.progress, self.device)
        attended = attended_tokens(self.setup.model_config, c.seq_len)
        shorter = c.attention_mask == "document" or min(attended) < c.seq_len
        flops = self._flops_per_token() if shorter else None
        tally = Tally(self.device, self.data.sources, self.data.mixture, c.seq_len, attended, flops)
        m, balance = self.setup.model_config, None
        experts = experts_of(m)
        for line in unread_keys(c, experts):
            warn_on_rank_0(line)
        if experts:
            balance = Balance(self.model, self.config, experts, m.n_layers, self.device)
        return Step(
            self.config, self.mesh, self.device, self.model, self.optimizers, guard, self.progress, tally, balance,
            self._stop_requested, after_update=partial(scale_gathered_weights, self.config, self.model.parts),
            phase=self.phases,
        )  # fmt: skip
