"""The pool of ranks itself: a rank that dies is a failure at once, and the next job finds a whole pool."""

import os
import time

import pytest
import torch.distributed as dist
from ranks import RankError, Ranks


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
