"""How a run ends in error: who failed first, and which rank says what.

A user's mistake is one message from rank 0; the other ranks wait for it, bounded, and stay silent. A
failure in training is reported by the rank where it happened first; ranks that merely lost contact with
it are silent. Both reach torchrun's summary as the root cause.

A rank that is killed says nothing. The others lose contact with it, in a collective, and wait to be stopped: torchrun
notices the exit within `KILLED_WAIT_S`, stops the ranks of that machine and names the killed rank as the root cause.
Ranks of other machines report that they lost contact (`LostContactError`) after `SILENT_WAIT_S` and end. Under
`--max-restarts`, or Slurm's requeue, all ranks start again and resume from the newest good checkpoint: only the steps
since then are lost. A rank that is alive and stuck is the watchdog's (`dtron/ranks/watchdog.py`).
"""

import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from dtron.errors import UserError
from dtron.ranks.control import SIGNALS, Control, StopRequest
from dtron.ranks.world import SILENT_WAIT_S, World

__all__ = [
    "FIRST_FAILURE",
    "KILLED_WAIT_S",
    "LostContactError",
    "exit_on_signals",
    "exit_with_message",
    "exit_with_traceback",
    "tell_torchrun",
]

log = logging.getLogger(__name__)

STORE_WAIT_S = 5.0  # for an answer of the rendezvous store
KILLED_WAIT_S = 2.0  # longer than torchrun needs to notice a rank that was killed
FIRST_FAILURE = "first_failure"  # the key of the store that holds who failed first


class LostContactError(RuntimeError):
    """A rank failed because others had gone, and nobody stopped it."""

    kind = "lost"


def exit_on_signals(rank: int, world: Callable[[], World | None] = lambda: None, hint: str = "") -> None:
    """Until `StopRequest.arm` or `disarm`, a signal (Ctrl-C, torchrun, Slurm) ends this process at once, with a line.

    A thread does it, which Python's own wakeup file tells: the main thread may be in code that runs no Python signal
    handler for minutes, such as a tokenizer or a collective. Forked children get the defaults back: a pool ends its
    workers by SIGTERM. world: what is known of the other ranks; of several that are signalled, one says it. hint: ends
    the line.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, _left_to_the_thread)

    def in_child() -> None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _left_to_the_thread:
                signal.signal(number, signal.SIG_DFL)

    def wait() -> None:
        while (number := os.read(read_end, 1)[0]) not in SIGNALS or signal.getsignal(number) is not _left_to_the_thread:
            pass
        known = world()
        if rank == 0 if known is None else _first_to_fail(rank, known) == f"rank {rank}":
            log.error("stopped by %s%s", signal.Signals(number).name, hint)
        os._exit(128 + number)

    os.register_at_fork(after_in_child=in_child)
    threading.Thread(target=wait, name="signals", daemon=True).start()


def _left_to_the_thread(*_: Any) -> None:
    """The handler of signals that `exit_on_signals` looks after."""


def exit_with_message(rank: int, world: World | None, error: UserError, control: Control | None = None) -> NoReturn:
    """Rank 0 speaks. Another rank speaks only if rank 0 is still there after the wait: the mistake was its own."""
    StopRequest().disarm()  # torchrun is to stop the waiting at once
    _first_to_fail(rank, world)  # ranks that lose contact with this one are to be silent
    if rank != 0:
        time.sleep(SILENT_WAIT_S)
        if not _rank_0_is_there():
            os._exit(2)
    log.error(error)
    if control:
        control.failed(error)
    error.__cause__, error.__suppress_context__ = None, True  # the summary, too, has the message only
    tell_torchrun(error.with_traceback(None))
    os._exit(2)


def exit_with_traceback(
    rank: int, world: World | None, error: BaseException, control: Control | None = None
) -> NoReturn:
    """The first rank to fail prints its traceback and ends; the others fail because it did, and wait to be stopped.

    One that had to stop before it failed waits for nothing: no second signal will come, and ranks that wait for it
    in a collective fail only when it has ended.
    """
    must_stop = world is not None and world.stop.signal_name
    StopRequest().disarm()
    first = _first_to_fail(rank, world)
    if first == f"rank {rank}":
        if control:
            control.failed(error)
        # A rank that was killed could not say that it was first. torchrun stops this one before it takes the blame.
        time.sleep(0.0 if must_stop else KILLED_WAIT_S)
        log.error("%s: %s", type(error).__name__, error, exc_info=error)
        tell_torchrun(error)
    elif not must_stop:
        time.sleep(SILENT_WAIT_S)
        if first and world is not None and int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) == world.size:
            os._exit(1)  # on the one machine there is, the first has the word
        # The torchrun of this machine has not stopped it, so the cause is not on this machine, or is its network.
        where = f"{first} ended first and says why" if first else "nor can the rendezvous store be reached"
        lost = LostContactError(f"rank {rank} lost contact with the others, {where}: {type(error).__name__}: {error}")
        log.error(lost)
        if control:
            control.failed(lost)
        tell_torchrun(lost)
    os._exit(1)


def _first_to_fail(rank: int, world: World | None) -> str:
    """The first rank that failed, as the store remembers; this one, if it remembers none. Empty if it is out of reach:

    gone, with rank 0 or torchrun, or cut off, and then a request waits for minutes.
    """
    mine, answers = f"rank {rank}", queue.SimpleQueue[str]()
    if world is None:
        return mine

    def ask() -> None:
        with suppress(RuntimeError):  # torch's own errors of a lost store derive from it
            answers.put(world.store.compare_set(FIRST_FAILURE, "", mine).decode())
            return
        answers.put("")

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=STORE_WAIT_S)
    except queue.Empty:
        return ""


def _rank_0_is_there() -> bool:
    """Whether the rendezvous store can be reached: it lives in rank 0, or in torchrun, which ends us with rank 0."""
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=5).close()
    except (KeyError, OSError):
        return False
    return True


def tell_torchrun(error: BaseException) -> None:
    """Write the error where torchrun's summary of root causes looks for it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and sys.version_info < (3, 11):  # whose exc_info keeps a traceback that was taken off the error
        data = json.loads(Path(file).read_text())
        data["message"]["extraInfo"]["py_callstack"] = "".join(traceback.format_exception(error))
        Path(file).write_text(json.dumps(data))
