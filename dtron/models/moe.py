"""Mixture of experts in plain PyTorch: a router, experts whose weights are stacked, and the block of the two.

A token's feed-forward is a weighted sum of the K experts that the router scores highest (Shazeer et al. 2017, arXiv
1701.06538); no token is dropped and there is no capacity (Gale et al. 2022, arXiv 2211.15841): the chosen rows are
sorted by expert and go through one grouped product per matrix. Single-device code that knows nothing of parallelism.
`Experts.forward` takes sorted rows and their counts, which is where expert parallel sends rows to other ranks.

Families: Mixtral (arXiv 2401.04088), OLMoE (arXiv 2409.02060), Qwen3-MoE (arXiv 2505.09388). The sigmoid router,
groups, the shared expert and the bias that balances are DeepSeek-V3's (arXiv 2412.19437); biases and the clamped
activation gpt-oss's (arXiv 2508.10925).

Shape letters: B sequences, S tokens, D hidden size, F an expert's hidden size, N experts, K experts per token, R rows:
one for each pair of a token and an expert it chose.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Experts",
    "MixtureOfExperts",
    "MoEConfig",
    "Router",
    "choose_experts",
    "permute",
    "swiglu_of_experts",
]


@dataclass(frozen=True)
class MoEConfig:
    """Dimensions of a model's mixture of experts, and how its router chooses."""

    n_experts: int
    top_k: int
    expert_dim: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = True  # the chosen weights add up to 1
    route_scale: float = 1.0  # of the chosen weights
    shared_dim: int = 0  # hidden size of an expert that every token takes; 0: none
    n_dense_layers: int = 0  # first layers with a plain feed-forward
    n_groups: int = 1  # experts are chosen within the best `top_groups` of these
    top_groups: int = 1
    balancing_bias: bool = False  # added to the scores for the choice only, learnt from the counts
    biases: bool = False  # of the router and of the experts' matrices
    swiglu_limit: float | None = None  # of gpt-oss's activation, in place of SwiGLU: see `clamped_swiglu`


class Router(nn.Linear):
    """Scores of every expert, in fp32 whatever the weights' dtype: rounding would change who is chosen."""

    def __init__(self, dim: int, c: MoEConfig) -> None:
        super().__init__(dim, c.n_experts, bias=c.biases)
        self.score = c.score
        bias = nn.Parameter(torch.zeros(c.n_experts), requires_grad=False) if c.balancing_bias else None
        self.e_score_correction_bias = bias  # [N], fp32: steps of 0.001 would be lost in bfloat16

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> scores [B, S, N]."""
        return self.scores(x, self.weight, self.bias)

    def scores(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with a given weight [N, D] and bias [N]."""
        logits = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()


class Experts(nn.Module):
    """N feed-forwards, stacked: gate_proj and up_proj [N, F, D], down_proj [N, D, F], perhaps biases."""

    def __init__(self, dim: int, c: MoEConfig) -> None:
        super().__init__()
        self.top_k, self.limit = c.top_k, c.swiglu_limit
        self.gate_proj = nn.Parameter(torch.empty(c.n_experts, c.expert_dim, dim))
        self.up_proj = nn.Parameter(torch.empty(c.n_experts, c.expert_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(c.n_experts, dim, c.expert_dim))
        if c.biases:
            self.gate_proj_bias = nn.Parameter(torch.empty(c.n_experts, c.expert_dim))
            self.up_proj_bias = nn.Parameter(torch.empty(c.n_experts, c.expert_dim))
            self.down_proj_bias = nn.Parameter(torch.empty(c.n_experts, dim))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [R, D] sorted by expert, counts [N] of each -> every row through its own expert, [R, D]."""
        return swiglu_of_experts(rows, counts, *self.parameters(), limit=self.limit)


class MixtureOfExperts(nn.Module):
    """The feed-forward of a block.

    Three attributes are the trainer's and stay unset otherwise. `load`: an fp32 zero [N] whose gradient, after a
    backward, is the number of rows of each expert (see `_Tap`). `aux_weight`: weight of the sequence-wise balance loss,
    divided by the sequences of the global batch. `sum_over_sequence`: counts [B, N] summed over the ranks that hold
    parts of the same sequences.
    """

    def __init__(self, dim: int, c: MoEConfig, shared: nn.Module | None) -> None:
        super().__init__()
        self.config = c
        self.gate = Router(dim, c)
        self.experts = Experts(dim, c)
        self.shared_experts = shared
        self.load: nn.Parameter | None
        self.register_parameter("load", None)
        self.aux_weight = 0.0
        self.sum_over_sequence: Callable[[Tensor], Tensor] = lambda counts: counts

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        c, (b, s, d) = self.config, x.shape
        scores = self.gate(x)  # [B, S, N]
        with torch.no_grad():
            chosen = choose_experts(scores, self.gate.e_score_correction_bias, c)  # [B, S, K]
            ones = torch.ones_like(chosen.flatten(1))
            by_sequence = torch.zeros(b, c.n_experts, dtype=ones.dtype, device=x.device)
            by_sequence = by_sequence.scatter_add(1, chosen.flatten(1), ones)  # [B, N]
            counts = by_sequence.sum(0)  # [N]
        if self.load is not None:
            extra = self._balance_gradient(scores.detach(), by_sequence)
            scores = _Tap.apply(scores, self.load, counts, extra)  # type: ignore[no-untyped-call]
        weights = scores.gather(-1, chosen)  # [B, S, K]
        if c.normalize_top_k:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if c.score == "sigmoid" else 0.0))
        order = chosen.flatten().argsort(stable=True)  # [R]: rows by expert, in the order of the tokens
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        rows = x.reshape(-1, 1, d).expand(-1, c.top_k, -1).reshape(-1, d)  # [R, D]
        out = permute(self.experts(permute(rows, order, back), counts), back, order)
        mixed: Tensor = (out.view(b, s, c.top_k, d).float() * (weights * c.route_scale)[..., None]).sum(2).to(x.dtype)
        if self.shared_experts is not None:
            mixed = mixed + self.shared_experts(x)
        return mixed

    def _balance_gradient(self, scores: Tensor, by_sequence: Tensor) -> Tensor | None:
        """Gradient of the sequence-wise balance loss by the scores [B, S, N]; None without one.

        DeepSeek-V3's (arXiv 2412.19437, equations 17 to 20): the sum over experts of f_i P_i, where f_i is the
        expert's share of a sequence's rows times N, and P_i its mean normalised score; averaged over the sequences of
        the global batch. Of whole sequences, so that no layout and no microbatch changes it.
        """
        if not self.aux_weight:
            return None
        counts = self.sum_over_sequence(by_sequence)  # [B, N]
        tokens = counts.sum(1) / self.config.top_k  # [B], of the sequence
        share = counts * (self.config.n_experts / (self.config.top_k * tokens[:, None]))  # [B, N]
        total = scores.sum(-1, keepdim=True)  # [B, S, 1]; the rest is d/ds of sum_i f_i s_i / sum_j s_j
        pull = share[:, None] / total - (share[:, None] * scores).sum(-1, keepdim=True) / total.square()
        return pull * (self.aux_weight / tokens)[:, None, None]


def choose_experts(scores: Tensor, bias: Tensor | None, c: MoEConfig) -> Tensor:
    """scores [B, S, N] in fp32 -> the K chosen experts of every token [B, S, K], best first.

    With groups, a group is as good as its two best experts together, and only the best groups' experts can be chosen.
    """
    scores = scores if bias is None else scores + bias
    if c.n_groups > 1:
        groups = scores.view(*scores.shape[:-1], c.n_groups, -1)  # [B, S, G, N/G]
        best = groups.topk(2, -1)[0].sum(-1).topk(c.top_groups, -1)[1]  # [B, S, top_groups]
        open_groups = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, best, True)
        scores = groups.masked_fill(~open_groups[..., None], -math.inf).flatten(-2)
    return scores.topk(c.top_k, -1)[1]


class _Tap(torch.autograd.Function):
    """Scores unchanged; the backward adds `extra` to their gradient and gives `load` the counts as its gradient.

    In the backward, since that runs once per forward whatever is recomputed: a counter in the forward counts recomputed
    blocks twice, and an evaluation's tokens too. As a gradient and no side effect, since a pipeline's first step may
    run a backward of undefined numbers whose gradients are dropped. Exact up to 2^24 rows.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, load: Tensor, counts: Tensor, extra: Tensor | None) -> Tensor:
        ctx.save_for_backward(counts, extra)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        counts, extra = ctx.saved_tensors
        return (gradient if extra is None else gradient + extra), counts.float(), None, None


class _Permute(torch.autograd.Function):
    """rows[order] where `order` permutes them and `back` is its inverse: the backward gathers too, without atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradient[back], None, None


def permute(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """rows [R, D] in `order` [R], a permutation whose inverse is `back`."""
    permuted: Tensor = _Permute.apply(rows, order, back)  # type: ignore[no-untyped-call]
    return permuted


# --- the grouped product


def swiglu_of_experts(
    rows: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor, *biases: Tensor, limit: float | None = None
) -> Tensor:
    """rows [R, D] sorted by expert, counts [N], weights [N, out, in] -> down(silu(gate x) * up x), each by its own.

    biases: [N, out] of the three, or none. limit: of `clamped_swiglu`, which then takes the place of SwiGLU.
    """
    ends = counts.cumsum(0).to(torch.int32)
    if biases:  # [R]: the expert of each row
        expert = torch.searchsorted(ends, torch.arange(rows.size(0), device=rows.device, dtype=ends.dtype), right=True)

    def product(x: Tensor, i: int) -> Tensor:
        out = _grouped(x, (gate, up, down)[i], ends)
        return out + biases[i][expert] if biases else out

    g, u = product(rows, 0), product(rows, 1)
    return product(F.silu(g) * u if limit is None else clamped_swiglu(g, u, limit), 2)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """gpt-oss's gate * sigmoid(1.702 gate) * (up + 1), gate cut off above the limit, up on both sides."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [R, in] whose runs end at `ends` [N], each run by its own weight [N, out, in] -> [R, out]."""
    if rows.dtype == torch.bfloat16 and rows.is_cuda:
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    out: Tensor = grouped_product(rows, weight, ends)
    return out


# torch's grouped_mm computes in fp32 too, but is refused by compile and by fake tensors there (2.11 to 2.13): its meta
# function knows bfloat16 only. As operators of our own it works everywhere.


@torch.library.custom_op("dtron::grouped_product", mutates_args=())
def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See `_grouped`."""
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)


@torch.library.custom_op("dtron::grouped_product_rows", mutates_args=())
def _rows_gradient(gradient: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(gradient, weight, offs=ends)


@torch.library.custom_op("dtron::grouped_product_weight", mutates_args=())
def _weight_gradient(gradient: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(gradient.t(), rows, offs=ends)


@grouped_product.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.size(0), weight.size(1))


@_rows_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return gradient.new_empty(gradient.size(0), weight.size(2))


@_weight_gradient.register_fake
def _(gradient: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return gradient.new_empty(ends.size(0), gradient.size(1), rows.size(1))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    return _rows_gradient(gradient, weight, ends), _weight_gradient(gradient, rows, ends), None


grouped_product.register_autograd(_gradients, setup_context=_save)
