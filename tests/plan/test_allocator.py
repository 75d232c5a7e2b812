"""The model of CUDA's caching allocator on sequences whose result follows from c10/cuda/CUDACachingAllocator.cpp."""

import random

import pytest

from dtron.plan.allocator import CachingAllocator

KIB, MIB = 1 << 10, 1 << 20


def after(steps: str, expandable: bool = False) -> CachingAllocator:
    """Of steps such as "a=3M b=1K@1 -a": allocate 3 MiB, then 1 KiB on stream 1, then free the first."""
    allocator = CachingAllocator(expandable)
    for step in steps.split():
        if step.startswith("-"):
            allocator.free(step[1:])
            continue
        key, size = step.split("=")
        size, _, stream = size.partition("@")
        unit = {"K": KIB, "M": MIB}.get(size[-1], 1)
        allocator.malloc(key, round(float(size.rstrip("KMB")) * unit), int(stream or 0))
    return allocator


# steps, bytes allocated, reserved without and with expandable segments (in MiB)
CASES = {
    "sizes round to 512 bytes, in a small segment of 2 MiB": ("a=1B b=513B", 1536, 2, 2),
    "1 MiB is small, and two of them fill a segment": ("a=1M b=1M", 2 * MIB, 2, 2),
    "a third takes another": ("a=1M b=1M c=1B", 2 * MIB + 512, 4, 4),
    "above 1 MiB it is large, of a segment of 20 MiB": ("a=3M b=1M", 4 * MIB, 22, 22),
    "requests below 10 MiB share 20 MiB": ("a=9M b=9M", 18 * MIB, 20, 20),
    "from 10 MiB on a segment is the size rounded to 2 MiB": ("a=11M", 12 * MIB, 12, 20),
    "expandable segments grow by 20 MiB": ("a=11M b=11M", 24 * MIB, 24, 40),
    "a freed block is used again": ("a=30M -a b=30M", 30 * MIB, 30, 40),
    "the smallest that fits is taken": ("a=40M b=30M -a -b c=28M d=40M", 70 * MIB - 2 * MIB, 70, 80),
    "what is left of a block is split off": ("a=40M -a b=25M c=15M", 40 * MIB, 40, 40),
    "but no rest of up to 1 MiB": ("a=40M -a b=39M", 40 * MIB, 40, 40),
    "segments do not merge": ("a=30M b=30M -a -b c=60M", 60 * MIB, 120, 60),
    "neighbours in a segment do": ("a=40M -a b=20M c=20M -b -c d=40M", 40 * MIB, 40, 40),
    "streams share nothing": ("a=30M@1 -a b=30M@2", 30 * MIB, 60, 80),
}
# Without expandable segments a rest of up to 1 MiB stays with its block, and so is allocated.
EXACT = {
    "from 10 MiB on a segment is the size rounded to 2 MiB": 11 * MIB,
    "expandable segments grow by 20 MiB": 22 * MIB,
    "but no rest of up to 1 MiB": 39 * MIB,
}


@pytest.mark.parametrize("name", CASES)
def test_rules(name: str) -> None:
    steps, allocated, reserved, expandable = CASES[name]
    plain = after(steps)
    assert (plain.allocated, plain.most_reserved) == (allocated, reserved * MIB)
    grown = after(steps, expandable=True)
    assert (grown.allocated, grown.most_reserved) == (EXACT.get(name, allocated), expandable * MIB)


def test_the_end_of_an_expandable_segment_is_kept_for_what_is_larger() -> None:
    """Its free end counts as endless in the best fit, and what grows it begins in it."""
    steps = "a=50M b=30M -a"  # free: 50 MiB before b, none after it, of 80 MiB
    assert after(f"{steps} -b c=70M", expandable=True).most_reserved == 80 * MIB
    kept = after("a=50M b=35M -a c=4M", expandable=True)  # 100 MiB; c fits in 15 at the end, and goes to the 50 before
    kept.malloc("d", 46 * MIB)
    kept.malloc("e", 15 * MIB)
    assert kept.most_reserved == 100 * MIB and kept.allocated == 100 * MIB
    assert after(f"{steps} c=60M", expandable=True).most_reserved == 140 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_nothing_is_lost(expandable: bool) -> None:
    """When all is free, one block is left of each segment."""
    rng, allocator, live = random.Random(0), CachingAllocator(expandable), list[int]()
    for key in range(3000):
        if live and rng.random() < 0.5:
            allocator.free(live.pop(rng.randrange(len(live))))
        else:
            allocator.malloc(key, int(2 ** rng.uniform(5, 26)), rng.randrange(2))
            live.append(key)
        assert allocator.allocated <= allocator.reserved
    for key in live:
        allocator.free(key)
    pools = allocator._pools.values()
    assert allocator.allocated == 0
    assert sum(size for pool in pools for size, _ in pool.free) == allocator.reserved == allocator.most_reserved
    assert sum(len(pool.free) for pool in pools) == (len(pools) if expandable else sum(p.segments for p in pools))
