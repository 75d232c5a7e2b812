"""The training loop. `Trainer` can be subclassed: `next_batch`, `build_loss` and `build_optimizers` are its joints."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dtron
from dtron import compat, registry
from dtron.checkpoint import store
from dtron.config import to_toml
from dtron.data.loader import IGNORE_INDEX, Batch
from dtron.errors import UserError
from dtron.mesh import Mesh
from dtron.models.flops import flops_per_token
from dtron.observe.device import max_memory_bytes, peak_flops_per_s
from dtron.observe.profiler import profiler
from dtron.parallel.compose import meta_model, parallelize
from dtron.parallel.context import gathered_positions, local_positions
from dtron.train.data import open_data
from dtron.train.finite import FiniteCheck
from dtron.train.folder import choose_run_folder
from dtron.train.launch import World
from dtron.train.optimizer import build_optimizers, learning_rate_factor, scale_gradients, squared_gradient_norm
from dtron.train.report import Report, StepClock
from dtron.train.setup import Setup, check_batch, stages_of
from dtron.train.watchdog import Watchdog

__all__ = ["Trainer"]


class Trainer:
    """One run on one rank, from a checked `Setup` inside a started process group."""

    def __init__(self, setup: Setup, world: World) -> None:
        self.setup, self.world = setup, world
        cuda = setup.device_type == "cuda"
        self.device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
        self.run_folder, resume_from, attempt = self._choose_folder()
        self.progress = store.read_progress(resume_from) if resume_from else store.Progress()
        self.progress.attempt = attempt
        comm = setup.config.comm
        self.watchdog = Watchdog(world, comm, self.run_folder, lambda: self.progress.step, sees_all=cuda)
        self.watchdog.start()
        self.config = self._resolve_batch(resume_from)
        self.mesh = Mesh(setup.degrees, setup.device_type)
        compat.set_timeout(setup.config.comm.init_timeout_seconds)  # torch gives the groups of a mesh 30 minutes
        self.model = parallelize(
            setup.spec, setup.model_config, self.config, self.mesh, self.device, self.build_loss(),
            [registry.look_up("converter", name, "model.converters") for name in self.config.model.converters],
        )  # fmt: skip
        self.optimizers = self.build_optimizers()
        self.data = open_data(
            self.config, setup.model_config.vocab_size, setup.degrees, self.mesh.dp_rank, world, self.progress
        )
        # Since the last logged step: [loss, tokens] of each source of a mixture; of documents [tokens, their squares].
        self.by_source = torch.zeros(2, len(self.data.sources), dtype=torch.float64, device=self.device)
        self.by_document = torch.zeros(2, dtype=torch.float64)
        self._load(resume_from)
        self.report = self._build_report()
        self.finite = FiniteCheck(self.device, world.size)

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
            self.world.say(f"nothing to do: step {steps} of {steps} is done; raise training.steps to go on")
            return
        gc.disable()  # collections at different times on different ranks would make all wait for each
        clock = StepClock()
        with profiler(c.profiling, self.run_folder, self.world.rank, steps_done=self.progress.step) as trace:
            for step in range(first, steps + 1):
                stats, share = self.train_step(clock)
                self.finite.watch(step, stats, share)
                trace.step()
                if step % c.training.gc_freq == 0:
                    gc.collect(1)
                if step in (first, steps) or step % c.metrics.log_freq == 0:
                    self._log(stats, clock)
                if step == first:
                    compat.set_timeout(c.comm.train_timeout_seconds)
                    self.watchdog.first_step_done()
                with clock.paused():
                    if self.data.validation and (step == steps or step % c.validation.freq == 0):
                        self.report.validation(step, self.validate())
                    if self._save_is_due(step):
                        self._save(step)
        self.finite.finish()
        self.watchdog.stop()
        gc.enable()
        self.report.end()

    def train_step(self, clock: StepClock) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns [loss, gradient norm before clipping] and this rank's share of the loss."""
        with clock.data():
            batch = Batch(*self.next_batch())
        loss = self.model.loss
        loss.valid_tokens = self._count_valid(batch.labels)
        loss.rows = None if batch.sources is None else []
        share = torch.zeros((), device=self.device)
        forwards = self._local_batches(batch, self.config.training.local_batch_size)
        for i, arguments in enumerate(forwards):
            share += self.model.forward_backward(*arguments, last=i == len(forwards) - 1)
        self.model.finish_gradients()
        self._count(batch, [arguments[1] for arguments in forwards])

        stats = self._reduce(share)
        parameters = [p for _, p in self.model.named_parameters()]
        scale_gradients(parameters, stats[1], self.config.training.max_norm)
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

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss a token over the validation set."""
        assert self.data.validation is not None
        d = self.setup.degrees
        self.model.loss.valid_tokens = torch.ones((), device=self.device)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in self.data.validation:
            total[1] += (batch.labels != IGNORE_INDEX).sum() / (d.world // d.dp)
            for arguments in self._local_batches(batch, self.config.validation.local_batch_size):
                total[0] += self.model.evaluate(*arguments) / d.tp
        dist.all_reduce(total)
        loss, count = total.tolist()
        return loss / count

    # --- parts of a step

    def _count_valid(self, labels: Tensor) -> Tensor:
        """Labels that count in the whole global batch, summed as int64, then fp32 like the loss they divide."""
        count = (labels != IGNORE_INDEX).sum().to(self.device)
        dist.all_reduce(count)
        d = self.setup.degrees
        return (count // (d.world // d.dp)).clamp(min=1).float()

    def _local_batches(self, batch: Batch, size: int) -> list[tuple[Tensor, ...]]:
        """The arguments of each forward, on the device: tokens, labels, positions [size, S / cp].

        Under document masks also documents [size, S / cp] and, under context parallel, keys [size, 2, S].
        """
        p, d = self.config.parallelism, self.setup.degrees
        tokens, labels, documents, _ = batch
        rows, length = tokens.shape
        head_tail = bool(p.context_parallel_load_balancer)
        positions = local_positions(length, self.mesh.cp_rank, d.cp, head_tail)
        arguments = [tokens, labels] if documents is None else [tokens, labels, documents]
        if d.cp > 1:  # a copy, which is not made without need: pinned memory stays pinned
            arguments = [t[:, positions] for t in arguments]
            if documents is not None:
                everywhere = gathered_positions(length, d.cp, head_tail)
                arguments.append(torch.stack((documents[:, everywhere], everywhere.expand(rows, -1)), 1))
        tokens, labels, *places = (t.to(self.device, non_blocking=True) for t in arguments)
        forwards = (tokens, labels, positions.to(self.device).expand(rows, -1), *places)
        return list(zip(*(t.split(size) for t in forwards), strict=True))

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
        """[loss, gradient norm] of the global batch, by one all-reduce over the world, in float64."""
        d = self.setup.degrees
        squares = squared_gradient_norm(self.model.named_parameters(), self.model.aliases, d.stage, self.device)
        stats = torch.stack((share.double() / d.tp, squares))
        dist.all_reduce(stats)
        stats[1].sqrt_()
        return stats

    # --- beginnings

    def _choose_folder(self) -> tuple[Path, Path | None, int]:
        """Run folder, checkpoint to resume from and number of this attempt. Rank 0 looks, so that all agree."""
        chosen: list[Any] = [None]
        if self.world.rank == 0:
            try:
                chosen = [choose_run_folder(self.setup.config, self.setup.model_config)]
            except (OSError, UserError) as error:
                chosen = [UserError(f"job.dump_folder {self.setup.config.job.dump_folder}: {error}")]
        dist.broadcast_object_list(chosen)
        if isinstance(chosen[0], UserError):
            raise chosen[0]
        return chosen[0]

    def _resolve_batch(self, resume_from: Path | None) -> Any:
        """The configuration with the global batch of the run: given, recorded by the checkpoint, or local x dp."""
        c, given = self.setup.config, self.setup.config.training.global_batch_size
        recorded = self.progress.global_batch_size
        if resume_from:
            self.world.say(f"resuming from {resume_from}")
            if given not in (-1, recorded):
                self.world.say(f"the global batch changes from {recorded} to {given} sequences, as configured")
        wanted = recorded if given == -1 and resume_from else given
        self.progress.global_batch_size = check_batch(c, self.setup.degrees, wanted)
        training = dataclasses.replace(c.training, global_batch_size=self.progress.global_batch_size)
        return dataclasses.replace(c, training=training)

    def _load(self, resume_from: Path | None) -> None:
        c = self.config.checkpoint
        if resume_from:
            later = [step for step in store.steps_in(resume_from.parent) if step > self.progress.step]
            if later and not c.load_only:
                raise UserError(
                    f"resuming from step {self.progress.step} would later meet the checkpoints of step "
                    f"{', '.join(map(str, later))} in {resume_from.parent}; move them away, or start a run of its own "
                    "with another job.dump_folder and checkpoint.initial_load_path"
                )
            store.load(resume_from, self.model, self.optimizers)
        elif c.initial_load_path:
            path = Path(c.initial_load_path)
            store.load(path, self.model, None if c.initial_load_model_only else self.optimizers)
            self.world.say(f"weights from {path}")

    def _build_report(self) -> Report:
        model = meta_model(self.setup.spec, self.setup.model_config)
        flops = self._flops_per_token(self.config.training.seq_len)
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else "cpu"
        c, d = self.config, self.setup.degrees
        what = c.model.hf_config_path or f"{c.model.name} {c.model.flavor}"
        forwards = c.training.global_batch_size // (c.training.local_batch_size * d.dp)
        self.world.say(
            f"dtron {dtron.__version__}, torch {torch.__version__}: {d}, on {self.world.size} x {name}\n"
            f"{what}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
            f"{flops / 1e9:.3g} GFLOP a token\n"
            f"{c.training.global_batch_size} sequences of {c.training.seq_len} tokens a step, "
            f"{forwards} forward(s) a rank\n"
            f"outputs in {self.run_folder}"
        )
        if plan := stages_of(self.setup):
            for rank, stages in enumerate(plan.of_rank):
                parts = (f"{s} ({plan.modules[s][0]} to {plan.modules[s][-1]})" for s in stages)
                self.world.say(f"pipeline rank {rank}: stage {', '.join(parts)}")
        peak = peak_flops_per_s(name) if cuda else None
        if cuda and peak is None:
            self.world.say(f"the peak FLOP/s of {name} is not known here: MFU is left out")
        entropy = getattr(self.data.held_out, "unigram_entropy", None) if self.world.rank == 0 else None
        return Report(self.world, c, to_toml(c), self.run_folder, self.progress.attempt, flops, peak, entropy)

    def _flops_per_token(self, attended: float) -> float:
        """attended: tokens that a token's attention counts, the sequence or the mean of the documents."""
        m = self.setup.model_config
        return flops_per_token(meta_model(self.setup.spec, m), m.n_layers, self.setup.spec.attention_flops(m, attended))

    # --- ends of a step

    def _log(self, stats: Tensor, clock: StepClock) -> None:
        loss, norm = stats.tolist()
        memory = torch.tensor(max_memory_bytes(self.device), device=self.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        row = {
            "step": self.progress.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": self.learning_rate(self.progress.step),
        }
        row |= {"tokens": self.progress.tokens, "max_memory_bytes": int(memory), **self._sums()}
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
        if not c.enable or c.load_only:
            return False
        last = step == self.config.training.steps
        return last or step % c.interval == 0 or (step == 1 and c.enable_first_step_checkpoint)

    def _save(self, step: int) -> None:
        self.finite.finish()  # nothing that is not finite is ever saved
        c = self.config.checkpoint
        weights_only = step == self.config.training.steps and c.last_save_model_only
        self.progress.streams = self.data.gathered_state()
        folder = self.run_folder / c.folder
        store.save(folder / f"step-{step}", self.model, None if weights_only else self.optimizers, self.progress)
        store.delete_old(folder, c.keep_latest_k)
