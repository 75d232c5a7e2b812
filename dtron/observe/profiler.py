"""torch.profiler traces of a few steps out of many, one Chrome trace per rank."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dtron.config.sections import Profiling
from dtron.errors import UserError
from dtron.observe.trace_names import name_collectives

__all__ = ["Off", "profiler"]


class Off:
    """The profiler when it is off: a context that does nothing."""

    def __enter__(self) -> "Off":
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def step(self) -> None:
        """Do nothing."""


def check_profiling(config: Profiling) -> None:
    """UserError if warm-up and recording do not fit into `profile_freq`."""
    needed = config.profiler_warmup + config.profiler_active
    if config.enable_profiling and config.profile_freq < needed:
        raise UserError(
            f"profiling.profile_freq = {config.profile_freq} is less than profiler_warmup + profiler_active = "
            f"{config.profiler_warmup} + {config.profiler_active}: a trace would start before the last one ends. "
            f"Set profiling.profile_freq to {needed} or more."
        )


def profiler(config: Profiling, run_folder: Path | str, rank: int, *, steps_done: int = 0) -> profile | Off:
    """A context whose `.step()` follows the optimizer steps; does nothing when profiling is off.

    Of every `profile_freq` steps the last `profiler_active` are recorded, after `profiler_warmup`
    steps that only warm the profiler up. Traces (chrome://tracing, Perfetto) land in
    `run_folder/save_traces_folder/iteration_N/rank_R.json.gz`, N being the last step recorded, collectives named by
    their dimension.
    `steps_done`: steps before this attempt began, so that N counts from the start of the run.
    Raises UserError if warm-up and recording do not fit into `profile_freq`.
    """
    if not config.enable_profiling:
        return Off()
    check_profiling(config)
    wait = config.profile_freq - config.profiler_warmup - config.profiler_active
    traces = Path(run_folder) / config.save_traces_folder

    def save(prof: profile) -> None:
        folder = traces / f"iteration_{steps_done + prof.step_num}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rank_{rank}.json.gz"
        prof.export_chrome_trace(str(file))
        name_collectives(file)

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=wait, warmup=config.profiler_warmup, active=config.profiler_active)
    return profile(activities=activities, schedule=plan, on_trace_ready=save)
