"""Files that several processes meet at: a lock, and a write that leaves the old content or the new one."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

__all__ = ["acquire_lock", "modified_s", "sync_folder", "write_atomically"]

SKEW_S = 60.0  # that a file server's clock may be ahead of this machine's


def acquire_lock(path: Path, in_use: Callable[[str], Exception]) -> TextIO:
    """Lock `path`, made if need be, until the returned file is closed or this process ends, however it ends.

    The file says who holds it. in_use: makes the error to raise from the holder's name ("process 7 on node-3"). The
    holder may delete the file: whoever opened it before that does not take the deleted file's lock for this one.

    A POSIX lock: unlike that of flock, no forked worker that outlives this process keeps it. So it is held against
    other processes only, and is lost when this process closes any other file object of the same path.
    Where the file system has no locks nothing is locked: keeping two processes apart is then up to the user.
    """
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise in_use(owner) from None
        except OSError:
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(path, file.fileno()):
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def modified_s(path: Path) -> float:
    """Unix time of the last change; 0 for one that lies ahead, by a clock that was wrong: it is not the newest."""
    changed_s = path.stat().st_mtime
    return changed_s if changed_s <= time.time() + SKEW_S else 0.0


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replace a file by way of `NAME.partial` beside it: a reader, or a kill, finds the old content or the new one.

    durable: on the disk when this returns, so that the same holds when the machine fails. One writer at a time.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: of files renamed into it, say."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
