"""At the end of a run: the planner's prediction beside what was measured.

It is asked by `dtron plan --measured` when all is saved and done: whatever happens there is one line here.
"""

import logging
import subprocess

from dtron.config import Config
from dtron.observe.device import device_name
from dtron.train.planner import plan_command
from dtron.train.trainer import Trainer

__all__ = ["compare_with_prediction"]

log = logging.getLogger(__name__)

DEADLINE_S = 120  # of the planner; a stage of 405B takes it 5 CPU-seconds, and it looks at three


def compare_with_prediction(config: Config, trainer: Trainer) -> None:
    """Log the prediction of a run that has done all its steps, beside what was measured, or why there is none.

    One that was stopped before is to end at once: a scheduler may be about to kill it.
    """
    if trainer.progress.step < config.training.steps:
        return
    hardware = config.metrics.plan_hardware
    if not hardware and trainer.device.type == "cpu":
        log.info("plan: no prediction, as no rates of this CPU are given (metrics.plan_hardware)")
        return
    attempts = sorted(trainer.run_folder.glob("config*.toml"), key=lambda path: path.stat().st_mtime)
    words = [str(attempts[-1]), "--gpus", str(trainer.world.size), "--hardware"]
    words += [hardware or device_name(trainer.device), "--measured", str(trainer.run_folder / "metrics.jsonl")]
    log.info("\n".join(f"plan: {line}" for line in _ask(words)))


def _ask(words: list[str]) -> list[str]:
    command, environment = plan_command(words)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        return [f"no prediction: dtron plan took longer than {DEADLINE_S} s"]
    except OSError as error:
        return [f"no prediction: {error}"]
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if said and done.returncode == 0:
        return said
    return [f"no prediction: {said[-1] if said else f'dtron plan ended with {done.returncode}'}"]
