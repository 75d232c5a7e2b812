"""The truth: the plain model in one process, trained by a loop without any of dtron's parallel code."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtron import registry
from dtron.data.loader import IGNORE_INDEX, Batch
from dtron.models.init import initial_rows
from dtron.models.moe import MoEConfig, Router, choose_experts
from dtron.models.spec import experts_of
from dtron.verify.draws import without_dropout
from dtron.verify.outputs import Outputs, recorded_outputs
from dtron.verify.small import NOISE, NOISY, Proof

__all__ = ["Routers", "Truth", "global_batch", "train_plain"]

STEP_SIZE = 0.02  # of the first step: length of the change over that of all weights
# Distance between the scores of an expert that was chosen and the next best: rounding must not cross it.
LEAST_GAP, SEEDS = 5e-5, 50


@dataclass
class Truth:
    """Of each step, loss, gradient norm and the weights after it, under their names; start: the weights before all.

    seed: of the batches. lr: learning rate. outputs: of the modules in the first step.
    """

    lr: float
    seed: int
    losses: list[float]
    norms: list[float]
    start: dict[str, Tensor]
    weights: list[dict[str, Tensor]]
    outputs: Outputs = field(default_factory=dict)


def global_batch(proof: Proof, seed: int, step: int) -> Batch:
    """Random tokens [rows, S]; more labels are masked from row to row, so that ranks have different numbers of them."""
    c = proof.setup.config.training
    g = torch.Generator().manual_seed(1000 * seed + step)
    shape = c.global_batch_size, c.seq_len
    text = torch.randint(0, proof.setup.model_config.vocab_size, (shape[0], shape[1] + 1), generator=g)
    labels = text[:, 1:].clone()
    labels[torch.rand(shape, generator=g) < torch.linspace(0, 0.6, shape[0])[:, None]] = IGNORE_INDEX
    starts = None
    if c.attention_mask == "document":
        begins = torch.rand(shape, generator=g) < torch.linspace(0, 0.5, shape[0])[:, None]
        starts = torch.where(begins, torch.arange(shape[1]), 0).cummax(1).values
    return Batch(text[:, :-1], labels, starts)


def train_plain(proof: Proof, steps: int) -> Truth:
    """Train on whole global batches. Batches by which a router could go either way are not taken."""
    for seed in range(SEEDS):
        truth, gap = _train(proof, steps, seed)
        if gap > LEAST_GAP:
            break
    return truth


def _train(proof: Proof, steps: int, seed: int) -> tuple[Truth, float]:
    setup, c = proof.setup, proof.setup.config
    model = _plain_model(proof)
    loss_of = registry.look_up("loss", c.training.loss, "training.loss")
    rows = c.training.global_batch_size
    routers = Routers(model, experts_of(setup.model_config), c.training.expert_balance_loss / rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    truth = Truth(0.0, seed, [], [], _copy(model), [])
    for step in range(steps):
        tokens, labels, starts, _ = global_batch(proof, seed, step)
        positions = torch.arange(tokens.size(1)).expand(len(tokens), -1)
        extra = () if starts is None else (starts,)
        with without_dropout(), recorded_outputs([model]) as outputs:
            loss = loss_of(model(tokens, positions, *extra), labels).sum() / (labels != IGNORE_INDEX).sum()
            (loss + routers.balance_loss()).backward()
        truth.outputs = truth.outputs or outputs
        norm = _length(p.grad for p in trained if p.grad is not None)
        truth.lr = truth.lr or STEP_SIZE * _length(trained) / norm
        with torch.no_grad():
            for p in trained:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=truth.lr)
                    p.grad = None
        routers.move_biases(c.training.expert_bias_rate)
        truth.losses.append(loss.item())
        truth.norms.append(norm)
        truth.weights.append(_copy(model))
    return truth, routers.gap


def _plain_model(proof: Proof) -> nn.Module:
    setup = proof.setup
    model: nn.Module = setup.spec.build(setup.model_config)
    for name in setup.config.model.converters:
        convert: Callable[..., nn.Module] = registry.look_up("converter", name, "model.converters")
        model = convert(model, setup.config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            rows, seed = (p.shape, 0, p.shape[0]), setup.config.debug.seed
            p.copy_(initial_rows(name, *rows, proof.std(name), seed, p.device))
            p.add_(initial_rows(name + NOISY, *rows, NOISE, seed, p.device))
    return model


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _length(tensors: Any) -> float:
    return float(torch.stack([t.detach().double().square().sum() for t in tensors]).sum().sqrt())


class Routers:
    """What a plain loop needs of the routers: the balance loss as it is written, and the biases that follow the counts.

    weight: of the balance loss of a sequence. counts: rows of each expert [layers with experts, experts] since they
    were last taken. gap: see `LEAST_GAP`, of what was seen so far; infinite without experts.
    """

    def __init__(self, model: nn.Module, experts: MoEConfig | None, weight: float) -> None:
        self._c, self._weight, self.gap = experts, weight, float("inf")
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self._scores: list[Tensor] = []
        self.counts = torch.zeros(len(self._routers), experts.n_experts if experts else 0)
        for router in self._routers:
            router.register_forward_hook(lambda _, inputs, scores: self._scores.append(scores))

    def balance_loss(self) -> Tensor:
        """Of a microbatch (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20); and its rows are counted."""
        total = torch.zeros(())
        for i, (router, scores) in enumerate(zip(self._routers, self._scores, strict=True)):
            assert self._c is not None
            bias = router.e_score_correction_bias
            chosen = choose_experts(scores.detach(), bias, self._c)
            rows = F.one_hot(chosen, self._c.n_experts).sum(2)  # [B, S, N]
            share = rows.sum(1) * self._c.n_experts / (self._c.top_k * scores.size(1))  # f [B, N]
            mean = (scores / scores.sum(-1, keepdim=True)).mean(1)  # P [B, N]
            total = total + self._weight * (share * mean).sum()
            self.counts[i] += rows.sum((0, 1))
            self._look_at_gaps(scores.detach() + (0 if bias is None else bias), self._c)
        self._scores.clear()
        return total

    def _look_at_gaps(self, ranked: Tensor, c: MoEConfig) -> None:
        """ranked [B, S, N]: by which experts are chosen."""
        if c.n_groups > 1:
            groups = ranked.unflatten(-1, (c.n_groups, -1))
            best = groups.topk(2, -1).values.sum(-1)  # [B, S, G]
            self.gap = min(self.gap, _gap(best, c.top_groups))
            kept = best >= best.sort(-1, descending=True).values[..., c.top_groups - 1, None]
            ranked = groups.masked_fill(~kept[..., None], -1.0).flatten(-2)
        self.gap = min(self.gap, _gap(ranked, c.top_k))

    def move_biases(self, rate: float) -> list[list[int]]:
        """After a step: biases rise for experts with less than the mean of the rows. Returns the counts, taken."""
        for router, n in zip(self._routers, self.counts, strict=True):
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.data += rate * (n.mean() - n).sign()
        counts: list[list[int]] = self.counts.int().tolist()
        self.counts.zero_()
        return counts


def _gap(scores: Tensor, k: int) -> float:
    """The least distance, of any token, from its k-th best score to the next."""
    ranked = scores.sort(-1, descending=True).values
    if k == ranked.size(-1):
        return float("inf")
    return (ranked[..., k - 1] - ranked[..., k]).min().item()
