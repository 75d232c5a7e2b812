"""The pool of ranks itself: a rank that dies is a failure at once, and the next job finds a whole pool."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, Ranks, kept


def die(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def test_rank_that_dies_is_told_and_the_next_job_has_a_whole_pool() -> None:
    pool = Ranks()
    try:
        began = time.monotonic()
        with pytest.raises(RankError, match=r"ranks died, with the exit codes \{1: 3\}"):
            pool.run(3, die, 1, timeout=60)
        assert time.monotonic() - began < 30
        assert pool.run(2, dist.get_rank) == [0, 1]
    finally:
        pool.close()


def kept_list(value: int) -> tuple[list[int], int]:
    """A list that the jobs of one world share, and a sum over its ranks."""
    found = kept(list)
    found.append(value)
    total = torch.ones(())
    dist.all_reduce(total)
    return found, int(total)


def test_jobs_in_a_row_share_a_world_where_they_say_so() -> None:
    pool = Ranks()
    try:
        shares = [(2, "a"), (2, "a"), (3, "a"), (2, "a"), (2, None), (2, None), (2, "b"), (2, "b")]
        seen = [pool.run(world, kept_list, i, share=share) for i, (world, share) in enumerate(shares)]
        expected = [([0], 2), ([0, 1], 2), ([2], 3), ([3], 2), ([4], 2), ([5], 2), ([6], 2), ([6, 7], 2)]
        assert seen == [[one] * world for one, (world, _) in zip(expected, shares, strict=True)]
        with pytest.raises(RankError):
            pool.run(2, die, 1, share="b")
        assert pool.run(2, kept_list, 8, share="b") == [([8], 2)] * 2, "processes of their own again"
    finally:
        pool.close()
