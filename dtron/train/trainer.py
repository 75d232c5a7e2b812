"""The training loop. `Trainer` can be subclassed: `next_batch`, `build_loss` and `build_optimizers` are its joints."""

import dataclasses
import gc
import hashlib
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtron import compat, registry
from dtron.checkpoint.export import export
from dtron.checkpoint.load import from_rank_0
from dtron.checkpoint.place import Place
from dtron.checkpoint.save import Saved, Saver
from dtron.config import to_toml
from dtron.data.loader import IGNORE_INDEX, Batch
from dtron.errors import UserError
from dtron.mesh import Mesh
from dtron.models.flops import flops_per_token
from dtron.models.spec import meta_model
from dtron.observe.device import device_name, max_memory_bytes, peak_flops_per_s
from dtron.observe.profiler import profiler
from dtron.parallel.compose import parallelize
from dtron.train.assets import check_vocabulary, model_assets
from dtron.train.begin import begin, load_begun
from dtron.train.control import LONG_S
from dtron.train.data import open_data
from dtron.train.folder import saves
from dtron.train.forward import local_batches, mean_loss
from dtron.train.guard import StepGuard
from dtron.train.launch import World
from dtron.train.optimizer import build_optimizers, learning_rate_factor, scale_gradients, squared_gradient_norm
from dtron.train.report import Report, StepClock
from dtron.train.setup import Setup, check_batch, describe, stages_of
from dtron.train.watchdog import Watchdog

__all__ = ["Trainer"]

MARGIN_S = 60.0  # beside a timeout of [comm], for the watchdog to say what it was
SLOWER = 10  # times the slowest step so far: a step may take longer than ranks may wait for each other
EXPORT_TIMEOUT_S = 24 * 3600  # ranks wait for those with more files to write


class Trainer:
    """One run on one rank, from a checked `Setup` inside a started process group."""

    def __init__(self, setup: Setup, world: World) -> None:
        self.setup, self.world = setup, world
        self.device = setup.device(world.local_rank)
        self.begun = begin(setup, world)
        self.run_folder, self.progress = self.begun.run_folder, self.begun.progress
        comm, alive = setup.config.comm, world.control.alive
        alive("starting", LONG_S, self.progress.step)
        sees_all = setup.device_type == "cuda"
        self.watchdog = Watchdog(world, comm, self.run_folder, lambda: self.progress.step, sees_all=sees_all)
        self.watchdog.start()
        self.config = self._resolve_batch()
        self.mesh = Mesh(setup.degrees, setup.device_type)
        compat.set_timeout(setup.config.comm.init_timeout_seconds)  # torch gives the groups of a mesh 30 minutes
        self.model = parallelize(
            setup.spec, setup.model_config, self.config, self.mesh, self.device, self.build_loss(),
            [registry.look_up("converter", name, "model.converters") for name in self.config.model.converters],
        )  # fmt: skip
        self.optimizers = self.build_optimizers()
        alive("opening the data", LONG_S, self.progress.step)
        self.data = open_data(
            self.config, setup.model_config.vocab_size, setup.degrees, self.mesh.dp_rank, world, self.progress
        )
        # Since the last logged step: [loss, tokens] of each source of a mixture; of documents [tokens, their squares].
        self.by_source = torch.zeros(2, len(self.data.sources), dtype=torch.float64, device=self.device)
        self.by_document = torch.zeros(2, dtype=torch.float64)
        alive("loading", LONG_S, self.progress.step)
        if not self.begun.resume_from:
            check_vocabulary(self.config, self.data.first)
        load_begun(self.begun, setup, self.model, self.optimizers, world)
        self.saver = self._build_saver()
        self.saved_step = self.progress.step if self.begun.resume_from else -1
        self.last_save: Saved | None = None
        self.report = self._build_report()
        self.guard = StepGuard(
            self.config.training, self.optimizers, self.progress, self.device, world.size, world.say
        )  # fmt: skip

    # --- the joints

    def build_loss(self) -> Any:
        """(logits [B, S, V], labels [B, S]) -> loss of every token [B, S]; the trainer sums and divides them."""
        return registry.look_up("loss", self.config.training.loss, "training.loss")

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimizer for each module in `self.model.parts`."""
        return build_optimizers(self.model, self.config.optimizer)

    def next_batch(self) -> Batch | tuple[Tensor, Tensor]:
        """This data-parallel rank's rows of the next optimizer step; or tokens and labels alone."""
        return next(self.data.loader)

    # --- the loop

    def run(self) -> None:
        """Train until `training.steps`; validate, save and log on the way."""
        c, steps, first = self.config, self.config.training.steps, self.progress.step + 1
        if first > steps:
            self.world.say(f"nothing to do: step {first - 1} is done, of training.steps {steps}; raise it to go on")
            self._export()  # a finished run may be asked for it later
            self.world.control.done(first - 1)
            return
        gc.disable()  # collections at different times on different ranks would make all wait for each
        self.world.stop.arm()
        self.report.started()
        clock = StepClock()
        with profiler(c.profiling, self.run_folder, self.world.rank, steps_done=self.progress.step) as trace:
            beat_s, slowest_s = LONG_S, 0.0  # the first step compiles
            for step in range(first, steps + 1):
                self.world.control.alive("training", beat_s, step - 1)
                began_s = time.monotonic()
                saving = self.saver is not None and self.saver.busy
                stats, share = self.train_step(clock)
                self.guard.watch(step, stats, share)
                clock.end_step(saving)
                trace.step()
                took_s = time.monotonic() - began_s
                slowest_s = took_s if step <= first + 1 else max(slowest_s, took_s)
                beat_s = max(c.comm.train_timeout_seconds + MARGIN_S, SLOWER * slowest_s)
                if step % c.training.gc_freq == 0:
                    gc.collect(1)
                if step in (first, steps) or step % c.metrics.log_freq == 0:
                    self._log(stats, clock)
                if step == first:
                    compat.set_timeout(c.comm.train_timeout_seconds)
                    self.watchdog.first_step_done()
                if self.guard.stop_asked and step < steps:
                    break  # the time that is given to save is short: no validation
                if self.data.held_out and (step == steps or step % c.validation.freq == 0):
                    self.world.control.alive("validating", LONG_S, step)
                    with clock.paused("validation"):
                        loss, _ = mean_loss(self.model, self.data.held_out.loader, c, self.mesh, self.device)
                        self.report.validation(step, loss)
                with clock.paused("checkpoint"):
                    if self._save_is_due(step):
                        self.world.control.alive("saving", LONG_S, step)
                        self._save(step, clock)
                    elif self.saver:
                        self._tell(self.saver.poll(), clock)
        self.world.control.alive("finishing", LONG_S, self.progress.step)
        with clock.paused("checkpoint"):
            self._finish(clock)
        self.watchdog.stop()
        gc.enable()
        self._export()
        self.report.end(self.progress.step, clock)
        if self.progress.step == steps:
            self.world.control.done(steps)

    def train_step(self, clock: StepClock) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns what `StepGuard.watch` reads, and this rank's share of the loss."""
        self._seed_random(self.progress.step + 1)
        with clock.data():
            batch = Batch(*self.next_batch())
        loss = self.model.loss
        loss.valid_tokens = self._count_valid(batch.labels)
        loss.rows = None if batch.sources is None else []
        share = torch.zeros((), device=self.device)
        c = self.config
        forwards = local_batches(batch, c.training.local_batch_size, c.parallelism, self.mesh, self.device)
        for i, arguments in enumerate(forwards):
            share += self.model.forward_backward(*arguments, last=i == len(forwards) - 1)
        self.model.finish_gradients()
        self._count(batch, [arguments[1] for arguments in forwards])

        stats = self._reduce(share)
        stats = torch.cat((stats, self.guard.judge(stats)))
        parameters = [p for _, p in self.model.named_parameters()]
        scale_gradients(parameters, stats[1], self.config.training.max_norm)
        if self.saver:
            self.saver.before_update()
        self.progress.step += 1
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(self.progress.step)
            optimizer.step()
            optimizer.zero_grad()
        self.progress.consumed += self.config.training.global_batch_size
        self.progress.tokens += self.config.training.global_batch_size * self.config.training.seq_len
        return stats, share

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 1)."""
        c = self.config
        return c.optimizer.lr * learning_rate_factor(c.lr_scheduler, step, c.training.steps)

    # --- parts of a step

    def _count_valid(self, labels: Tensor) -> Tensor:
        """Labels that count in the whole global batch, summed as int64, then fp32 like the loss they divide."""
        count = (labels != IGNORE_INDEX).sum().to(self.device)
        dist.all_reduce(count)
        d = self.setup.degrees
        return (count // (d.world // d.dp)).clamp(min=1).float()

    def _count(self, batch: Batch, labels: list[Tensor]) -> None:
        """Add a step to the sums of the metrics; labels: on the device, of each forward."""
        if batch.documents is not None:
            ones = torch.ones_like(batch.documents)
            lengths = torch.zeros_like(ones).scatter_add_(1, batch.documents, ones)  # where a document begins; else 0
            self.by_document += torch.stack((lengths.sum(), lengths.square().sum()))
        rows, self.model.loss.rows = self.model.loss.rows, None
        if rows and batch.sources is not None:  # on ranks with the last pipeline stage
            sources = batch.sources.to(self.device, non_blocking=True)
            # The last ones: in its first step torch's pipeline also calls the loss once to learn its shape.
            self.by_source[0].index_add_(0, sources, torch.cat(rows)[-len(sources) :].double())
            valid = (torch.cat(labels) != IGNORE_INDEX).sum(1)
            self.by_source[1].index_add_(0, sources, valid.double())

    def _reduce(self, share: Tensor) -> Tensor:
        """[loss, gradient norm, ranks asked to stop] of the global batch: one all-reduce over the world, in float64."""
        d = self.setup.degrees
        squares = squared_gradient_norm(self.model.named_parameters(), self.model.aliases, d.stage, self.device)
        asked = torch.full_like(squares, bool(self.world.stop.asked) or self.world.control.stop_wanted())
        stats = torch.stack((share.double() / d.tp, squares, asked))
        dist.all_reduce(stats)
        stats[1].sqrt_()
        return stats

    # --- beginnings

    def _resolve_batch(self) -> Any:
        """The configuration with the global batch of the run: given, recorded by the checkpoint, or local x dp."""
        c, given = self.setup.config, self.setup.config.training.global_batch_size
        recorded, steps = self.progress.global_batch_size, self.progress.steps
        if self.begun.resume_from:
            self.world.say(f"resuming from {self.begun.resume_from}")
            if given not in (-1, recorded):
                self.world.say(f"the global batch changes from {recorded} to {given} sequences, as configured")
            if (
                c.training.steps != steps
                and c.training.steps > self.progress.step
                and c.lr_scheduler.total_steps is None
            ):
                self.world.say(
                    f"training.steps changes from {steps} to {c.training.steps}, and with it the learning rate from "
                    f"here on; lr_scheduler.total_steps = {steps} would keep it"
                )
        wanted = recorded if given == -1 and self.begun.resume_from else given
        self.progress.global_batch_size = check_batch(c, self.setup.degrees, wanted)
        self.progress.steps = c.training.steps
        training = dataclasses.replace(c.training, global_batch_size=self.progress.global_batch_size)
        return dataclasses.replace(c, training=training)

    def _build_report(self) -> Report:
        flops = self._flops_per_token(self.config.training.seq_len)
        c, name = self.config, device_name(self.device)
        forwards = c.training.global_batch_size // (c.training.local_batch_size * self.setup.degrees.dp)
        self.world.say(
            f"{describe(self.setup, self.device)}, {flops / 1e9:.3g} GFLOP a token\n"
            f"{c.training.global_batch_size} sequences of {c.training.seq_len} tokens a step, "
            f"{forwards} forward(s) a rank\n"
            f"outputs in {self.run_folder}"
        )
        if plan := stages_of(self.setup):
            for rank, stages in enumerate(plan.of_rank):
                parts = (f"{s} ({plan.modules[s][0]} to {plan.modules[s][-1]})" for s in stages)
                self.world.say(f"pipeline rank {rank}: stage {', '.join(parts)}")
        cuda = self.device.type == "cuda"
        peak = peak_flops_per_s(name) if cuda else None
        if cuda and peak is None:
            self.world.say(f"the peak FLOP/s of {name} is not known here: MFU is left out")
        held_out = self.data.held_out.dataset if self.data.held_out else None
        entropy = getattr(held_out, "unigram_entropy", None) if self.world.rank == 0 else None
        return Report(
            self.world, c, to_toml(c), self.run_folder, self.progress.attempt, flops, peak, entropy,
            self.progress.ledger,
        )  # fmt: skip

    def _flops_per_token(self, attended: float) -> float:
        """attended: tokens that a token's attention counts, the sequence or the mean of the documents."""
        m = self.setup.model_config
        return flops_per_token(meta_model(self.setup.spec, m), m.n_layers, self.setup.spec.attention_flops(m, attended))

    # --- ends of a step

    def _log(self, stats: Tensor, clock: StepClock) -> None:
        loss, norm = stats[:2].tolist()
        memory = torch.tensor(max_memory_bytes(self.device), device=self.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        row = {
            "step": self.progress.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": self.learning_rate(self.progress.step),
        }
        row |= {"tokens": self.progress.tokens, "max_memory_bytes": int(memory), **self._sums()}
        if self.progress.skipped:
            row["skipped_steps"] = self.progress.skipped
        self.report.step(row, clock)

    def _sums(self) -> dict[str, Any]:
        """Metrics of the documents and of each source since the last logged step."""
        row: dict[str, Any] = {}
        if self.config.training.attention_mask == "document":
            documents = self.by_document.to(self.device)
            dist.all_reduce(documents)
            tokens, squares = documents.tolist()
            row["attended_tokens"] = squares / tokens
            row["flops_per_token"] = self._flops_per_token(squares / tokens)
            self.by_document.zero_()
        if self.data.sources:
            dist.all_reduce(self.by_source)
            given = self.data.mixture.before(self.progress.consumed) * self.config.training.seq_len
            for name, loss, valid, tokens in zip(self.data.sources, *self.by_source.tolist(), given, strict=True):
                row |= {f"source_loss/{name}": loss / valid if valid else None, f"source_tokens/{name}": int(tokens)}
            self.by_source.zero_()
        return row

    def _save_is_due(self, step: int) -> bool:
        c = self.config.checkpoint
        if self.saver is None:
            return False
        last = step == self.config.training.steps
        return last or step % c.interval == 0 or (step == 1 and c.enable_first_step_checkpoint)

    def _save(self, step: int, clock: StepClock) -> None:
        assert self.saver is not None
        self.guard.finish()  # nothing that is not finite is ever saved
        weights_only = step == self.config.training.steps and self.config.checkpoint.last_save_model_only
        self.progress.streams = self.data.gathered_state()
        self.progress.ledger = self.report.account(clock)
        ended = self.saver.save(self.model, None if weights_only else self.optimizers, self.progress)
        self.saved_step = step
        self._tell(ended, clock)

    def _tell(self, ended: list[Saved], clock: StepClock) -> None:
        """Report the saves that are over; one that failed is told and counted, and the run goes on."""
        for saved in ended:
            self.last_save = saved
            self.progress.failed_saves += bool(saved.error)
            self.report.saved(saved, self.progress.failed_saves, clock.slowdown())

    def _finish(self, clock: StepClock) -> None:
        """After the last step, or the one that a signal asked to be the last. UserError if it could not be saved."""
        self.guard.finish()
        step, c = self.progress.step, self.config.checkpoint
        stopped = self.guard.stop_asked and step < self.config.training.steps
        if stopped and self.saver is None:
            why = "checkpoint.load_only is true" if c.enable else "checkpoint.enable is false"
            raise UserError(f"stopped by {self._asked_by()} after step {step}, and nothing was saved: {why}")
        if self.saver is None:
            return
        if stopped:
            self.world.say(f"asked to stop by {self._asked_by()}: saving after step {step}")
        if step != self.saved_step:
            self._save(step, clock)
        self._tell(self.saver.wait(), clock)
        if self.last_save is not None and self.last_save.error:
            raise UserError(
                f"the checkpoint of step {step} could not be saved: {self.last_save.error}; when that is mended, the "
                f"same command goes on from the newest one in {self.begun.checkpoints}, if there is one"
            )
        if stopped and self.world.rank == 0:
            by = self._asked_by()
            self.world.control.saved(step, f"{self.begun.checkpoints}/step-{step}", by)
            print(f"stopped by {by} after step {step}, which is saved", flush=True)

    def _asked_by(self) -> str:
        return "the file STOP" if self.world.control.stop_wanted() else "a signal"

    def _build_saver(self) -> Saver | None:
        if not saves(self.config.checkpoint):
            return None
        given = self.config.checkpoint.initial_load_path
        source = self.begun.resume_from or (Place.at(given) if given else None)
        assets = model_assets(self.setup, source, self.data.first) if self.world.rank == 0 else {}
        return Saver(self.begun.checkpoints, self.config.checkpoint, assets)

    def _export(self) -> None:
        """Write the weights of a finished run for Hugging Face. UserError if that fails; the checkpoint stays."""
        step, c = self.progress.step, self.config.checkpoint
        out = self.run_folder / "hf" / f"step-{step}"
        if not c.last_save_in_hf or step != self.config.training.steps or from_rank_0(out.exists):
            return
        compat.set_timeout(EXPORT_TIMEOUT_S)
        whole = meta_model(self.setup.spec, self.setup.model_config)
        shapes = {f"model.{name}": tuple(p.shape) for name, p in whole.named_parameters()}
        checkpoint = self.begun.checkpoints / f"step-{step}"
        try:
            export(checkpoint, out, shapes, c.export_dtype, self.world.say)
        except UserError as error:
            raise UserError(f"{error}; the run is saved, and `dtron convert {checkpoint} DST` tries again") from None
        self.world.say(f"weights for Hugging Face in {out}")

    def _seed_random(self, step: int) -> None:
        """Random numbers of a step, which dropout draws for example, are a function of (seed, step, mesh coordinates).

        So nothing of them is saved, and a resume draws what the uninterrupted run would have. Every rank draws
        differently: those of one tensor-parallel group hold different parts of the sequence and different heads.
        """
        m = self.mesh
        key = f"{self.config.debug.seed} {step} {m.dp_rank} {m.cp_rank} {m.pp_rank} {m.tp_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
