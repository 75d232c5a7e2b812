"""Measured once per machine: its clock, its disk, and whether it sees files written by others."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["answer_clock", "ask_clock", "clock_offset", "measure_disk_write", "sees_marker", "write_marker"]

ROUND_TRIPS = 10
FIRST_WRITE_BYTES = 1 << 20  # each following write is twice as large
MAX_WRITE_BYTES = 128 << 20
NFS_CACHE_S = 3.0  # NFS may cache for this long that a file does not exist


def clock_offset(sent: float, received: float, answered: float, returned: float) -> tuple[float, float]:
    """(offset of the other clock, positive if ahead; half the round trip, which bounds the error), in the times' unit.

    sent, returned: by this clock; received, answered: by the other. RFC 5905, section 8: the offset is exact if both
    directions take the same time.
    """
    return ((received - sent) + (answered - returned)) / 2, ((returned - sent) - (answered - received)) / 2


def ask_clock(rank: int) -> dict[str, float]:
    """clock_skew_s, positive if the clock of `rank`, which runs `answer_clock`, is ahead; clock_uncertainty_s."""
    trips, theirs = [], torch.zeros(2, dtype=torch.int64)
    for _ in range(ROUND_TRIPS):
        sent = time.time_ns()
        dist.send(theirs, rank)
        dist.recv(theirs, rank)
        returned = time.time_ns()
        # Differences first: a float64 holds nanoseconds since 1970 only to 256.
        received, answered = (int(ns) - sent for ns in theirs)
        trips.append(clock_offset(0, received, answered, returned - sent))
    skew, uncertainty = min(trips, key=lambda trip: trip[1])
    return {"clock_skew_s": skew / 1e9, "clock_uncertainty_s": uncertainty / 1e9}


def answer_clock(rank: int, clock: Callable[[], int] = time.time_ns) -> None:
    """Send the time in nanoseconds to `rank`, which runs `ask_clock`."""
    mine = torch.zeros(2, dtype=torch.int64)
    for _ in range(ROUND_TRIPS):
        dist.recv(mine, rank)
        received = clock()
        dist.send(torch.tensor([received, clock()]), rank)


def measure_disk_write(folder: Path, budget_s: float) -> dict[str, Any]:
    """disk_write_bytes_per_s, fsync included, of an unnamed temporary file; disk_free_bytes.

    OSError if it cannot be written.

    Doubles the size of the write until the next would exceed the budget; the last write counts, so that the fixed cost
    of an fsync does not.
    """
    end, size, rate = time.monotonic() + budget_s, FIRST_WRITE_BYTES, 0.0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        data = os.urandom(FIRST_WRITE_BYTES)  # some file systems compress
        while True:
            begin = time.perf_counter()
            for _ in range(size // FIRST_WRITE_BYTES):
                if file.write(data) != FIRST_WRITE_BYTES:
                    raise OSError(f"{folder}: a write was incomplete; the disk may be full")
            os.fsync(file.fileno())
            took_s = time.perf_counter() - begin
            rate, size = size / took_s, 2 * size
            if size > MAX_WRITE_BYTES or time.monotonic() + 2 * took_s > end:
                return {"disk_write_bytes_per_s": rate, "disk_free_bytes": shutil.disk_usage(folder).free}
            file.seek(0)


def write_marker(folder: Path) -> Path:
    """Write a new file for the other machines to look for; creates the folder. OSError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="preflight-", dir=folder)
    os.write(handle, Path(name).name.encode())
    os.close(handle)
    return Path(name)


def sees_marker(folder: Path, name: str, timeout_s: float = NFS_CACHE_S) -> bool:
    """Whether the marker that another machine wrote is visible here."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return (folder / name).read_bytes() == name.encode()
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
