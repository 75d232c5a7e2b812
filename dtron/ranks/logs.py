"""The console log of a run: rank 0 from INFO, the other ranks from WARNING; errors to stderr, the rest to stdout.

Modules log by `logging.getLogger(__name__)`, so that whoever embeds dtron can send its records elsewhere.
"""

import contextlib
import logging
import sys
import time
import traceback
from typing import TextIO

__all__ = ["LEVELS", "setup_logging"]

LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def setup_logging(rank: int = 0, level: str = "info") -> None:
    """Write the records of dtron's modules to the console; again: with another level. level: one of `LEVELS`."""
    log = logging.getLogger("dtron")
    log.handlers, log.propagate = [_Console(rank)], False
    log.setLevel(LEVELS[level] if rank == 0 else max(LEVELS[level], logging.WARNING))


class _Console(logging.Handler):
    """Lines for people and for grep: with a time stamp each where the stream is no terminal.

    A line that cannot be written is dropped: a terminal that is closed, a pipe whose reader has ended or an encoding
    that lacks a character must not end or disturb a training. The streams are looked up at every record, because
    they may be replaced.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            _write(stream, self._text(record), "" if stream.isatty() else _stamp(record.created))

    def _text(self, record: logging.LogRecord) -> str:
        """INFO as it is; else the level in front, and the rank where it is not rank 0 or an exception is reported."""
        if record.levelno < logging.WARNING:
            return record.getMessage()
        of_rank = f" on rank {self._rank}" if self._rank or record.exc_info else ""
        line = f"{record.levelname.lower()}{of_rank}: {record.getMessage()}"
        if record.exc_info and record.exc_info[0]:
            # The cause comes last, where people look first.
            line = "".join(traceback.format_exception(*record.exc_info)) + line
        return line


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S ", time.localtime(seconds))


def _write(stream: TextIO, text: str, stamp: str) -> None:
    lines = "".join(f"{stamp}{line}\n" for line in text.split("\n"))
    try:
        stream.write(lines)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(lines.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
