"""A pipeline's step in time, from the order in which torch's own schedule computes on each rank.

An action (forward F, backward B, or its halves I, of inputs, and W, of weights) starts when the one before it on its
rank has ended and what it needs has arrived: F the hidden states of the stage before, B and I the gradient of the stage
behind. Whatever a rank waits is the bubble.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

from dtron import compat
from dtron.parallel.schedules import SCHEDULES, read_schedule

__all__ = ["StageTimes", "Timeline", "actions", "in_flight", "repeats_after", "simulate", "stages_of", "step_s"]

Action = tuple[int, str, int]  # stage, kind, microbatch


@cache
def actions(schedule: str, pp: int, n_stages: int, microbatches: int) -> list[list[Action]]:
    """Each pipeline rank's actions in their order. schedule: a name in `SCHEDULES`, or a CSV file."""
    if schedule not in SCHEDULES:
        return compat.csv_actions(read_schedule(schedule, pp))
    if SCHEDULES[schedule].at_least_stages:
        microbatches = max(microbatches, n_stages)
    return compat.schedule_actions(schedule, pp, n_stages, microbatches)


@cache
def stages_of(schedule: str, pp: int, n_stages: int) -> list[tuple[int, ...]]:
    """The stages of each pipeline rank."""
    if schedule in SCHEDULES:
        return compat.stages_of_rank(pp, n_stages, SCHEDULES[schedule].v_shape)
    return [tuple(sorted({stage for stage, _, _ in row})) for row in actions(schedule, pp, n_stages, 0)]


@cache
def in_flight(schedule: str, pp: int, n_stages: int, microbatches: int, rank: int) -> int:
    """Most forwards of which a rank has not finished the backward, those of each of its stages counted."""
    held = most = 0
    for _, kind, _ in actions(schedule, pp, n_stages, repeats_after(schedule, pp, microbatches))[rank]:
        held += {"F": 1, "B": -1, "I": 0, "W": -1}[kind]
        most = max(most, held)
    return min(most, microbatches * n_stages // pp)


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one microbatch in each stage: forward, and the backward of inputs and that of weights.

    hop_s: of what a stage sends to another rank.
    """

    forward: tuple[float, ...]
    inputs: tuple[float, ...]
    weights: tuple[float, ...]
    hop_s: float

    def of(self, stage: int, kind: str) -> float:
        if kind == "B":
            return self.inputs[stage] + self.weights[stage]
        return {"F": self.forward, "I": self.inputs, "W": self.weights}[kind][stage]


@cache
def _program(schedule: str, pp: int, n_stages: int, microbatches: int) -> list[tuple[int, Action, int, int, bool]]:
    """(rank, action, the one before it on its rank, the one it needs, whether that is on another rank), in an order in
    which each comes after what it needs. Those before and needed are positions in this list, from 1; 0: none.
    """
    rows = actions(schedule, pp, n_stages, microbatches)
    place: dict[Action, tuple[int, int]] = {}  # (position, rank)
    program: list[tuple[int, Action, int, int, bool]] = []
    at, before = [0] * len(rows), [0] * len(rows)
    while len(program) < sum(map(len, rows)):
        done = len(program)
        for rank, row in enumerate(rows):
            while at[rank] < len(row):
                stage, kind, microbatch = row[at[rank]]
                needed = _needed(stage, kind, microbatch, n_stages)
                if needed and needed not in place:
                    break
                found, there = place[needed] if needed else (0, rank)
                program.append((rank, row[at[rank]], before[rank], found, there != rank))
                before[rank] = len(program)
                key = "F" if kind == "F" else "W" if kind == "W" else "B"
                place[stage, key, microbatch] = len(program), rank
                at[rank] += 1
        if len(program) == done:
            raise ValueError(f"the actions of {schedule} wait for each other; {done} of them can be done")
    return program


def _needed(stage: int, kind: str, microbatch: int, n_stages: int) -> Action | None:
    """What an action needs besides those before it on its rank; B stands for I, too."""
    if kind == "F":
        return (stage - 1, "F", microbatch) if stage else None
    if kind == "W" or stage == n_stages - 1:
        return None
    return stage + 1, "B", microbatch


@dataclass(frozen=True)
class Timeline:
    """spans: (rank, action, start, end) in seconds, of all actions. busy_s: of each rank."""

    spans: list[tuple[int, Action, float, float]]
    end_s: float
    busy_s: list[float]

    @property
    def bubble(self) -> float:
        """The share of the time in which a rank waits, in the mean over the ranks."""
        return 1 - sum(self.busy_s) / len(self.busy_s) / self.end_s


def simulate(schedule: str, pp: int, microbatches: int, times: StageTimes) -> Timeline:
    """The step of a pipeline, action by action."""
    program = _program(schedule, pp, len(times.forward), microbatches)
    ends = _ends(program, times)
    busy, spans = [0.0] * pp, []
    for (rank, action, *_), end in zip(program, ends[1:], strict=True):
        lasts = times.of(action[0], action[1])
        busy[rank] += lasts
        spans.append((rank, action, end - lasts, end))
    return Timeline(spans, max(ends), busy)


def _ends(program: list[tuple[int, Action, int, int, bool]], times: StageTimes) -> list[float]:
    lasts = {(s, kind): times.of(s, kind) for s in range(len(times.forward)) for kind in "FBIW"}
    hop, ends = times.hop_s, [0.0]
    for _, (stage, kind, _), before, needed, crosses in program:
        start, arrival = ends[before], ends[needed] + hop if crosses else ends[needed]
        ends.append((start if start > arrival else arrival) + lasts[stage, kind])
    return ends


@lru_cache(100_000)
def step_s(schedule: str, pp: int, microbatches: int, times: StageTimes) -> float:
    """Seconds from the first action to the end of the last. Many microbatches are taken from fewer: in the middle of a
    step each round of them takes as long.
    """
    n_stages, fewer = len(times.forward), repeats_after(schedule, pp, microbatches)
    first = max(_ends(_program(schedule, pp, n_stages, fewer), times))
    if fewer == microbatches:
        return first
    second = max(_ends(_program(schedule, pp, n_stages, fewer + pp), times))
    return first + (second - first) * (microbatches - fewer) / pp


# Rounds of pp microbatches after which schedules repeat themselves; V-shaped ones, DualPipeV last, need more.
# Of stages whose times are random within 20%, the step is off by about 1% at most.
ROUNDS, V_ROUNDS = 4, 6


def repeats_after(schedule: str, pp: int, microbatches: int) -> int:
    """So few microbatches that more of them only repeat the rounds in the middle; all, where there are no rounds."""
    if schedule not in SCHEDULES or (SCHEDULES[schedule].in_rounds and microbatches % pp):
        return microbatches
    few = (V_ROUNDS if SCHEDULES[schedule].v_shape else ROUNDS) * pp + microbatches % pp
    return few if microbatches > few + pp else microbatches
