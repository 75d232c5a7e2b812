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
from dtron.data.loader import IGNORE_INDEX, StepLoader, ValidationLoader
from dtron.errors import UserError
from dtron.mesh import Mesh
from dtron.models.flops import flops_per_token
from dtron.observe.device import max_memory_bytes, peak_flops_per_s
from dtron.observe.profiler import profiler
from dtron.parallel.compose import meta_model, parallelize
from dtron.parallel.context import local_positions
from dtron.train.finite import FiniteCheck
from dtron.train.folder import choose_run_folder
from dtron.train.launch import World
from dtron.train.optimizer import build_optimizers, learning_rate_factor, scale_gradients, squared_gradient_norm
from dtron.train.report import Report, StepClock
from dtron.train.setup import Setup, check_batch, stages_of

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
        self.config = self._resolve_batch(resume_from)
        self.mesh = Mesh(setup.degrees, setup.device_type)
        compat.set_timeout(setup.config.comm.init_timeout_seconds)  # torch gives the groups of a mesh 30 minutes
        self.model = parallelize(
            setup.spec, setup.model_config, self.config, self.mesh, self.device, self.build_loss(),
            [registry.look_up("converter", name, "model.converters") for name in self.config.model.converters],
        )  # fmt: skip
        self.optimizers = self.build_optimizers()
        self.loader, self.validation = self._build_loaders()
        self._load(resume_from)
        self.report = self._build_report()
        self.finite = FiniteCheck(self.device, world.size)

    # --- the joints

    def build_loss(self) -> Any:
        """(logits [B, S, V], labels [B, S]) -> loss of every token [B, S]; the trainer divides their sum by their global number."""
        return registry.look_up("loss", self.config.training.loss, "training.loss")

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimizer for each module in `self.model.parts`."""
        return build_optimizers(self.model, self.config.optimizer)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This data-parallel rank's tokens and labels of the next optimizer step: int64 [rows, S] on the CPU."""
        return next(self.loader)

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
                with clock.paused():
                    if self.validation and (step == steps or step % c.validation.freq == 0):
                        self.report.validation(step, self.validate())
                    if self._save_is_due(step):
                        self._save(step)
        self.finite.finish()
        gc.enable()
        self.report.end()

    def train_step(self, clock: StepClock) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns [loss, gradient norm before clipping] and this rank's share of the loss."""
        with clock.data():
            tokens, labels = self.next_batch()
        self.model.loss.valid_tokens = self._count_valid(labels)
        share = torch.zeros((), device=self.device)
        batches = self._local_batches(tokens, labels, self.config.training.local_batch_size)
        for i, batch in enumerate(batches):
            share += self.model.forward_backward(*batch, last=i == len(batches) - 1)
        self.model.finish_gradients()

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
        assert self.validation is not None
        d = self.setup.degrees
        self.model.loss.valid_tokens = torch.ones((), device=self.device)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for tokens, labels in self.validation:
            total[1] += (labels != IGNORE_INDEX).sum() / (d.world // d.dp)
            for batch in self._local_batches(tokens, labels, self.config.validation.local_batch_size):
                total[0] += self.model.evaluate(*batch) / d.tp
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

    def _local_batches(self, tokens: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(tokens, labels, positions) [size, S / cp] on the device for each forward of the step."""
        p, d = self.config.parallelism, self.setup.degrees
        head_tail = bool(p.context_parallel_load_balancer)
        positions = local_positions(tokens.size(1), self.mesh.cp_rank, d.cp, head_tail)
        if d.cp > 1:  # a copy, which is not made without need: pinned memory stays pinned
            tokens, labels = tokens[:, positions], labels[:, positions]
        on_device = [t.to(self.device, non_blocking=True) for t in (tokens, labels)]
        rows = positions.to(self.device).expand(size, -1)
        return [(x, y, rows) for x, y in zip(*(t.split(size) for t in on_device), strict=True)]

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

    def _build_loaders(self) -> tuple[StepLoader, ValidationLoader | None]:
        c, d = self.config, self.setup.degrees
        shared: Any = {"dp_rank": self.mesh.dp_rank, "dp_size": d.dp}
        data = self._dataset(c.training, "train", c.training.seq_len)
        self._check_same_data(getattr(data, "fingerprint", ""))
        loader = StepLoader(
            data, global_batch_size=c.training.global_batch_size, seed=c.debug.seed, options=c.training.dataloader,
            consumed=self.progress.consumed, **shared,
        )  # fmt: skip
        self.held_out = None
        if not c.validation.enable:
            return loader, None
        self.held_out = self._dataset(c.validation, "validation", c.validation.seq_len or c.training.seq_len)
        validation = ValidationLoader(
            self.held_out, global_batch_size=c.validation.local_batch_size * d.dp, steps=c.validation.steps,
            options=c.validation.dataloader, **shared,
        )  # fmt: skip
        return loader, validation

    def _dataset(self, section: Any, split: str, seq_len: int) -> Any:
        """Build a dataset; the first rank of each machine prepares it while the others wait."""
        build = registry.look_up("dataset", section.dataset, f"{'training' if split == 'train' else split}.dataset")
        vocab_size = self.setup.model_config.vocab_size
        data = None
        for turn in (True, False):
            if (self.world.local_rank == 0) == turn:
                data = build(self.config, section, split, seq_len, vocab_size, self.world.say)
            dist.barrier()
        assert data is not None
        if data.vocab_size > vocab_size:
            raise UserError(
                f"{section.dataset}: the tokenizer has {data.vocab_size} tokens, but model.vocab_size is {vocab_size}; "
                f"set model.vocab_size to {data.vocab_size} or more"
            )
        return data

    def _check_same_data(self, fingerprint: str) -> None:
        """UserError if ranks, or a resumed run and its checkpoint, have other data under the same name."""
        prints: list[str] = [""] * self.world.size
        dist.all_gather_object(prints, fingerprint)
        name, recorded = self.config.training.dataset, self.progress.data_fingerprint
        if other := [rank for rank, print_ in enumerate(prints) if print_ != prints[0]]:
            raise UserError(
                f"rank {other[0]} has other tokens of dataset {name} than rank 0 (another Python version, say); "
                "use the same sources on every machine, or a shared job.cache_folder"
            )
        if recorded and fingerprint != recorded:
            raise UserError(
                f"dataset {name} is not the one this run was trained on (another Python version, say): its fingerprint "
                f"is {fingerprint[:12]}, the checkpoint's {recorded[:12]}; bring it back, or start a run of its own"
            )
        self.progress.data_fingerprint = fingerprint

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
        attention = self.setup.spec.attention_flops(self.setup.model_config, self.config.training.seq_len)
        flops = flops_per_token(model, self.setup.model_config.n_layers, attention)
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
        entropy = getattr(self.held_out, "unigram_entropy", None)
        return Report(self.world, c, to_toml(c), self.run_folder, self.progress.attempt, flops, peak, entropy)

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
        self.report.step({**row, "tokens": self.progress.tokens, "max_memory_bytes": int(memory)}, clock)

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
        folder = self.run_folder / c.folder
        store.save(folder / f"step-{step}", self.model, None if weights_only else self.optimizers, self.progress)
        store.delete_old(folder, c.keep_latest_k)
