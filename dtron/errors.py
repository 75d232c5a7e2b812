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


class Mistakes(list[str]):
    """What several independent checks find, so that all of it is said at once."""

    @contextmanager
    def collect(self) -> Iterator[None]:
        """A UserError of the body is noted, and what follows the body goes on."""
        try:
            yield
        except UserError as error:
            self.append(str(error))

    def raise_any(self) -> None:
        """UserError with all that was noted: one mistake as it is, several as a list."""
        found = list(dict.fromkeys(self))
        if len(found) == 1:
            raise UserError(found[0])
        if found:
            raise UserError("\n  * ".join([f"{len(found)} mistakes in the configuration:", *found]))


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
