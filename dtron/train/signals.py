"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: noted on the rank they reach; the ranks agree on a step, save there and end."""

import os
import signal
from types import FrameType

__all__ = ["StopRequest"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """`asked`: the name of the signal that reached this process since `arm`, or empty."""

    def __init__(self) -> None:
        self.asked = ""
        self._pid = os.getpid()

    def arm(self) -> None:
        """From here on a signal is a request. Before, and after `disarm`, it ends the process, which loses nothing."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._note)

    def disarm(self) -> None:
        """Let signals end the process at once."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: it is not the one to save
        self.asked = self.asked or signal.Signals(number).name
