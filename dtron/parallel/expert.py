"""Expert parallel: each of the `ep` ranks holds whole experts, and rows travel to the experts their tokens chose.

The ranks of `ep` are those that differ in data, context or tensor coordinates of one replica and stage: they hold
different tokens, sequence parallel included, so each routes its own (Lepikhin et al. 2020, arXiv 2006.16668). ep splits
those ranks a second time, as (expert_fsdp, ep) with ep innermost; the experts are sharded by ep, then by FSDP over
expert_fsdp. Tensor parallel does not split them: the rows of a tp group are different already.

Per layer and forward, of R rows on a rank:

    all-to-all   [N]     how many rows each rank sends to each expert
    all-to-all   [R, D]  the rows, to the ranks of their experts; one host wait for the two lists of split sizes
    here         sorted by expert, through the grouped products
    all-to-all   [R, D]  back, to where they came from

No row is dropped. An expert's gradient is complete over the rows it was sent; summing over expert_fsdp (and
dp_replicate) is all that is left, and that is what FSDP does. The router is replicated, its gradients are summed.
"""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import PrepareModuleInput
from torch.distributed.tensor.parallel.style import ParallelStyle

from dtron import compat
from dtron.config.sections import Config
from dtron.errors import UserError
from dtron.mesh import Degrees, Mesh
from dtron.models.moe import Experts, MixtureOfExperts, MoEConfig, Router, permute, swiglu_of_experts
from dtron.parallel.forwards import replace_forward
from dtron.parallel.incompatible import FEATURES

__all__ = ["FeedForwardInput", "LocalRouter", "apply_expert_parallel", "check_experts"]

SEQUENCE = Shard(1)
ROUTER_GRADIENT = Partial()  # each tensor-parallel rank's tokens give a part of it
ALIGNMENT = 16  # bytes, of both sizes of an expert's matrices: what the grouped product needs


def apply_expert_parallel(part: nn.Module, mesh: Mesh) -> None:
    """Shard the experts of a meta model (a stage) over mesh.ep, and let rows travel. Before tensor parallel."""
    sequence = [dim.get_group() for dim in (mesh.cp, mesh.tp) if dim is not None and dim.size() > 1]
    sum_over_sequence = partial(_sum_over, sequence)  # one for all blocks, see `forwards.py`
    for module in part.modules():
        if isinstance(module, MixtureOfExperts) and sequence:
            module.sum_over_sequence = sum_over_sequence
        if isinstance(module, Experts) and mesh.ep is not None:
            for name, p in list(module.named_parameters(recurse=False)):
                shard = distribute_tensor(p.detach(), mesh.ep, [Shard(0)], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(shard))
            module.ep_mesh = mesh.ep  # type: ignore[assignment]
            replace_forward(module, _dispatch)


def _sum_over(groups: list[torch.distributed.ProcessGroup], counts: Tensor) -> Tensor:
    for group in groups:
        counts = _wait(funcol.all_reduce(counts, "sum", group))
    return counts


def _wait(tensor: Tensor) -> Tensor:
    finished: Tensor = funcol.wait_tensor(tensor)  # type: ignore[no-untyped-call]
    return finished


def _dispatch(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """rows [R, D] sorted by expert, counts [N] of this rank's -> each through its expert, wherever that is; [R, D]."""
    weights, ep = [cast(DTensor, p).to_local() for p in experts.parameters()], cast(DeviceMesh, experts.ep_mesh)
    n, group = ep.size(), ep.get_group()
    if n == 1:
        return swiglu_of_experts(rows, counts, *weights, limit=experts.limit)
    with torch.no_grad():
        # [n, N / n]: how many rows of each rank, for each expert here.
        theirs = _wait(funcol.all_to_all_single(counts, None, None, group)).view(n, -1)
        sent, received = torch.stack((counts.view(n, -1).sum(1), theirs.sum(1))).tolist()  # the one host wait
        # Rows come sorted by (rank, expert) and are wanted by (expert, rank).
        expert = torch.arange(theirs.size(1), device=rows.device).repeat(n)
        order = expert.repeat_interleave(theirs.flatten(), output_size=sum(received)).argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=rows.device))
    here = _wait(funcol.all_to_all_single_autograd(rows, received, sent, group))
    out = swiglu_of_experts(permute(here, order, back), theirs.sum(0), *weights, limit=experts.limit)
    return _wait(funcol.all_to_all_single_autograd(permute(out, back, order), sent, received, group))


# --- beside tensor parallel: what its plan says of a mixture of experts


class LocalRouter(ParallelStyle):
    """A router sees this rank's tokens only: weights replicated over tp, their gradients summed; plain in and out."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Router)
        for name in ("weight", "bias"):
            if (p := getattr(module, name)) is not None:
                setattr(module, name, nn.Parameter(distribute_tensor(p, mesh, [Replicate()], src_data_rank=None)))
        replace_forward(module, _route)
        return module


def _route(module: Router, x: Tensor) -> Tensor:
    def local(p: Tensor | None) -> Tensor | None:
        return None if p is None else cast(DTensor, p).to_local(grad_placements=[ROUTER_GRADIENT])

    weight = local(module.weight)
    assert weight is not None
    return module.scores(x, weight, local(module.bias))


class FeedForwardInput(ParallelStyle):
    """Of a dense feed-forward the sequence is gathered; a mixture of experts keeps this rank's part of it."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        keeps = isinstance(module, MixtureOfExperts)
        style = PrepareModuleInput(
            input_layouts=(SEQUENCE,),
            desired_input_layouts=(SEQUENCE if keeps else Replicate(),),
            use_local_output=keeps,
        )
        return style._apply(module, mesh)


def check_experts(c: Config, m: MoEConfig | None, dim: int, d: Degrees) -> None:
    """UserError unless the experts divide over the ep ranks, these over the others, and the products can be made."""
    if m is None:
        if d.ep > 1:
            raise UserError(
                f"parallelism.expert_parallel_degree is {d.ep}, but model.name {c.model.name} has no experts; set it "
                "to 1, or choose a mixture of experts: mixtral, qwen3_moe, gpt_oss, olmoe"
            )
        return
    if not 1 <= m.top_k <= m.n_experts:
        raise UserError(f"model: {m.top_k} experts per token of {m.n_experts}; expected 1 to {m.n_experts}")
    if d.ep > 1 and m.n_experts % d.ep:
        raise UserError(
            f"expert_parallel_degree {d.ep} does not divide the {m.n_experts} experts; choose a divisor of them"
        )
    borrowed = d.dp_shard * d.cp * d.tp
    if borrowed % d.ep:
        raise UserError(
            f"expert_parallel_degree {d.ep} does not divide dp_shard {d.dp_shard} x cp {d.cp} x tp {d.tp} = "
            f"{borrowed}, the ranks it borrows; lower it, or change one of those"
        )
    if (d.ep > 1 or d.tp > 1) and not compat.has_units_of_two_meshes:
        for feature in ("zero-bubble schedule", "compiled blocks", "recompute by operation"):
            if FEATURES[feature](c):
                raise UserError(
                    f"{feature} with experts that are sharded otherwise than the rest (ep or tp above 1) needs torch "
                    f"2.13, and this is {torch.__version__}; choose another setting, or install it"
                )
    size = 4 if c.training.mixed_precision_param == "float32" else 2
    for what, number in (("the hidden size", dim), ("the experts' hidden size", m.expert_dim)):
        if number * size % ALIGNMENT:
            raise UserError(
                f"model: {what} {number} in {c.training.mixed_precision_param} is not a multiple of {ALIGNMENT} bytes, "
                f"which the grouped product of experts needs; choose a multiple of {ALIGNMENT // size}"
            )
    others = borrowed // d.ep
    if m.n_experts // d.ep < others and (dim % others or m.expert_dim % others):
        raise UserError(
            f"each of {m.n_experts // d.ep} experts is sharded over {others} ranks, but model.dim {dim} and the "
            f"experts' hidden size {m.expert_dim} are not multiples of that; raise expert_parallel_degree"
        )
