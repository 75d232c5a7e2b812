"""Goodput: the share of a run's wall time that went into useful steps, and what the rest went to.

A `Ledger` keeps the account of one run over all its attempts. Rank 0 keeps it; its `row` goes into every
row of metrics.jsonl and into every checkpoint, and from these two the next attempt continues:

    first start                                         save   last row   killed     start of the next attempt
    |--- startup --|--- steps, data, validation, ... ---|------|----------|......................|--- startup --|
                                                          replayed                  down

What was done after the checkpoint is done again, so it was not useful: it moves to `replayed`. Nobody knows when
exactly a process was killed, so `down` begins at its last heartbeat: the last row or the checkpoint.
"""

import os
import time
from pathlib import Path
from typing import Any

__all__ = ["PARTS", "Ledger", "process_start_s"]

# In the order they are shown. Together they are the wall time since the first attempt's start.
PARTS = ("steps", "data", "startup", "checkpoint", "validation", "replayed", "down", "other")
_MEASURED = ("steps", "data", "startup", "checkpoint", "validation")  # by the attempt itself
_DONE_AGAIN = ("steps", "data", "validation")  # after a resume, what came after the checkpoint


class Ledger:
    """The wall time of one run, continued from what its earlier attempts left.

    `began_s`: unix time at which this attempt's process started, see `process_start_s`.
    `saved`: what `row` gave for the checkpoint that is resumed; None where there is none, and all earlier steps are
    done again.
    `last_row`: the last row of metrics.jsonl that an earlier attempt wrote, with what `row` gave in it; None for a
    fresh run. Both may say their `attempt`, without which the clocks of two attempts are taken to agree. Rows and
    checkpoints of a time when no ledger was kept (without `unix_s`) count as None.

    All times are unix times in seconds. Let them come from one clock that is never set back within an attempt:
    `began_s` plus the seconds since, by `time.monotonic`. Where the clocks of two attempts' machines disagree so far
    that the second starts before the first one's last sign, `down` is 0.
    """

    def __init__(
        self, began_s: float, saved: dict[str, Any] | None = None, last_row: dict[str, Any] | None = None
    ) -> None:
        self._began_s = began_s
        spent, sign_s = _continued(_known(saved), _known(last_row))
        if sign_s is not None:
            spent["down"] += max(0.0, began_s - sign_s)
        self._earlier_s = sum(spent.values())
        self._spent = spent

    def add(self, part: str, seconds: float) -> None:
        """Add what just passed. Parts must not overlap: data waits are not in `steps`. ValueError for other parts.

        startup: from the process's start to the first step's begin. steps: without data waits, saves and validation.
        data: waits for a batch. checkpoint: stalls of the training thread by saves. validation.
        """
        if part not in _MEASURED:
            raise ValueError(f"part {part!r} is not one of {', '.join(_MEASURED)}")
        self._spent[part] += seconds

    def row(self, now_s: float) -> dict[str, float]:
        """The account at `now_s`, once all that passed is added; what was not is in `other`.

        Keys: `goodput` (share of 1), `spent_s/PART` for each of `PARTS` (seconds since the run's first start, which
        sum to the wall time) and `unix_s` (`now_s`).
        """
        wall_s = self._earlier_s + now_s - self._began_s
        named = {part: self._spent[part] for part in PARTS if part != "other"}
        spent = {**named, "other": wall_s - sum(named.values())}
        goodput = spent["steps"] / wall_s if wall_s > 0 else 0.0
        return {"goodput": goodput, **{f"spent_s/{part}": spent[part] for part in PARTS}, "unix_s": now_s}


def _known(row: dict[str, Any] | None) -> dict[str, Any] | None:
    return row if row and "unix_s" in row else None


def _continued(saved: dict[str, Any] | None, last: dict[str, Any] | None) -> tuple[dict[str, float], float | None]:
    """Seconds of each part that an attempt starts from, and the unix time of the last sign of life before it."""
    useful = {part: saved[f"spent_s/{part}"] if saved else 0.0 for part in PARTS}
    if last is None or (saved and _is_newer(saved, last)):
        return useful, saved["unix_s"] if saved else None
    spent = {part: last[f"spent_s/{part}"] for part in PARTS}
    for part in _DONE_AGAIN:
        spent["replayed"] += spent[part] - useful[part]
        spent[part] = useful[part]
    return spent, last["unix_s"]


def _is_newer(saved: dict[str, Any], last: dict[str, Any]) -> bool:
    """By the number of the attempt first: a clock that was ahead makes no row the last one."""
    mine, theirs = saved.get("attempt"), last.get("attempt")
    if mine is not None and theirs is not None and mine != theirs:
        return bool(mine > theirs)
    return bool(saved["unix_s"] >= last["unix_s"])


def process_start_s() -> float:
    """Unix time at which this process started; where the system does not say (not Linux), the present time."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.time()
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # field 22 of proc(5): since boot
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
