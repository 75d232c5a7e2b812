"""Initial weights as a pure function of (seed, parameter name, row): the same on every layout.

A tensor is cut into blocks of whole rows and each block has its own generator, seeded by a hash of
(seed, name, block). A rank generates the blocks that hold its rows and no others: at 405B on 16,384
ranks that is the rank's own shard, times the tensor-parallel degree for the two matrices split by
columns, and at most two more blocks per tensor. CPU and CUDA generators differ, so weights agree
across layouts of one device type.
"""

import fnmatch
import hashlib
import math

import torch
from torch import Tensor

from dtron.models.llama import LlamaConfig
from dtron.models.variants import XIELU, softplus_inverse

__all__ = ["Constant", "initial_rows", "llama_init_std"]

BLOCK_ELEMENTS = 2**18  # large enough that seeding costs nothing, small enough that a shard wastes little


class Constant(float):
    """In place of a standard deviation: all initial values are this."""


def llama_init_std(name: str, config: LlamaConfig) -> float | None:
    """Standard deviation of a parameter's initial values; None: all ones (the norms). Biases are 0.

    So are norms whose weights are added to 1. A `Constant` is the value itself.

    Projections into the residual stream are scaled by 1/sqrt(2 n_layers) (GPT-2, section 2.3).
    """
    if fnmatch.fnmatch(name, "*norm.weight"):
        return 0.0 if config.variant.norm.endswith("_1p") else None
    if ".act_fn." in name:
        return Constant(softplus_inverse(XIELU.INITIAL[name.rpartition(".")[2]]))
    if name.endswith("bias"):
        return 0.0
    if name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
        return config.init_std / math.sqrt(2 * config.n_layers)
    return config.init_std


def initial_rows(
    name: str, shape: torch.Size, first: int, last: int, std: float | None, seed: int, device: torch.device
) -> Tensor:
    """Rows [first, last) of parameter `name` of the whole shape `shape`, in fp32."""
    row_shape = shape[1:]
    if std is None or isinstance(std, Constant):
        return torch.full((last - first, *row_shape), 1.0 if std is None else std, device=device)
    per_block = max(1, BLOCK_ELEMENTS // max(1, row_shape.numel()))
    generator = torch.Generator(device)
    blocks = []
    for block in range(first // per_block, -(-last // per_block)):
        start, stop = block * per_block, min(shape[0], (block + 1) * per_block)
        generator.manual_seed(_seed(seed, name, block))
        rows = torch.empty(stop - start, *row_shape, device=device).normal_(0.0, std, generator=generator)
        blocks.append(rows[max(first - start, 0) : last - start])
    return torch.cat(blocks) if blocks else torch.empty(0, *row_shape, device=device)


def _seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a generator takes 63 bits
