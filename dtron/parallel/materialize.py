"""Meta parameters -> initial values; each rank generates no more than its shards need."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dtron.models.init import initial_rows

__all__ = ["initialize"]


@torch.no_grad()
def initialize(parameters: Iterable[tuple[str, nn.Parameter]], std: Callable[[str], float | None], seed: int) -> None:
    """Fill parameters, given under their names in the plain model, with values that do not depend on the layout."""
    for name, p in parameters:
        local = p.to_local() if isinstance(p, DTensor) else p
        if local.numel() == 0:
            continue
        rows, columns = _held(p, 0), _held(p, 1)
        first, last = (int(rows[0]), int(rows[-1]) + 1) if rows is not None else (0, p.shape[0])
        # A shard's rows are contiguous: tensor parallel splits first and FSDP splits its part.
        values = initial_rows(name, p.shape, first, last, std(name), seed, local.device)
        local.copy_(values if columns is None else values.index_select(1, columns.to(values.device)))


def _held(p: nn.Parameter, dim: int) -> Tensor | None:
    """Indices along `dim` in this rank's shard; None: all. Found by sharding an index vector the same way."""
    if not isinstance(p, DTensor) or not any(getattr(placement, "dim", None) == dim for placement in p.placements):
        return None
    mesh = p.device_mesh
    same = [
        (placement if dim == 0 else Shard(0)) if getattr(placement, "dim", None) == dim else Replicate()
        for placement in p.placements
    ]
    index = torch.arange(p.shape[dim], device=mesh.device_type)
    return distribute_tensor(index, mesh, same, src_data_rank=None).to_local().cpu()
