"""What belongs to a machine rather than to a rank: its clock, its disk, and whether it sees the others' files."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["answer_clock", "ask_clock", "disk_write", "offset", "sees", "write_marker"]

ROUND_TRIPS = 10
CHUNK = 1 << 20  # bytes of the first write; each following is twice as large
LARGEST = 128 << 20
LOOK_S = 3.0  # NFS may keep for so long that a file is not there


def offset(sent: float, received: float, answered: float, back: float) -> tuple[float, float]:
    """(how far the other clock is ahead, half the round trip, which bounds the error), in the unit of the times.

    sent, back: by this clock; received, answered: by the other. RFC 5905, section 8: the offset is exact if both ways
    take the same time.
    """
    return ((received - sent) + (answered - back)) / 2, ((back - sent) - (answered - received)) / 2


def ask_clock(rank: int) -> dict[str, float]:
    """clock_skew_s, how far the clock of `rank`, which is in `answer_clock`, is ahead of ours; clock_uncertainty_s."""
    trips, theirs = [], torch.zeros(2, dtype=torch.int64)
    for _ in range(ROUND_TRIPS):
        sent = time.time_ns()
        dist.send(theirs, rank)
        dist.recv(theirs, rank)
        back = time.time_ns()
        # Differences first: a float64 holds nanoseconds since 1970 only to 256.
        received, answered = (int(ns) - sent for ns in theirs)
        trips.append(offset(0, received, answered, back - sent))
    skew, uncertainty = min(trips, key=lambda trip: trip[1])
    return {"clock_skew_s": skew / 1e9, "clock_uncertainty_s": uncertainty / 1e9}


def answer_clock(rank: int, clock: Callable[[], int] = time.time_ns) -> None:
    """Tell `rank`, which is in `ask_clock`, the time in nanoseconds."""
    mine = torch.zeros(2, dtype=torch.int64)
    for _ in range(ROUND_TRIPS):
        dist.recv(mine, rank)
        received = clock()
        dist.send(torch.tensor([received, clock()]), rank)


def disk_write(folder: Path, budget_s: float) -> dict[str, Any]:
    """disk_write_bytes_per_s, with fsync, of a file without a name, which leaves nothing behind; disk_free_bytes.

    OSError if it cannot be written.

    Doubles what it writes at once until that would take longer than what is left of the time; the last write counts,
    so that what an fsync costs by itself does not.
    """
    end, size, rate = time.monotonic() + budget_s, CHUNK, 0.0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        data = os.urandom(CHUNK)  # some file systems compress
        while True:
            begin = time.perf_counter()
            for _ in range(size // CHUNK):
                if file.write(data) != CHUNK:
                    raise OSError(f"{folder} took only a part of a write: it may be full")
            os.fsync(file.fileno())
            took_s = time.perf_counter() - begin
            rate, size = size / took_s, 2 * size
            if size > LARGEST or time.monotonic() + 2 * took_s > end:
                return {"disk_write_bytes_per_s": rate, "disk_free_bytes": shutil.disk_usage(folder).free}
            file.seek(0)


def write_marker(folder: Path) -> Path:
    """A new file, for the other machines to see. The folder is made if it is not there. OSError if it cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="preflight-", dir=folder)
    os.write(handle, Path(name).name.encode())
    os.close(handle)
    return Path(name)


def sees(folder: Path, name: str, longest_s: float = LOOK_S) -> bool:
    """Whether the marker that another machine wrote is here."""
    end = time.monotonic() + longest_s
    while True:
        try:
            return (folder / name).read_bytes() == name.encode()
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
