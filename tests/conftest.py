"""What all tests share: quiet single-threaded torch, and one pool of ranks."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: ranks share few cores, and forking wants no threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests are of CPU ranks, also where there is a GPU; but see on_gpu.py
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Else inductor keeps processes, and threads that talk to them, which do not go well with forks.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# Before triton is imported, where it is: its kernels are tested without a GPU.
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from dtron.ranks.logs import setup_logging

torch.set_num_threads(1)
setup_logging()

POOL = pytest.StashKey[Ranks]()
# Files that take minutes begin first, else one worker would be left alone with them at the end.
FIRST = ("parity/test_matrix.py", "cluster/test_slurm.py", "checkpoint/test_resume.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="module", autouse=True)
def _no_ranks_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    """A file's ranks end with it: gloo's threads, of which every world leaves some, poll and slow down what follows."""
    yield
    pool = request.config.stash.get(POOL, None)
    if pool is not None and pool.worlds:
        pool.close()


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """gloo ranks: ranks.run(world, function, *arguments) gives the list of the ranks' results."""
    pool = request.config.stash[POOL] = Ranks()
    pool.grow(16)
    yield pool
    pool.close()
