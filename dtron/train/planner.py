"""The planner, asked from inside a training.

It is a tool, which the core does not import, and its dry run needs a process without a process group. So it is asked as
a user would ask it, by `dtron plan`, in a process of its own: whatever happens there costs the training nothing.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["Prediction", "plan_command"]

OF_A_RANK = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


def plan_command(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command `dtron plan WORDS` and its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    ours = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])  # where this process finds dtron
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ours}
    return [sys.executable, "-m", "dtron", "plan", *words], environment


class Prediction:
    """The prediction of a run as it is configured, computed beside its first steps."""

    def __init__(self, config_file: Path, gpus: int, hardware: str) -> None:
        words = [str(config_file), "--gpus", str(gpus), "--hardware", hardware, "--as-configured", "--json"]
        command, environment = plan_command(words)
        self._row: dict[str, float] = {}
        self._process: subprocess.Popen[str] | None = None
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )

    def row(self) -> dict[str, float]:
        """`predicted/KEY` for keys of metrics.jsonl; empty until it is known, and if there is none."""
        if self._process is not None and self._process.poll() is not None:
            with contextlib.suppress(ValueError, AttributeError):
                found: dict[str, Any] = json.loads(self._process.communicate()[0])
                self._row = {f"predicted/{key}": value for key, value in found.items() if value is not None}
            self._process = None
        return self._row

    def close(self) -> None:
        """The run has ended; what is not known by now is not waited for."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
