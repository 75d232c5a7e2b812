"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): steps along the orthogonalized momentum of each matrix.

The update is that of `torch.optim.Muon`, on any layout. Orthogonalizing takes the whole matrix, which no rank has, and
only one rank needs to do it. So the matrices of a mesh are dealt out to its ranks, the most expensive first, in rounds
of at most one for each rank, and several rounds of small ones make a bucket:

    momentum of the own shards -> shards to each matrix's owner -> Newton-Schulz there -> shards of the result back

While a rank computes on one bucket, the shards of the next and the results of the one before are on their way. Matrices
of one shape are multiplied together (the same bits as one by one), for many small ones are bound by the host.

A rank sends and receives its shards once each way, in the bf16 that the iteration computes in. Gathering every matrix
on every rank would move N times as much, and all N would compute the same. Where two dimensions of a mesh shard a
matrix, shards travel dimension by dimension: first FSDP's, which split the part that tensor parallel left. HSDP's
replicas take matrices in turn, and send each other the results.

Experts are stacked [experts, out, in]: each is a matrix. Where a rank has the whole of its experts nothing is sent.
"""

import itertools
import math
from collections.abc import Callable, Generator
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
BUCKET_BYTES = 2**25  # of whole matrices that a rank is sent at once; two buckets' are in memory
BATCH_BYTES = 2**22  # of matrices that are multiplied together: on a CPU more is slower, a larger one fills a GPU alone

Pieces = dict[int, Tensor]  # of the matrices of a bucket, by their place in it
Bucket = list[tuple[int, "_Matrix"]]  # each with the number of the rank that orthogonalizes it


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """U S' V^T of each matrix U S V^T of [N, rows, columns], S' about 1: Newton-Schulz, as torch's Muon of each.

    A step takes 4 m^2 n + 2 m^3 FLOPs per matrix, m the shorter side and n the longer.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(DTYPE)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@dataclass(frozen=True)
class _Matrix:
    """A matrix of which this rank holds a shard: a parameter, or expert `index` of it. Or a stack of whole experts.

    shape: of the whole matrix. splits: mesh dimension -> the dimension of the matrix that it shards.
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

    @property
    def nbytes(self) -> int:
        """Of what is orthogonalized."""
        experts = self.shard(self.p).size(0) if self.p.ndim == 3 and self.index is None else 1
        return experts * math.prod(self.shape) * DTYPE.itemsize

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
        running: list[Generator[None, None, None]] = []
        for key, matrices in families.items():
            exchange = _Exchange(*key)
            running += [self._bucket(exchange, bucket) for bucket in _buckets(matrices, exchange.ranks)]
        for i in range(len(running) + 2):
            for bucket in running[max(0, i - 2) : i + 1][::-1]:  # the next sends, the present computes, the last ends
                next(bucket, None)

    def _bucket(self, exchange: "_Exchange", bucket: Bucket) -> Generator[None, None, None]:
        """Step of the matrices in a bucket. Yields when shards are on their way, and when results are."""
        pieces = {i: self._momentum(matrix) for i, (_, matrix) in enumerate(bucket)}
        mine = yield from exchange.collect(bucket, pieces)
        updates = yield from exchange.give_back(bucket, _orthogonalize_alike(bucket, mine))
        for i, update in updates.items():
            matrix = bucket[i][1]
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


def _buckets(matrices: list[_Matrix], ranks: int) -> list[Bucket]:
    """All matrices, dealt out in rounds of at most one for each rank, to and fro."""
    matrices = sorted(matrices, key=lambda matrix: -matrix.cost)
    buckets, room = list[Bucket](), -1
    for i, first in enumerate(range(0, len(matrices), ranks)):
        turn = matrices[first : first + ranks]
        owners = range(len(turn)) if i % 2 == 0 else range(ranks - 1, -1, -1)
        room -= (largest := max(matrix.nbytes for matrix in turn))
        if room < 0:
            buckets.append([])
            room = BUCKET_BYTES - largest
        buckets[-1] += zip(owners, turn, strict=False)
    return buckets


def _orthogonalize_alike(bucket: Bucket, pieces: Pieces) -> Pieces:
    """Whole matrices, orthogonalized; those of one shape together, as many as BATCH_BYTES hold."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i in pieces:
        _, matrix = bucket[i]
        alike.setdefault((matrix.group["ns_steps"], *matrix.shape), []).append(i)
    done: Pieces = {}
    for (steps, *shape), members in alike.items():
        stacks = [pieces[i].reshape(-1, *shape) for i in members]
        together = torch.cat(stacks).split(max(1, BATCH_BYTES // (math.prod(shape) * DTYPE.itemsize)))
        results = torch.cat([orthogonalize(part, steps) for part in together]).split([len(stack) for stack in stacks])
        done |= {i: result.view_as(pieces[i]) for i, result in zip(members, results, strict=True)}
    return {i: done[i] for i in pieces}


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
    key = mesh, tuple(d for d in dims if mesh is not None and mesh.size(d) > 1)
    indices = range(local.size(0)) if stacked and key[1] else (None,)
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

    An owner is numbered by its coordinates in them, row by row. Both ways yield once, alike on all ranks, when a
    message is sent and not yet waited for: that of the first dimension that shards, and on the way back the last one.
    """

    def __init__(self, mesh: DeviceMesh | None, dims: tuple[int, ...]) -> None:
        self._mesh, self._dims = mesh, dims
        self._sizes = [mesh.size(d) for d in dims] if mesh is not None else []
        self._here = [mesh.get_local_rank(d) for d in dims] if mesh is not None else []
        self.ranks = math.prod(self._sizes)

    def collect(self, bucket: Bucket, pieces: Pieces) -> Generator[None, None, Pieces]:
        """pieces: this rank's shard of each matrix. Returns the whole ones that this rank owns."""
        sharded = [level for level, d in enumerate(self._dims) if any(d in matrix.splits for _, matrix in bucket)]
        for level, d in enumerate(self._dims):
            send: list[list[Tensor]] = [[] for _ in range(self._sizes[level])]
            for i, piece in pieces.items():
                owner, matrix = bucket[i]
                if d in matrix.splits:
                    send[self._coordinate(owner, level)].append(piece)
            pieces = {i: t for i, t in pieces.items() if self._coordinate(bucket[i][0], level) == self._here[level]}
            split = [i for i in pieces if d in bucket[i][1].splits]
            shapes = [[self._shape(bucket[i][1], level, source) for i in split] for source in range(self._sizes[level])]
            receive = self._all_to_all(d, send, shapes) if any(send) else None
            if level == sharded[0] if sharded else level == 0:
                yield
            for i, parts in zip(split, zip(*receive(), strict=True) if receive else (), strict=True):
                pieces[i] = torch.cat(parts, bucket[i][1].splits[d])
        if not self._dims:
            yield
        return pieces

    def give_back(self, bucket: Bucket, pieces: Pieces) -> Generator[None, None, Pieces]:
        """The way back. pieces: the whole matrices that this rank owns. Returns this rank's shard of each."""
        for level in reversed(range(len(self._dims))):
            d, size = self._dims[level], self._sizes[level]
            # Those whose owners have this rank's coordinates in the dimensions before.
            here = [
                i for i, (owner, _) in enumerate(bucket)
                if all(self._coordinate(owner, before) == self._here[before] for before in range(level))
            ]  # fmt: skip
            if not here:
                continue
            send: list[list[Tensor]] = [[] for _ in range(size)]
            for i in [i for i in here if i in pieces]:  # in the order in which they are taken out
                for part, shard in zip(send, _shards(pieces[i], bucket[i][1].splits.get(d), size), strict=True):
                    part.append(shard)
            order = [[i for i in here if self._coordinate(bucket[i][0], level) == source] for source in range(size)]
            shapes = [[self._shape(bucket[i][1], level, self._here[level]) for i in part] for part in order]
            receive = self._all_to_all(d, send, shapes)
            if level == 0:
                yield
            pieces = dict(zip(itertools.chain(*order), itertools.chain(*receive()), strict=True))
        if not self._dims:
            yield
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
    ) -> Callable[[], list[list[Tensor]]]:  # fmt: skip
        """send: the pieces for each rank of the dimension. What is returned waits for those from each, of `shapes`."""
        assert self._mesh is not None
        flat = [[t.reshape(-1) for t in part] for part in send]
        sizes = [[math.prod(shape) for shape in part] for part in shapes]
        like = self._mesh.device_type
        sent = torch.cat([t for part in flat for t in part]) if any(flat) else torch.empty(0, dtype=DTYPE, device=like)
        got = sent.new_empty(sum(map(sum, sizes)))
        out, into = [sum(t.numel() for t in part) for part in flat], [sum(part) for part in sizes]
        work = dist.all_to_all_single(got, sent, into, out, group=self._mesh.get_group(d), async_op=True)

        def receive() -> list[list[Tensor]]:
            work.wait()
            return [
                [t.view(shape) for t, shape in zip(part.split(size), shape_of, strict=True)]
                for part, size, shape_of in zip(got.split(into), sizes, shapes, strict=True)
            ]

        return receive
