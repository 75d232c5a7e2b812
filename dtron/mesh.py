"""Degrees -> process groups: who communicates with whom in each dimension. The only place that makes a mesh.

World ranks are laid out row by row as (pp, dp_replicate, dp_shard, cp, tp): tensor parallel, which
communicates most, is innermost and stays inside a node; pipeline parallel, which communicates least, is outermost.
One 4-D DeviceMesh carries the parameters: FSDP shards over the data-parallel and context ranks
together, because both hold different tokens and the same weights. Context parallel itself needs one more group.

    group         its ranks differ in    they exchange
    world         everything             the count of labels; loss, gradient norm and stop requests, once per step
    pp            the layers they hold   hidden states and their gradients, stage to stage; gradients of tied copies
    dp_replicate  their sequences        gradients, all-reduced
    dp_shard_cp   their tokens           weights, gathered for each use; gradients, reduce-scattered
    tp            part of each matrix    activations, gathered and reduce-scattered around attention and feed-forward
    cp            part of the sequence   keys and values, and their gradients
    ep            the experts they hold  rows, to the experts that their tokens chose, and back
    expert_fsdp   the shards of experts  the experts' weights, gathered; their gradients, reduce-scattered

That is at most 6 groups per rank, whatever the layout; a run that saves checkpoints makes a seventh for them. The
data-parallel coordinates of the loader are arithmetic and need no group.
Experts split the same world a second time, as (pp, dp_replicate, expert_fsdp, ep), where expert_fsdp x ep =
dp_shard x cp x tp and ep is innermost. A model without experts makes none of these groups, and one whose experts are
sharded as everything else (ep and tp 1) does not either; else a rank has four more.
"""

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dtron.config.sections import Parallelism
from dtron.errors import UserError

__all__ = ["Degrees", "Mesh", "fewest_ranks", "resolve_degrees"]


@dataclass(frozen=True)
class Degrees:
    """How many ranks each dimension has; their product, without ep, is the world size."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1  # no factor of the world: it borrows from dp_shard x cp x tp

    @property
    def world(self) -> int:
        return self.pp * self.stage

    @property
    def stage(self) -> int:
        """Ranks that hold one pipeline stage."""
        return self.dp * self.cp * self.tp

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        parts = {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": self.dp_shard,
            "cp": self.cp,
            "tp": self.tp,
        }
        factors = " x ".join(f"{name} {degree}" for name, degree in parts.items() if degree > 1) or "one rank"
        return f"{factors} with ep {self.ep}" if self.ep > 1 else factors


def resolve_degrees(p: Parallelism, world: int) -> Degrees:
    """The configured degrees, with the shard degree -1 filled in. UserError where they do not make the world."""
    pp, replicate, shard = p.pipeline_parallel_degree, p.data_parallel_replicate_degree, p.data_parallel_shard_degree
    cp, tp = p.context_parallel_degree, p.tensor_parallel_degree
    others = pp * replicate * cp * tp
    arithmetic = f"pp {pp} x dp_replicate {replicate} x cp {cp} x tp {tp} = {others}"
    if shard == -1:
        if world % others:
            raise UserError(
                f"{arithmetic} does not divide the world size {world}, so no data_parallel_shard_degree fits; "
                f"change a degree or start a multiple of {others} ranks"
            )
        shard = world // others
    degrees = Degrees(pp, replicate, shard, cp, tp, p.expert_parallel_degree)
    if degrees.world != world:
        hint = f": --dp -1 gives dp_shard the other {world // others}" if world % others == 0 else ""
        raise UserError(
            f"pp {pp} x dp_replicate {replicate} x dp_shard {shard} x cp {cp} x tp {tp} = {degrees.world}, "
            f"but the world size is {world}; start torchrun with {degrees.world} ranks or change a degree{hint}"
        )
    return degrees


def fewest_ranks(p: Parallelism, least_shards: int = 1) -> int:
    """That the configured degrees need; a shard degree of -1 is `least_shards`, or more where the experts borrow it."""
    inside, shard = p.context_parallel_degree * p.tensor_parallel_degree, p.data_parallel_shard_degree
    if shard == -1:
        ep = p.expert_parallel_degree
        shard = max(least_shards, ep // math.gcd(ep, inside))
    return p.pipeline_parallel_degree * p.data_parallel_replicate_degree * shard * inside


class Mesh:
    """The process groups of one layout and this rank's coordinates in it.

    pp, tp, cp: 1-D meshes. fsdp: what `fully_shard` takes, 1-D (dp_shard_cp), or 2-D
    (dp_replicate, dp_shard_cp) for HSDP. Of a model with `experts`, expert_fsdp is the same for them, and ep a 1-D
    mesh; both None where the experts are sharded as everything else.
    """

    def __init__(self, degrees: Degrees, device_type: str, experts: bool = False) -> None:
        d = self.degrees = degrees
        names = ("pp", "dp_replicate", "dp_shard_cp", "tp")
        dense = init_device_mesh(device_type, (d.pp, d.dp_replicate, d.dp_shard * d.cp, d.tp), mesh_dim_names=names)
        self.pp, self.tp = dense["pp"], dense["tp"]
        self.fsdp = dense["dp_shard_cp"] if d.dp_replicate == 1 else dense["dp_replicate", "dp_shard_cp"]
        self.cp = _context_mesh(d, device_type)
        self.ep = self.expert_fsdp = None
        if experts and (d.ep > 1 or d.tp > 1):
            sizes = (d.pp, d.dp_replicate, d.dp_shard * d.cp * d.tp // d.ep, d.ep)
            sparse = init_device_mesh(device_type, sizes, mesh_dim_names=("pp", "dp_replicate", "expert_fsdp", "ep"))
            self.ep = sparse["ep"]
            self.expert_fsdp = sparse["expert_fsdp"] if d.dp_replicate == 1 else sparse["dp_replicate", "expert_fsdp"]
        rank = dist.get_rank()
        self.tp_rank = rank % d.tp
        self.cp_rank = rank // d.tp % d.cp
        self.dp_rank = rank // (d.tp * d.cp) % d.dp
        self.pp_rank = rank // d.stage


def _context_mesh(d: Degrees, device_type: str) -> DeviceMesh | None:
    """The ranks that share this rank's sequences: the inner part of dp_shard_cp, which the dense mesh cannot name."""
    if d.cp == 1:
        return None
    outer = range(d.world // (d.cp * d.tp))
    ranks = [[(o * d.cp + c) * d.tp + t for c in range(d.cp)] for o in outer for t in range(d.tp)]
    group, _ = dist.new_subgroups_by_enumeration(ranks, group_desc="mesh_cp")  # type: ignore[no-untyped-call]
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("cp",))
