"""When a run saves and what; how it ends: stopped as requested, done, exported."""

import logging
from pathlib import Path

from dtron import compat
from dtron.checkpoint.export import export
from dtron.checkpoint.save import Saved, Saver, check_optimizer_state
from dtron.checkpoint.storage import StoragePath
from dtron.config import Config
from dtron.errors import UserError
from dtron.models.spec import meta_model
from dtron.ranks.agree import from_all_ranks, from_rank_0
from dtron.ranks.control import StopError
from dtron.ranks.world import World
from dtron.train.assets import model_assets
from dtron.train.data import RunData
from dtron.train.folder import saves
from dtron.train.report import Report, StepClock
from dtron.train.setup import Setup
from dtron.train.start import ResumePoint
from dtron.train.step import Step

__all__ = ["Saving"]

log = logging.getLogger(__name__)

EXPORT_TIMEOUT_S = 24 * 3600  # ranks wait for those with more files to write


class LostWorkerError(UserError):
    """A process that loads data was killed. That may pass."""

    kind = "lost"


class Saving:
    """The checkpoints of one run. Made, and called, on all ranks alike."""

    def __init__(
        self, setup: Setup, config: Config, start: ResumePoint, data: RunData, step: Step, report: Report, world: World
    ) -> None:
        self._setup, self._config, self._start, self._world = setup, config, start, world
        self._data, self._step, self._report = data, step, report
        self._saver: Saver | None = None
        if saves(config.checkpoint):
            given = config.checkpoint.initial_load_path
            source = start.resume_from or (StoragePath.at(given) if given else None)
            assets = model_assets(setup, source, data.first) if world.rank == 0 else {}
            self._saver = Saver(start.checkpoints, config.checkpoint, assets)
            step.before_update = self._saver.before_update
        self._saved_step = step.progress.step if start.resume_from else -1
        self._last: Saved | None = None

    @property
    def busy(self) -> bool:
        """A checkpoint is being written in the background."""
        return self._saver is not None and self._saver.busy

    def first_step_done(self) -> None:
        """The optimizers have state now. UserError if a checkpoint would not hold all of it."""
        if self._saver is not None:
            check_optimizer_state(self._step.model, self._step.optimizers)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after optimizer step `step`."""
        c = self._config.checkpoint
        if self._saver is None:
            return False
        last = step == self._config.training.steps
        return last or step % c.interval == 0 or (step == 1 and c.enable_first_step_checkpoint)

    def save(self, clock: StepClock) -> None:
        """Save the state after the last step."""
        assert self._saver is not None
        progress = self._step.progress
        self._step.guard.finish()  # nothing that is not finite is ever saved
        weights_only = progress.step == self._config.training.steps and self._config.checkpoint.last_save_model_only
        progress.streams = self._data.gathered_state()
        progress.ledger = self._report.account(clock)
        ended = self._saver.save(self._step.model, None if weights_only else self._step.optimizers, progress)
        self._saved_step = progress.step
        self._note(ended, clock)

    def poll(self, clock: StepClock) -> None:
        """Report a save that has ended in the background."""
        if self._saver is not None:
            self._note(self._saver.poll(), clock)

    def _note(self, ended: list[Saved], clock: StepClock) -> None:
        """Report saves that have ended; one that failed is counted, and the run continues."""
        for saved in ended:
            self._last = saved
            self._step.progress.failed_saves += bool(saved.error)
            self._report.saved(saved, self._step.progress.failed_saves, clock.slowdown())

    def finish(self, clock: StepClock) -> None:
        """After the last step, or the one at which the ranks stop as requested. UserError if it could not be saved."""
        self._step.guard.finish()
        step, c = self._step.progress.step, self._config.checkpoint
        stopped = self._step.guard.stop_requested and step < self._config.training.steps
        lost = self._lost_worker() if stopped else ""
        problem = next(filter(None, from_all_ranks(self._data.problem)), "") if stopped and not lost else ""
        by = "the end of its data" if problem else self._stopped_by() or "a signal"  # which another rank got
        if stopped and self._saver is None:
            why = "checkpoint.load_only is true" if c.enable else "checkpoint.enable is false"
            if lost:
                raise LostWorkerError(f"{lost}; it ended after step {step}, and nothing was saved: {why}")
            raise UserError(f"{problem or f'stopped by {by}'} after step {step}, and nothing was saved: {why}")
        if self._saver is None:
            return
        if stopped and not lost:
            log.info("stop requested by %s: saving after step %d", by, step)
        if step != self._saved_step:
            self.save(clock)
        self._note(self._saver.wait(), clock)
        if self._last is not None and self._last.error:
            raise UserError(
                f"the checkpoint of step {step} could not be saved: {self._last.error}; when that is fixed, the same "
                f"command resumes from the newest one in {self._start.checkpoints}, if there is one"
            )
        if lost:
            raise LostWorkerError(f"{lost}; step {step} is saved, and the same command resumes from there")
        if problem:
            raise UserError(
                f"{problem}; step {step} is saved, and when that is put right the same command resumes from there "
                "(with --checkpoint.allow_changed_data if the data changed)"
            )
        if stopped and self._world.rank == 0:
            self._world.control.saved(step, f"{self._start.checkpoints}/step-{step}", by)
            log.info("stopped by %s after step %d, which is saved", by, step)

    def _lost_worker(self) -> str:
        """Which rank has lost a data worker, and to what; empty: none. On all ranks."""
        lost = from_all_ranks(self._data.lost_worker)
        return next((f"rank {rank}: its {what}" for rank, what in enumerate(lost) if what), "")

    def export(self) -> bool:
        """Write the weights of a finished run for Hugging Face. UserError if that fails; the checkpoint stays.

        False if a requested stop ended it: the same command then writes them.
        """
        step, c = self._step.progress.step, self._config.checkpoint
        out: Path = self._start.run_folder / "hf" / f"step-{step}"
        if not c.last_save_in_hf or step != self._config.training.steps or from_rank_0(out.exists):
            return True

        def say(text: str) -> None:
            log.info(text)
            if self._world.control.stop_requested():
                raise StopError("stopped by the file STOP")

        compat.set_timeout(EXPORT_TIMEOUT_S)
        whole = meta_model(self._setup.spec, self._setup.model_config)
        shapes = {f"model.{name}": tuple(p.shape) for name, p in whole.named_parameters()}
        checkpoint = self._start.checkpoints / f"step-{step}"
        try:
            with self._world.stop.raising():
                export(checkpoint, out, shapes, c.export_dtype, say)
        except UserError as error:
            if by := self._stopped_by():
                if self._world.rank == 0:
                    self._world.control.saved(step, str(checkpoint), by)
                log.info("stopped by %s: step %d is saved; the same command writes its weights to %s", by, step, out)
                return False
            raise UserError(f"{error}; the run is saved, and `dtron convert {checkpoint} DST` tries again") from None
        log.info("weights for Hugging Face in %s", out)
        return True

    def _stopped_by(self) -> str:
        """What requested a stop, as far as this rank knows; empty: nothing."""
        if self._world.control.stop_requested():
            return "the file STOP"
        return "a signal" if self._world.stop.signal_name else ""
