"""Endings without a traceback: a mistake of the user, and a standard output that nobody reads any more."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Invalid input (config, data, checkpoint, topology), found before any training.

    The message says what was given, what was expected and how to fix it; the front door logs
    it once, from rank 0, without a traceback, and exits non-zero.

    kind: what `dtron.ranks.control` tells whoever may start the run again; a mistake would be the same again.
    """

    kind = "mistake"


@contextmanager
def quiet_broken_pipe() -> Iterator[None]:
    """Exit with code 0 where the reader of standard output has gone, as `head` does; another exit keeps its code."""
    try:
        yield
    except BrokenPipeError:
        sys.exit(0)
    finally:
        try:
            print(end="", flush=True)  # argparse ends --help by SystemExit, with the text still in the buffer
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
