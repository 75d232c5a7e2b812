"""Data parallel: FSDP2, HSDP and plain replication through one call, `fully_shard`.

Each block is a unit: its weights are gathered just before use, its gradients reduce-scattered just
after (Zhao et al. 2023, arXiv 2304.11277). So are the modules before the blocks, for a Llama the embedding, and those
after, [norm, head]; together they would stay gathered for the whole step (2.1 GB for Llama 3 8B in bf16) and be
reduced at its end. Where the two share a parameter (tied embeddings) they stay together, in the root's unit.

The mesh decides the kind: dp_shard_cp alone is FSDP;
with dp_replicate it is HSDP, and with a shard degree of 1 plain data parallel. It is applied on meshes
of size 1 too, so that mixed precision and every parameter's mesh are the same on one rank as on a thousand.

The loss is already divided by the tokens of the global batch, so gradients are summed, never averaged.

Which ZeRO stage (Rajbhandari et al. 2020, arXiv 1910.02054) a setting is, and what a rank holds, in bytes per
parameter with bf16 compute, fp32 state and N shards; weights after a forward, gradients between microbatches:

| fsdp_reshard_after_forward | gradient_reduce  | ZeRO | weights | gradients | AdamW |
|----------------------------|------------------|------|---------|-----------|-------|
| always                     | every_microbatch | 3    | 4/N     | 4/N       | 8/N   |
| never                      | every_microbatch | 2    | 4/N + 2 | 4/N       | 8/N   |
| never                      | last_microbatch  | 1    | 4/N + 2 | 4         | 8/N   |
"""

import itertools
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from dtron import compat
from dtron.compat import units
from dtron.config.sections import Parallelism
from dtron.mesh import Mesh
from dtron.models.moe import Experts
from dtron.models.spec import layers_of

__all__ = ["apply_data_parallel", "free_gathered_weights", "reduce_gradients_now", "reshards_after_forward"]


def apply_data_parallel(
    model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype, reshard_after_forward: bool, offload: bool,
    expert_mesh: DeviceMesh | None = None,
) -> None:  # fmt: skip
    """Shard `model` (a stage, with `layers`) in place over `mesh`; compute in `compute_dtype`, reduce in fp32.

    expert_mesh: over which experts are sharded, where it is another. A frozen parameter, the bias that balances
    experts, is left as it is, the same on every rank.
    """
    # Inputs are not cast: cos and sin stay fp32, and hidden states already have the compute dtype.
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    offload_policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()

    frozen = {p for p in model.parameters() if not p.requires_grad}
    options: dict[str, Any] = {"mp_policy": policy, "offload_policy": offload_policy, "ignored_params": frozen}

    def shard(module: nn.Module | list[nn.Module], reshard: bool, **more: Any) -> None:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, **(options | more))

    before, after = _units_outside_layers(model)
    if before:
        shard(before, reshard_after_forward)
    for block in layers_of(model).values():
        experts = [m for m in block.modules() if isinstance(m, Experts)] if expert_mesh else []
        if not experts or not expert_mesh:
            shard(block, reshard_after_forward)
            continue
        placement = _expert_placement(experts[0], expert_mesh)
        if of_two := compat.unit_of_two_meshes(mesh, expert_mesh, experts[0].parameters(), placement):
            shard(block, reshard_after_forward, shard_placement_fn=of_two)
        else:  # a unit of their own inside the block's
            nested = {"shard_placement_fn": lambda p, placement=placement: placement}
            fully_shard(experts[0], mesh=expert_mesh, reshard_after_forward=reshard_after_forward, **(options | nested))
            shard(block, reshard_after_forward)
    if after:
        shard(after, False)  # their backward comes at once
    shard(model, False)
    for module in before:
        assert isinstance(module, FSDPModule)
        # Nothing to gather ahead in the backward. By default it would be what ran before: after an evaluation, or in a
        # second microbatch, that is the head.
        module.set_modules_to_backward_prefetch([module])
        module.set_unshard_in_backward(not all(isinstance(m, nn.Embedding) for m in before))  # a look-up needs none
    if expert_mesh is not None or (reshard_after_forward and mesh.size(mesh.ndim - 1) > 1):
        _prefetch_explicitly(before[:1], list(layers_of(model).values()), after[:1])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    units.copy_no_whole_units(model)


def _prefetch_explicitly(before: list[nn.Module], blocks: list[nn.Module], after: list[nn.Module]) -> None:
    """Gather what comes next when a module begins: in the forward the next of all, in the backward the block before.

    Left to itself FSDP gathers ahead in the forward only as far as the host is ahead of the device, which waits (for
    the sizes of what experts exchange) and small blocks undo.
    """
    parts = (*before, *blocks, *after)
    units: list[list[FSDPModule]] = [[m for m in part.modules() if isinstance(m, FSDPModule)] for part in parts]
    for here, following in itertools.pairwise(units):
        here[0].set_modules_to_forward_prefetch(following)
    for here, following in itertools.pairwise(units[len(before) : len(before) + len(blocks)]):
        following[0].set_modules_to_backward_prefetch(here)


def _expert_placement(experts: Experts, mesh: DeviceMesh) -> Shard:
    """Whole experts to each rank; where there are fewer of them than ranks, a part of each."""
    ranks = mesh.size(mesh.ndim - 1)
    here = cast(DTensor, experts.gate_proj).to_local().size(0)
    return Shard(0 if here >= ranks else 1)


def _units_outside_layers(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The children with parameters before and after `layers`; no units where the two groups share a parameter."""
    children = list(model.named_children())
    at = [name for name, _ in children].index("layers")
    before, after = (
        [module for _, module in part if any(True for _ in module.parameters())]
        for part in (children[:at], children[at + 1 :])
    )
    ids = [{id(p) for module in part for p in module.parameters()} for part in (before, after)]
    return (before, after) if ids[0].isdisjoint(ids[1]) else ([], [])


def reshards_after_forward(p: Parallelism, mesh: Mesh, parameters: int, memory_bytes: int | None) -> bool:
    """Whether blocks free their gathered weights after the forward, and gather them again for the backward.

    By default not in a pipeline, whose microbatches would all gather them; nor where a rank gathers from itself alone,
    so that gathering is copies without messages, and the copies have room: weights, gradients, AdamW's moments and the
    copies, 18 bytes for each of the model's `parameters`, are at most half of `memory_bytes` (None: unlimited).
    """
    if p.fsdp_reshard_after_forward != "default":
        return p.fsdp_reshard_after_forward == "always"
    meshes = [mesh.fsdp] if mesh.expert_fsdp is None else [mesh.fsdp, mesh.expert_fsdp]
    shards = max(m.size(m.ndim - 1) for m in meshes)
    fits = memory_bytes is None or 18 * parameters / mesh.degrees.tp <= memory_bytes / 2
    return mesh.degrees.pp == 1 and not (shards == 1 and fits)


def reduce_gradients_now(model: nn.Module, every_microbatch: bool, last: bool, keep_weights: bool = False) -> None:
    """Call before a microbatch's backward: whether it reduces. HSDP's replicas are all-reduced at the last one only.

    keep_weights: those that are gathered stay until the last one, so that they are gathered once per optimizer step.
    """
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(last or not keep_weights)
    model.set_requires_gradient_sync(every_microbatch or last)
    model.set_requires_all_reduce(last)
    model.set_is_last_backward(last)


def free_gathered_weights(model: nn.Module) -> None:
    """Call after a forward without a backward, which would free them: the next one must not use outdated weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
