"""A model of torch's caching allocator on CUDA: what it reserves for a sequence of allocations and frees.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.11 to 2.13; sizes in c10/core/AllocatorConfig.h),
whose functions are named here; with no limit of the memory, so nothing is ever given back to CUDA. Each stream has
pools of its own: a block that one stream has freed is not used by another.

With expandable segments (PYTORCH_ALLOC_CONF=expandable_segments:True) a pool of a stream is one range of addresses,
which grows by whole segments at its end. Without, each segment is an allocation of its own, and blocks of two segments
never merge.
"""

import bisect
from collections.abc import Hashable

__all__ = ["CachingAllocator"]

MIN_BLOCK = 512  # kMinBlockSize: sizes are multiples of it
SMALL = 1 << 20  # kSmallSize: up to this a request is one of the small pool
SMALL_SEGMENT = 2 << 20  # kSmallBuffer
LARGE_SEGMENT = 20 << 20  # kLargeBuffer
MIN_LARGE = 10 << 20  # kMinLargeAlloc: from this on a segment is made for one request
ROUND_LARGE = 2 << 20  # kRoundLarge
APART = 1 << 50  # between the addresses of two segments


def _round(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class _Block:
    """Part of a segment; before, after: its neighbours there."""

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    def __init__(self, pool: "_Pool", address: int, size: int, before: "_Block | None", after: "_Block | None") -> None:
        self.pool, self.address, self.size = pool, address, size
        self.before, self.after, self.free = before, after, False


class _Pool:
    """The small or the large blocks of one stream; free ones by size, then address (BlockComparatorSize)."""

    def __init__(self, small: bool, expandable: bool) -> None:
        self.small, self.expandable = small, expandable
        self.free: list[tuple[int, int]] = []
        self.by_address: dict[int, _Block] = {}
        self.segments = 0
        self.last: _Block | None = None  # of an expandable segment

    def put(self, block: _Block) -> None:
        block.free = True
        self.by_address[block.address] = block
        bisect.insort(self.free, (block.size, block.address))

    def take(self, block: _Block) -> None:
        block.free = False
        del self.by_address[block.address]
        del self.free[bisect.bisect_left(self.free, (block.size, block.address))]

    def join(self, block: _Block, after: _Block) -> _Block:
        """`block` with the one after it, neither of which is among the free."""
        block.size += after.size
        block.after = after.after
        if after.after:
            after.after.before = block
        if self.last is after:
            self.last = block
        return block

    def best_fit(self, size: int) -> _Block | None:
        """get_free_block: the smallest that is large enough; the end of an expandable segment counts as endless."""
        at = bisect.bisect_left(self.free, (size, -1))
        if at < len(self.free) - 1 and self.by_address[self.free[at][1]] is self.last:
            at += 1
        if at == len(self.free):
            return None
        block = self.by_address[self.free[at][1]]
        self.take(block)
        return block

    def grow(self, size: int) -> tuple[_Block, int]:
        """A block of at least `size` bytes that was reserved, and the bytes that were."""
        if not self.expandable:  # get_allocation_size
            large = LARGE_SEGMENT if size < MIN_LARGE else _round(size, ROUND_LARGE)
            new = SMALL_SEGMENT if self.small else large
            self.segments += 1
            return _Block(self, self.segments * APART, new, None, None), new
        last, unit = self.last, SMALL_SEGMENT if self.small else LARGE_SEGMENT
        if last is not None and last.free:  # try_allocate_expandable_block: what is free at the end is part of it
            self.take(last)
            new = _round(size - last.size, unit)
            last.size += new
            return last, new
        new = _round(size, unit)
        block = _Block(self, last.address + last.size if last else 0, new, last, None)
        if last:
            last.after = block
        self.last = block
        return block, new


class CachingAllocator:
    """Bytes that are allocated, in blocks, and reserved: now and at most."""

    def __init__(self, expandable_segments: bool) -> None:
        self.expandable_segments = expandable_segments
        self.allocated = self.most_allocated = self.reserved = self.most_reserved = 0
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._blocks: dict[Hashable, _Block] = {}

    def malloc(self, key: Hashable, size: int, stream: int = 0) -> None:
        """Allocate `size` bytes, more than 0, on a stream under a key that is not in use."""
        size = max(MIN_BLOCK, _round(size, MIN_BLOCK))  # round_size
        small = size <= SMALL
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = _Pool(small, self.expandable_segments)
        block = pool.best_fit(size)
        if block is None:
            block, new = pool.grow(size)
            self.reserved += new
            self.most_reserved = max(self.most_reserved, self.reserved)
        rest = block.size - size
        if rest >= MIN_BLOCK if small or self.expandable_segments else rest > SMALL:  # should_split
            after = _Block(pool, block.address + size, rest, block, block.after)
            if block.after:
                block.after.before = after
            block.after, block.size = after, size
            if pool.last is block:
                pool.last = after
            pool.put(after)
        self._blocks[key] = block
        self.allocated += block.size
        self.most_allocated = max(self.most_allocated, self.allocated)

    def free(self, key: Hashable) -> None:
        """Free what was allocated under `key`; it merges with free neighbours (try_merge_blocks)."""
        block = self._blocks.pop(key)
        self.allocated -= block.size
        pool = block.pool
        if (before := block.before) and before.free:
            pool.take(before)
            block = pool.join(before, block)
        if (after := block.after) and after.free:
            pool.take(after)
            block = pool.join(block, after)
        pool.put(block)
