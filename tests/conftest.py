"""What all tests share: quiet single-threaded torch, and one pool of ranks."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: ranks share few cores, and forking wants no threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import warnings
from collections.abc import Iterator

import pytest
import torch

# All that ranks need is imported here, once, before any of them is forked.
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.parallel
from ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """gloo ranks: ranks.run(world, function, *arguments) gives the list of the ranks' results."""
    pool = Ranks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forked ranks keep the filter: torch warns of its own internals
        logging.getLogger("torch").setLevel(logging.ERROR)
        pool.grow(16)
    yield pool
    pool.close()
