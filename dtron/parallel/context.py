"""Context parallel: each sequence split over the `cp` ranks, attention by a causal ring.

Only attention needs the other ranks' tokens. Keys and values (the K/V heads, never expanded to the query
heads) are communicated: gathered once ("allgather") or passed from rank to rank ("alltoall"), while each rank
keeps its queries (Liu et al. 2023, arXiv 2310.01889). With contiguous parts the last rank would do most
of the work of a causal mask, so the sequence is cut into 2*cp chunks and rank r holds chunks r and
2*cp-1-r ("headtail"): every rank then does the same work.

The ring is torch's own. It was compared with a ring of custom operators on torch 2.13: both equal
one process in loss, gradients and weights under fullgraph compile, selective recompute, tensor and pipeline
parallel, with either rotation; torch's has tested handlers for the CUDA flash, efficient and cudnn
kernels, and is 40 lines here instead of 160, so it stays.

It knows the causal mask only. With document masks, windows shorter than the sequence, a soft cap or sinks, the keys and
values are gathered once per layer, in rank order, and the rank's queries attend to them under their part of the mask;
the gradients are reduce-scattered back. This is so for all layers of a model, those without a window too: one path per
run. Keys outside of every window are gathered as well: with head-tail chunks a rank would need different chunks from
every other one, which is no collective. FlexAttention does not compute them.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from dtron import compat
from dtron.compat import ring
from dtron.config.sections import Config
from dtron.errors import UserError
from dtron.mesh import Degrees
from dtron.models.attention import AttentionMask, CausalAttention
from dtron.models.spec import ModelConfig, needs_masks
from dtron.parallel.forwards import replace_forward

__all__ = [
    "apply_context_parallel",
    "apply_gathered_attention",
    "check_sequence",
    "compile_options",
    "gathered_positions",
    "local_positions",
    "uses_masks",
]

_SEQUENCE = 2  # dimension of q, k, v [B, heads, S, D]


def uses_masks(c: Config, m: ModelConfig) -> bool:
    """Whether every forward of a run has masks, of documents or of the model; without, context parallel is a ring."""
    longest = max(c.training.seq_len, (c.validation.enable and c.validation.seq_len) or 0)
    return c.training.attention_mask == "document" or needs_masks(m, longest)


def apply_context_parallel(
    model: nn.Module, cp: DeviceMesh, rotate_method: str, head_tail: bool, compiled: bool
) -> None:
    """Make every CausalAttention in `model`, which is given a part of the sequence, attend to all of it.

    compiled: whether its blocks are. Their messages are then traced into them, but those of `alltoall` among three or
    more ranks, which must not be: the ring is one operator.
    """
    compat.enable_ring_attention(rotate_method, head_tail)
    one_operator = compiled and rotate_method == "alltoall" and cp.size() > 2
    for module in model.modules():
        if not isinstance(module, CausalAttention):
            continue
        if one_operator:
            module.cp_mesh = cp  # type: ignore[assignment]
            replace_forward(module, _attend_in_a_ring)
        else:
            parallelize_module(module, cp, compat.ring_attention_style())


def _attend_in_a_ring(
    module: CausalAttention, q: Tensor, k: Tensor, v: Tensor, mask: None = None, sinks: None = None
) -> Tensor:
    group = cast(DeviceMesh, module.cp_mesh).get_group().group_name
    out: Tensor = ring.ring_attention(q, k, v, module.scale, group)[0]
    return out


def compile_options(backend: str) -> dict[str, Any] | None:
    """Options of torch.compile for blocks with context parallel, so that its messages overlap with attention.

    As it traces them, inductor (2.11 and 2.13) waits for each message at once; by this pass of its own only where the
    message is used.
    """
    passes = ["sink_waits_iterative"]
    options = {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": passes}
    return options if backend == "inductor" else None


def apply_gathered_attention(model: nn.Module, cp: DeviceMesh) -> None:
    """Make every CausalAttention in `model` attend, under the mask it is given, to the keys and values of all ranks."""
    for module in model.modules():
        if isinstance(module, CausalAttention):
            module.cp_mesh = cp  # type: ignore[assignment]
            replace_forward(module, _attend_to_all)


def _attend_to_all(
    module: CausalAttention, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, sinks: Tensor | None = None
) -> Tensor:
    both = compat.all_gather(torch.stack((k, v)), _SEQUENCE + 1, cast(DeviceMesh, module.cp_mesh))
    k, v = both.unbind()  # [B, K, S, D] each, of the sequence
    return CausalAttention.forward(module, q, k, v, mask, sinks)


def gathered_positions(seq_len: int, size: int, head_tail: bool) -> Tensor:
    """Global positions [S] of the tokens in the order of gathered keys and values: rank after rank."""
    return torch.cat([local_positions(seq_len, rank, size, head_tail) for rank in range(size)])


def local_positions(seq_len: int, rank: int, size: int, head_tail: bool = True) -> Tensor:
    """Global positions [S / size] of the tokens that context rank `rank` of `size` holds, in its order.

    They index the batch and are what the rotary embedding needs: positions in the whole sequence.
    """
    positions = torch.arange(seq_len)
    if not head_tail or size == 1:
        return positions.chunk(size)[rank]
    chunks = positions.chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def check_sequence(c: Config, d: Degrees) -> None:
    """UserError unless context parallel cuts sequences into equal chunks, and sequence parallel each rank's part."""
    chunks = 2 * d.cp if c.parallelism.context_parallel_load_balancer else d.cp
    v = c.validation
    lengths = {} if v.only and v.seq_len else {"training.seq_len": c.training.seq_len}
    if v.enable and v.seq_len:
        lengths["validation.seq_len"] = v.seq_len
    for key, length in lengths.items():
        if d.cp > 1 and length % chunks:
            raise UserError(
                f"{key} {length} is not divisible by {chunks}, that is context_parallel_degree {d.cp}, or twice that "
                "with the head-tail load balancer"
            )
        if length // d.cp % d.tp:
            raise UserError(
                f"{key} {length} / cp {d.cp} = {length // d.cp} is not divisible by tensor_parallel_degree {d.tp}"
            )
