"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): steps along the orthogonalized momentum of each matrix.

The update is that of `torch.optim.Muon`, on any layout. Orthogonalizing takes the whole matrix, which no rank has, and
only one rank needs to do it. So the matrices of a mesh are dealt out to its ranks, the most expensive first, in rounds
of at most one for each rank:

    momentum of the own shards -> shards to each matrix's owner -> Newton-Schulz there -> shards of the result back

A rank sends and receives its shards once each way, in the bf16 that the iteration computes in. Gathering every matrix
on every rank would move N times as much, and all N would compute the same. Where two dimensions of a mesh shard a
matrix, shards travel dimension by dimension: first FSDP's, which split the part that tensor parallel left. HSDP's
replicas take matrices in turn, and send each other the results.

Experts are stacked [experts, out, in]: each is a matrix, of which nothing is sent where its rank has all of it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

__all__ = ["Muon", "orthogonalize"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, chosen for its slope at 0
EPS = 1e-7
DTYPE = torch.bfloat16  # of the iteration, and of what is sent


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """U S' V^T of a matrix U S V^T [rows, columns], S' about 1: Newton-Schulz, operation by operation as torch's Muon.

    A step takes 4 m^2 n + 2 m^3 FLOPs, m the shorter side and n the longer.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(DTYPE)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


@dataclass(frozen=True)
class _Matrix:
    """A matrix of which this rank holds a shard: a parameter, or expert `index` of it.

    shape: of the whole. splits: mesh dimension -> the dimension of the matrix that it shards.
    """

    p: Tensor
    group: dict[str, Any]
    index: int | None
    shape: tuple[int, int]
    splits: dict[int, int]

    @property
    def cost(self) -> int:
        """In proportion to its FLOPs."""
        m, n = sorted(self.shape)
        return m * m * (2 * n + m)

    def shard(self, t: Tensor) -> Tensor:
        """This matrix's part of a tensor that is like the parameter."""
        local = t.to_local() if isinstance(t, DTensor) else t
        return local if self.index is None else local[self.index]


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` for sharded matrices [out, in] and stacks of them [experts, out, in].

    adjust_lr_fn: torch's. original: the rate times sqrt(max(1, out / in)); match_rms_adamw: times 0.2 sqrt(max(out,
    in)), by which a step is as large as AdamW's (arXiv 2502.16982), so that its rate and weight decay can be taken.
    state_dtype: of the momentum. `grad_scale` and `found_inf`: see `dtron.optim.adamw.AdamW`.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, nesterov: bool = True, ns_steps: int = 5,
        adjust_lr_fn: str = "original", state_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(groups, defaults | {"adjust_lr_fn": adjust_lr_fn})
        self._dtype = state_dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every matrix with a gradient; all ranks of its mesh call it alike."""
        families: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[_Matrix]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=self._dtype)
                    for matrix, key in _matrices(p, group):
                        families.setdefault(key, []).append(matrix)
        for (mesh, dims), matrices in families.items():
            exchange = _Exchange(mesh, dims)
            matrices.sort(key=lambda matrix: -matrix.cost)
            for i, first in enumerate(range(0, len(matrices), exchange.ranks)):
                turn = matrices[first : first + exchange.ranks]
                owners = range(len(turn)) if i % 2 == 0 else range(exchange.ranks - 1, -1, -1)
                self._round(exchange, dict(zip(owners, turn, strict=False)))

    def _round(self, exchange: "_Exchange", owned: dict[int, _Matrix]) -> None:
        """Step of the matrices in `owned`, by the number of the rank in `exchange` that orthogonalizes each."""
        mine = exchange.collect(owned, {owner: self._momentum(matrix) for owner, matrix in owned.items()})
        whole = {owner: orthogonalize(m, owned[owner].group["ns_steps"]) for owner, m in mine.items()}
        for owner, update in exchange.give_back(owned, whole).items():
            matrix = owned[owner]
            group, shard = matrix.group, matrix.shard(matrix.p)
            rate = group["lr"] * _rate_ratio(group["adjust_lr_fn"], matrix.shape)
            new = (shard * (1 - group["lr"] * group["weight_decay"])).add_(update, alpha=-rate)
            shard.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, shard, new))

    def _momentum(self, matrix: _Matrix) -> Tensor:
        """Count the gradient of the own shard in, and return what is to be orthogonalized, in DTYPE."""
        group, p = matrix.group, matrix.p
        assert p.grad is not None
        grad, buffer = matrix.shard(p.grad), matrix.shard(self.state[p]["momentum_buffer"])
        grad = grad if self.grad_scale is None else grad / self.grad_scale
        new = buffer.float().lerp(grad, 1 - group["momentum"])
        buffer.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, buffer, new))
        return (grad.lerp(new, group["momentum"]) if group["nesterov"] else new).to(DTYPE)


def _rate_ratio(adjust_lr_fn: str, shape: tuple[int, int]) -> float:
    out, into = shape
    return math.sqrt(max(1, out / into)) if adjust_lr_fn == "original" else 0.2 * math.sqrt(max(out, into))


def _matrices(
    p: Tensor, group: dict[str, Any]
) -> list[tuple[_Matrix, tuple[DeviceMesh | None, tuple[int, ...]]]]:  # fmt: skip
    """The matrices that a rank has part of, each with the mesh and the dimensions whose ranks have parts or copies."""
    stacked = p.ndim == 3
    rows, columns = p.shape[-2:]
    splits: dict[int, int] = {}
    mesh, dims = None, list[int]()
    if isinstance(p, DTensor):
        mesh = p.device_mesh
        for d, placement in enumerate(p.placements):
            dim = getattr(placement, "dim", None)
            if stacked and dim == 0:
                continue  # other ranks have other experts
            dims.append(d)
            if dim is not None:
                splits[d] = dim - stacked
    local = p.to_local() if isinstance(p, DTensor) else p
    indices = range(local.size(0)) if stacked else (None,)
    key = mesh, tuple(d for d in dims if mesh is not None and mesh.size(d) > 1)
    return [(_Matrix(p, group, index, (rows, columns), splits), key) for index in indices]


def _shards(piece: Tensor, dim: int | None, n: int) -> list[Tensor]:
    """The shards of n ranks, the last ones smaller or empty; dim None: a copy for each."""
    if dim is None:
        return [piece] * n
    size = piece.size(dim)
    step = -(-size // n)
    firsts = [min(i * step, size) for i in range(n)]
    return [piece.narrow(dim, first, min(step, size - first)) for first in firsts]


class _Exchange:
    """Shards of matrices to their owners and back, over the dimensions `dims` of a mesh.

    An owner is numbered by its coordinates in them, row by row.
    """

    def __init__(self, mesh: DeviceMesh | None, dims: tuple[int, ...]) -> None:
        self._mesh, self._dims = mesh, dims
        self._sizes = [mesh.size(d) for d in dims] if mesh is not None else []
        self._here = [mesh.get_local_rank(d) for d in dims] if mesh is not None else []
        self.ranks = math.prod(self._sizes)

    def collect(self, owned: dict[int, _Matrix], pieces: dict[int, Tensor]) -> dict[int, Tensor]:
        """pieces: this rank's shard of each matrix, by owner. Returns the whole ones that this rank owns."""
        for level, d in enumerate(self._dims):
            send: list[list[tuple[int, Tensor]]] = [[] for _ in range(self._sizes[level])]
            for owner, piece in pieces.items():
                if d in owned[owner].splits:
                    send[self._coordinate(owner, level)].append((owner, piece))
            pieces = {o: t for o, t in pieces.items() if self._coordinate(o, level) == self._here[level]}
            if not any(send):
                continue
            split = [owner for owner in pieces if d in owned[owner].splits]
            shapes = [[self._shape(owned[o], level, source) for o in split] for source in range(self._sizes[level])]
            received = self._all_to_all(d, [[t for _, t in part] for part in send], shapes)
            for i, owner in enumerate(split):
                pieces[owner] = torch.cat([part[i] for part in received], owned[owner].splits[d])
        return pieces

    def give_back(self, owned: dict[int, _Matrix], whole: dict[int, Tensor]) -> dict[int, Tensor]:
        """The way back: this rank's shard of each whole matrix, by owner."""
        pieces = whole
        for level in reversed(range(len(self._dims))):
            d, size = self._dims[level], self._sizes[level]
            # Those whose owners have this rank's coordinates in the dimensions before.
            here = [o for o in owned if all(self._coordinate(o, i) == self._here[i] for i in range(level))]
            send: list[list[Tensor]] = [[] for _ in range(size)]
            for owner in [o for o in here if o in pieces]:  # in the order in which they are taken out
                for part, shard in zip(send, _shards(pieces[owner], owned[owner].splits.get(d), size), strict=True):
                    part.append(shard)
            if not here:
                continue
            order = [[o for o in here if self._coordinate(o, level) == source] for source in range(size)]
            shapes = [[self._shape(owned[o], level, self._here[level]) for o in part] for part in order]
            received = self._all_to_all(d, send, shapes)
            pieces = {
                o: t for part, tensors in zip(order, received, strict=True) for o, t in zip(part, tensors, strict=True)
            }
        return pieces

    def _coordinate(self, owner: int, level: int) -> int:
        return owner // math.prod(self._sizes[level + 1 :]) % self._sizes[level]

    def _shape(self, matrix: _Matrix, level: int, index: int) -> tuple[int, int]:
        """Of the piece of rank `index` of dimension `level`, whole over the dimensions before, a shard over the others.

        The last dimension of a mesh shards first, as tensor and expert parallel come before FSDP.
        """
        shape = list(matrix.shape)
        for i in reversed(range(level, len(self._dims))):
            split = matrix.splits.get(self._dims[i])
            if split is not None:
                step = -(-shape[split] // self._sizes[i])
                at = index if i == level else self._here[i]
                shape[split] = max(0, min(step, shape[split] - at * step))
        return shape[0], shape[1]

    def _all_to_all(
        self, d: int, send: list[list[Tensor]], shapes: list[list[tuple[int, int]]]
    ) -> list[list[Tensor]]:  # fmt: skip
        """send: the pieces for each rank of the dimension. Returns those from each, of these shapes."""
        assert self._mesh is not None
        flat = [[t.reshape(-1) for t in part] for part in send]
        sizes = [[math.prod(shape) for shape in part] for part in shapes]
        like = self._mesh.device_type
        sent = torch.cat([t for part in flat for t in part]) if any(flat) else torch.empty(0, dtype=DTYPE, device=like)
        got = sent.new_empty(sum(map(sum, sizes)))
        out, into = [sum(t.numel() for t in part) for part in flat], [sum(part) for part in sizes]
        dist.all_to_all_single(got, sent, into, out, group=self._mesh.get_group(d))
        return [
            [t.view(shape) for t, shape in zip(part.split(size), shape_of, strict=True)]
            for part, size, shape_of in zip(got.split(into), sizes, shapes, strict=True)
        ]
