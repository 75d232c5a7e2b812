"""How a run and what monitors it (a batch script, a sweep, a person) communicate: small files in one folder.

    STOP        made by anybody, also in the run folder: save after this step and end
    HEARTBEAT   where the run is, the step it began at, and within how many seconds this file will change again
    SAVED       stopped as requested, and all of it is saved
    DONE        training.steps is reached, or the evaluation has ended
    FAILED      why it ended otherwise

All but STOP are one JSON object. The folder is job.control_folder, or else the run folder.
"""

import contextlib
import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch import OutOfMemoryError

from dtron.errors import UserError

__all__ = ["LONG_S", "SIGNALS", "Control", "StopBeforeStartError", "StopError", "StopRequest", "kind_of"]

log = logging.getLogger(__name__)

EVERY_S = 1.0  # between two checks for STOP, and two heartbeats of one phase: the folder may lie on a busy file server
LONG_S = 24 * 3600.0  # for what has no limit of its own: tokenizing, loading, compiling, validation, writing out
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopBeforeStartError(Exception):
    """STOP was found before the first step, on all ranks alike: no failure, there is nothing to save."""


class StopError(UserError):
    """A stop was requested during what cannot be stopped halfway and saved."""

    kind = "error"


class Control:
    """Rank 0 writes and looks; FAILED is written by the rank that failed. Without a folder, or a rank, nothing is done.

    Nothing here raises: a full disk must not end a training for the sake of a heartbeat.
    """

    def __init__(self, rank: int | None = None, folder: str | None = None) -> None:
        self._rank = rank
        self._folder = Path(folder) if folder else None
        self._stops: list[Path] = []
        self._undo: Callable[[], None] | None = None
        self._beat: dict[str, Any] = {}
        self._phase, self._beat_s, self._looked_s = "", -EVERY_S, -EVERY_S
        self._stop = False
        if rank == 0:
            self._clear_outcome()  # here already: this attempt may fail before it starts

    def start_run(self, run_folder: Path | None, checkpoints: str = "", undo: Callable[[], None] | None = None) -> None:
        """A run begins: from here on there is a folder, and what the attempt before left is gone.

        run_folder: None for what has none, an evaluation; nothing is done then if no folder is given either.
        undo: removes the run folder again if the start is refused.
        """
        if self._rank is None:
            return
        self._undo = undo
        self._folder = self._folder or run_folder
        if run_folder and self._folder:
            self._stops = [folder / "STOP" for folder in {self._folder, run_folder}]
            self._beat = {"run_folder": str(run_folder.absolute()), "checkpoints": checkpoints}
        if self._rank == 0:
            self._make()
            self._clear_outcome()

    def _clear_outcome(self) -> None:
        """Remove what the attempt before left, which would be taken for what becomes of this one."""
        for name in ("SAVED", "DONE", "FAILED"):
            self._remove(name)

    def heartbeat(self, phase: str, deadline_s: float, step: int = 0) -> None:
        """Write HEARTBEAT: `phase` at `step`; the next one comes within `deadline_s`. Cheap enough for every step."""
        now = time.monotonic()
        if self._rank != 0 or self._folder is None or (phase == self._phase and now - self._beat_s < EVERY_S):
            return
        self._phase, self._beat_s = phase, now
        self._beat.setdefault("began_at", step)
        self._write("HEARTBEAT", {"phase": phase, "step": step, "deadline_s": deadline_s, **self._beat})

    def stop_requested(self) -> bool:
        """Whether there is a STOP; only rank 0 looks."""
        now = time.monotonic()
        if self._rank == 0 and self._folder and not self._stop and now - self._looked_s >= EVERY_S:
            self._looked_s = now
            self._stop = any(stop.exists() for stop in self._stops)
        return self._stop

    def saved(self, step: int, checkpoint: str, by: str) -> None:
        """The run has stopped as requested; by: what requested it."""
        self._write("SAVED", {"step": step, "checkpoint": checkpoint, "by": by})
        self._remove_stops()

    def done(self, step: int) -> None:
        """There is nothing left to do."""
        if self._rank == 0:
            self._make()
            self._write("DONE", {"step": step, **self._beat})
            self._remove_stops()  # one that came too late must not stop a continuation with more steps

    def failed(self, error: BaseException) -> None:
        """Say why, on whichever rank. Of several that do, the first one's words stay.

        A start that is refused for a mistake leaves no run folder, nor FAILED if that is where it would be.
        """
        if self._undo and kind_of(error) == "mistake":
            own = self._folder is not None and str(self._folder.absolute()) == self._beat["run_folder"]
            self._undo()
            self._folder = self._folder if self._folder and (not own or self._folder.is_dir()) else None
        if self._folder is None or (self._folder / "FAILED").exists():
            return
        self._make()
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self._write("FAILED", {"kind": kind_of(error), "message": text, "rank": self._rank, **self._beat})

    def _remove_stops(self) -> None:
        for stop in self._stops:
            _forgiving(lambda path: path.unlink(missing_ok=True), stop)

    def _make(self) -> None:
        if self._folder is not None:
            _forgiving(lambda folder: folder.mkdir(parents=True, exist_ok=True), self._folder)

    def _remove(self, name: str) -> None:
        if self._folder is not None:
            _forgiving(lambda path: path.unlink(missing_ok=True), self._folder / name)

    def _write(self, name: str, row: dict[str, Any]) -> None:
        """Whole or not at all, for who reads it meanwhile."""
        if self._folder is None:
            return
        text = json.dumps({**row, "unix_s": time.time()}) + "\n"
        # One draft per rank: of FAILED, several ranks may be writers.
        draft = self._folder / f".{name}-{self._rank}"

        def replace(path: Path) -> None:
            path.write_text(text)
            os.replace(path, path.with_name(name))

        _forgiving(replace, draft)


def _forgiving(action: Callable[[Path], None], path: Path) -> None:
    try:
        action(path)
    except OSError as error:
        log.warning("%s: %s; the run continues", path, error)


def kind_of(error: BaseException) -> str:
    """What to do about a failure hangs on it: mistake, nonfinite, oom (the same again), hang, lost, error (may pass).

    lost: another rank or machine went away.
    """
    text = str(error)
    if kind := getattr(error, "kind", ""):
        return kind
    if isinstance(error, FloatingPointError):
        return "nonfinite"
    if isinstance(error, OutOfMemoryError | MemoryError) or re.search(r"out of memory|can't allocate memory", text):
        return "oom"
    if re.search(r"[Tt]imed out|[Tt]imeout", text):
        return "hang"
    if re.search(r"Connection (closed|reset)|recvValue failed|Broken pipe|remote process exited", text):
        return "lost"
    return "error"


class StopRequest:
    """`signal_name`: of the signal that reached this process since `arm`, or empty."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._pid = os.getpid()

    def arm(self) -> None:
        """From here on a signal is a request. Before, and after `disarm`, it ends the process, which loses nothing."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._note)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Within, after `arm`, a request is a StopError in the main thread at once, also one noted before; but once."""
        raised = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal raised
            self._note(number, frame)
            if os.getpid() == self._pid and not raised:
                raised = True
                raise StopError(f"stopped by {self.signal_name}")

        if self.signal_name:
            raise StopError(f"stopped by {self.signal_name}")
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            for number, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, stop)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def disarm(self) -> None:
        """Let signals end the process at once."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: it is not the one to save
        self.signal_name = self.signal_name or signal.Signals(number).name
