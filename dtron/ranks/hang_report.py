"""What a hang's report says: who keeps whom waiting, and in which collective."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dtron import compat

__all__ = ["ANSWER_S", "FRAMES", "State", "Wait", "format_ranks", "recorded_wait", "report"]

ANSWER_S = 1.5  # beside a poll: to look at a full recorder on a busy machine
FRAMES = 8  # innermost ones, shown of a rank that is the cause
SHOWN = 4  # ranks, or collectives, that a report describes one by one


@dataclass(frozen=True)
class Wait:
    """What a rank waits in. `ranks`: of its group, none if unknown; `number`: of the collectives in that group."""

    name: str
    ranks: list[int]
    group: str = ""
    number: int = 0
    sizes: Sequence[Sequence[int]] = ()

    def text(self, world: int) -> str:
        """For example: all_reduce of [4, 8], the 57th collective of ranks 0-1 (mesh_dp)."""
        if not self.ranks:
            return self.name
        sizes = ", ".join(str([*size]) if size else "a scalar" for size in self.sizes[:SHOWN])
        of = f" of {sizes}" if sizes else ""
        whose = "all ranks" if len(self.ranks) == world else format_ranks(self.ranks)
        return f"{self.name}{of}, collective {self.number} of {whose}" + (f" ({self.group})" if self.group else "")


@dataclass(frozen=True)
class State:
    """A rank's answer. `step`: the last it has done; `wait`: None if in no collective; `stack`: innermost frames."""

    step: int
    wait: Wait | None
    stack: str

    @classmethod
    def from_json(cls, answer: dict[str, Any]) -> "State":
        """What `dataclasses.asdict` made of one, after a way as JSON."""
        return cls(answer["step"], Wait(**answer["wait"]) if answer["wait"] else None, answer["stack"])


def format_ranks(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join("-".join(map(str, run)) for run in runs)


def report(states: dict[int, State | None], asked_by: int, waited_s: float, limit: tuple[str, float]) -> str:
    """Which ranks the others wait for, and where. states: of all ranks, None without an answer; limit: key, seconds."""
    silent = [rank for rank, state in states.items() if state is None]
    answered = {rank: state for rank, state in states.items() if state is not None}
    free = {rank: state for rank, state in answered.items() if state.wait is None}
    causes = sorted([*silent, *free])
    asking = answered[asked_by]
    whom = f" for {format_ranks(causes)}" if causes else ""
    lines = [
        f"the run hangs after step {asking.step}: rank {asked_by} has waited {waited_s:.1f} s{whom}; "
        f"{limit[0]} is {limit[1]:g}"
    ]
    if silent:
        lines.append(
            f"{format_ranks(silent)} did not answer within {ANSWER_S:g} s: stopped, gone, cut off, or in code that "
            "never lets another thread run"
        )
    for rank, state in [*free.items()][:SHOWN]:
        lines += [
            f"rank {rank}, after step {state.step}, is in no collective; its main thread:",
            state.stack.rstrip("\n"),
        ]
    if len(free) > SHOWN:
        lines.append(f"and {len(free) - SHOWN} more ranks like these")
    lines += _waiting(answered, len(states), explain=not causes)
    if causes:
        lines.append(f"if {format_ranks(causes)} {'was' if len(causes) == 1 else 'were'} only slow, raise {limit[0]}")
    return "\n".join(lines)


def _waiting(answered: dict[int, State], world: int, explain: bool) -> list[str]:
    """A line for each collective that ranks wait in; explain: all do, so that the difference is the cause."""
    waits: dict[str, list[int]] = {}
    for rank, state in answered.items():
        if state.wait is not None:
            waits.setdefault(state.wait.text(world), []).append(rank)
    by_size = sorted(waits.items(), key=lambda wait: -len(wait[1]))
    lines = [
        f"{format_ranks(ranks)} {'waits' if len(ranks) == 1 else 'wait'} in {wait}" for wait, ranks in by_size[:SHOWN]
    ]
    if len(waits) > SHOWN:
        lines.append(f"and {len(waits) - SHOWN} more collectives")
    if explain and (behind := _left_behind(answered)):
        lines.append(f"others have finished what {format_ranks(behind)} still wait in: look at the network of these")
    elif explain and len(waits) > 1:
        lines.append("every rank waits, in different collectives: the ranks have diverged (mismatched collectives)")
        lines += [f"main thread of rank {ranks[0]}:\n{answered[ranks[0]].stack.rstrip()}" for _, ranks in by_size[:2]]
    elif explain:
        lines.append("every rank waits in the same collective: look at the network between them")
    return lines


def _left_behind(answered: dict[int, State]) -> list[int]:
    """The ranks that wait in a collective which other ranks of its group have finished: they wait in a later one.

    A rank that diverged is not ahead: it waits in another collective of the same number.
    """
    newest: dict[tuple[str, tuple[int, ...]], int] = {}
    waits = {rank: state.wait for rank, state in answered.items() if state.wait is not None and state.wait.ranks}
    for wait in waits.values():
        group = wait.group, tuple(wait.ranks)
        newest[group] = max(newest.get(group, 0), wait.number)
    return [rank for rank, wait in waits.items() if wait.number < newest[wait.group, tuple(wait.ranks)]]


def recorded_wait(entry: dict[str, Any]) -> Wait:
    """An entry of the recorder, in a report's terms."""
    name, description = entry["process_group"]
    return Wait(
        entry["profiling_name"].partition(":")[2],
        compat.group_ranks(name),
        "" if description in ("default_pg", "undefined") else description,
        entry["collective_seq_id"],
        entry["input_sizes"],
    )
