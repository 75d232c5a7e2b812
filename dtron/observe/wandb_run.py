"""The metrics in Weights & Biases: the scalars of metrics.jsonl under TensorBoard's names.

All of it happens on a thread of its own, from the import of what is slow to the upload at the end: a network that is
slow or gone costs the training nothing, and an error one warning. W&B's own variables (WANDB_PROJECT, WANDB_ENTITY,
WANDB_MODE, ...) say where the run goes; docs/dashboard.md has those that matter.
"""

import importlib
import importlib.util
import logging
import os
import queue
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtron.errors import UserError

__all__ = ["WandbRun", "check_wandb"]

log = logging.getLogger(__name__)

PROJECT = "dtron"  # unless WANDB_PROJECT names another
FINISH_S = 60.0  # that the end of a training waits for what is not uploaded yet; `wandb sync` uploads the rest


def check_wandb(enabled: bool) -> None:
    """UserError if it is asked for and not installed: said before a run has a folder."""
    loaded = "wandb" in sys.modules
    if enabled and (sys.modules["wandb"] is None if loaded else importlib.util.find_spec("wandb") is None):
        raise UserError(
            "metrics.enable_wandb = true needs the package wandb, which is not installed: pip install 'dtron[wandb]', "
            "or set metrics.enable_wandb false"
        )


class WandbRun:
    """A run of W&B in `run_folder/wandb`; every attempt of a run folder continues the same one.

    hparams: key -> value of the resolved configuration. name_of: a row's key -> (name, factor), None: not drawn.
    Raises UserError if wandb is not installed.
    """

    def __init__(
        self, run_folder: Path, hparams: dict[str, Any], name_of: Callable[[str], tuple[str, float] | None]
    ) -> None:
        check_wandb(True)
        self._wandb = importlib.import_module("wandb")
        self._folder, self._hparams, self._name_of = run_folder, hparams, name_of
        self._rows: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def draw(self, row: dict[str, Any]) -> None:
        """Hand over the numbers of a row; the first one opens the run."""
        numbers = {"step": row["step"]}
        for key, value in row.items():
            if isinstance(value, (int, float)) and (tag := self._name_of(key)) is not None:
                numbers[tag[0]] = value * tag[1]
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()
        self._rows.put(numbers)

    def close(self) -> None:
        """Mark the run as finished, and wait up to `FINISH_S` for its upload."""
        if self._thread is None:
            return
        self._rows.put(None)
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            log.warning(
                "Weights & Biases has not taken all metrics within %g s: wandb sync %s uploads the rest",
                FINISH_S, self._folder / "wandb" / "*run-*",
            )  # fmt: skip

    def _work(self) -> None:
        try:
            run = self._open()
            while (numbers := self._rows.get()) is not None:
                run.log(numbers)
            run.finish()
        except Exception as error:  # of any kind: W&B has its own, and those of its network
            log.warning(
                "Weights & Biases gets no more metrics of this attempt (%s: %s); metrics.jsonl has all of them, and "
                "the training continues", type(error).__name__, error,
            )  # fmt: skip

    def _open(self) -> Any:
        folder = self._folder / "wandb"
        folder.mkdir(exist_ok=True)
        id_file = folder / "dtron-run-id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(self._folder),
            id=id_file.read_text(),
            resume="allow",
            name=os.environ.get("WANDB_NAME", self._folder.name),
            config=_nested(self._hparams),
            # The console stays as it is, and a signal or an exit of the trainer is its own affair.
            settings=self._wandb.Settings(console="off", silent=True),
        )
        # W&B drops what is logged under a step below its last one, which the steps replayed after a resume are.
        run.define_metric("*", step_metric="step")
        return run


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"optimizer.lr": 1} -> {"optimizer": {"lr": 1}}; what is no plain value as text."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[leaf] = value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
    return tree
