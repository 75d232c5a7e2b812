"""What a recorded step holds from its first operation to its last, and what CUDA's caching allocator makes of it."""

from collections import Counter
from collections.abc import Iterable, Sequence

from dtron.plan.allocator import CachingAllocator
from dtron.plan.record import Moment, Reserved
from dtron.plan.recorder import Recorder

__all__ = ["reserve", "timeline"]

POINTS = 300
# Of a step that is replayed: the first passes are those in which the allocator finds its segments.
PASSES = 3


def timeline(recorder: Recorder, since: int, points: int = POINTS) -> tuple[Moment, ...]:
    """At most `points` moments from event `since` on: of as many equal spans of events the one that holds most."""
    events, allocations = recorder.events, recorder.allocations
    held: Counter[str] = Counter()
    for index, change in events[:since]:
        held[allocations[index].kind] += change
    grown = Counter(index for index, change in events if change > 0)
    n, phase, total = len(events) - since, "forward", held.total()
    found: list[Moment] = []
    most, best = -1, Moment(0, phase, {})
    for number, (index, change) in enumerate(events[since:]):
        allocation = allocations[index]
        held[allocation.kind] += change
        total += change
        # What grows again is known by its last phase only; labels are counted before the first forward.
        if change > 0 and grown[index] == 1 and (allocation.phase != "update" or number + since >= recorder.computed):
            phase = allocation.phase
        if total > most and number + since not in recorder.quiet:
            most, best = total, Moment(number, phase, dict(held))
        if (number + 1) * points // n > number * points // n:
            if most >= 0:
                found.append(best)
            most = -1
    return tuple(found)


def reserve(recorder: Recorder, made: int, before: int, updated: int) -> Reserved:
    """Bytes in CUDA's caching allocator after some steps like the recorded one.

    made: events until the parameters are there; before: until the step, of which those in between made the optimizer's
    state; updated: until its update. In the first step of a run the state is made at the update, as here.
    """
    plain, expandable = (_run(recorder, made, before, updated, kind) for kind in (False, True))
    return Reserved(plain.most_allocated, plain.most_reserved, expandable.most_reserved)


def _run(recorder: Recorder, made: int, before: int, updated: int, expandable_segments: bool) -> CachingAllocator:
    events, allocator = recorder.events, CachingAllocator(expandable_segments)
    held: dict[int, int] = {}
    _write(recorder, allocator, held, events[:made])
    state = _changes(events[made:before])
    batch = {index for index in state if recorder.allocations[index].kind == "batch"}
    _write(recorder, allocator, held, ((index, state[index]) for index in batch))
    _write(recorder, allocator, held, events[before:updated])
    _write(recorder, allocator, held, ((index, change) for index, change in state.items() if index not in batch))
    _write(recorder, allocator, held, events[updated:])
    # What a step leaves is there from then on, and what it frees of before is gone.
    lasting = _changes(events[before:])
    again = [event for event in events[before:] if event[0] not in lasting]
    for _ in range(PASSES - 1):
        reserved = allocator.reserved
        _write(recorder, allocator, held, again)
        if allocator.reserved == reserved:
            break
    return allocator


def _changes(events: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Net change in bytes of each allocation that has one."""
    net: Counter[int] = Counter()
    for index, change in events:
        net[index] += change
    return {index: change for index, change in net.items() if change}


def _write(
    recorder: Recorder, allocator: CachingAllocator, held: dict[int, int], events: Iterable[tuple[int, int]]
) -> None:
    """held: bytes of each allocation, which is updated."""
    for index, change in events:
        size = held.get(index, 0)
        if size:
            allocator.free(index)
        held[index] = size = size + change
        if size > 0:
            allocator.malloc(index, size, recorder.allocations[index].stream)
