"""Router and experts against loops over tokens, the balance loss against autograd, exact counts, published sizes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

from dtron.models import moe as moe_module
from dtron.models.families import FAMILIES
from dtron.models.flops import active_parameters, attention_flops_per_token, flops_per_token, matmul_parameters
from dtron.models.hf import hf_dimensions
from dtron.models.llama import FeedForward, Llama
from dtron.models.moe import Experts, MixtureOfExperts, MoEConfig, Router, choose_experts

D = 16
PLAIN = MoEConfig(n_experts=8, top_k=2, expert_dim=12)
EVERYTHING = MoEConfig(
    8, 3, 12, score="sigmoid", route_scale=1.5, shared_dim=20, n_groups=4, top_groups=2, balancing_bias=True
)
VARIANTS = {
    "mixtral": PLAIN,
    "top-k not normalised": replace(PLAIN, normalize_top_k=False),
    "one expert per token": replace(PLAIN, top_k=1, normalize_top_k=False),
    "every expert": replace(PLAIN, top_k=8),
    "scaled": replace(PLAIN, route_scale=2.5),
    "sigmoid": replace(PLAIN, score="sigmoid"),
    "sigmoid, not normalised": replace(PLAIN, score="sigmoid", normalize_top_k=False),
    "softmax with a bias": replace(PLAIN, balancing_bias=True),
    "groups": replace(PLAIN, n_groups=4, top_groups=2),
    "shared expert": replace(PLAIN, shared_dim=20),
    "everything": EVERYTHING,
}


def make(c: MoEConfig, seed: int = 0) -> MixtureOfExperts:
    torch.manual_seed(seed)
    block = MixtureOfExperts(D, c, FeedForward(D, c.shared_dim) if c.shared_dim else None)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0.0, 0.5)
    return block


def chosen_by_a_loop(scores: list[float], bias: list[float], c: MoEConfig) -> list[int]:
    """Experts of one token, best first, in plain Python."""
    ranked = [s + b for s, b in zip(scores, bias, strict=True)]
    allowed = set(range(c.n_experts))
    if c.n_groups > 1:
        size = c.n_experts // c.n_groups
        groups = [range(g * size, (g + 1) * size) for g in range(c.n_groups)]
        worth = [sum(sorted((ranked[i] for i in group), reverse=True)[:2]) for group in groups]
        best = sorted(range(c.n_groups), key=lambda g: -worth[g])[: c.top_groups]
        allowed = {i for g in best for i in groups[g]}
    return sorted(allowed, key=lambda i: -ranked[i])[: c.top_k]


def by_a_loop(block: MixtureOfExperts, x: Tensor) -> Tensor:
    """x [B, S, D] -> [B, S, D], token by token and expert by expert; in float64 but for the scores that choose."""
    c, out = block.config, torch.zeros(x.shape, dtype=torch.float64)
    bias = block.gate.e_score_correction_bias
    biases = [0.0] * c.n_experts if bias is None else bias.tolist()
    names = ("gate_proj", "up_proj", "down_proj")
    gates, ups, downs = (getattr(block.experts, name).double() for name in names)
    for b in range(x.size(0)):
        for s in range(x.size(1)):
            token = x[b, s].double()
            logits = block.gate.weight.double() @ token
            scores = logits.softmax(0) if c.score == "softmax" else logits.sigmoid()
            chosen = chosen_by_a_loop(scores.tolist(), biases, c)
            weights = torch.stack([scores[i] for i in chosen])  # without the bias
            if c.normalize_top_k:
                weights = weights / weights.sum()
            for weight, i in zip(weights, chosen, strict=True):
                hidden = F.silu(F.linear(token, gates[i])) * F.linear(token, ups[i])
                out[b, s] += c.route_scale * weight * F.linear(hidden, downs[i])
            if (shared := block.shared_experts) is not None:
                gate, up, down = (getattr(shared, name).weight.double() for name in names)
                out[b, s] += F.linear(F.silu(F.linear(token, gate)) * F.linear(token, up), down)
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_router_chooses_what_a_loop_over_tokens_chooses(name: str) -> None:
    c = VARIANTS[name]
    g = torch.Generator().manual_seed(1)
    scores, bias = torch.rand(3, 20, c.n_experts, generator=g), torch.randn(c.n_experts, generator=g) / 4
    for given in (None, bias):
        chosen = choose_experts(scores, given, c)
        biases = [0.0] * c.n_experts if given is None else given.tolist()
        expected = [[chosen_by_a_loop(token, biases, c) for token in row] for row in scores.tolist()]
        assert chosen.tolist() == expected


def test_a_bias_and_groups_change_who_is_chosen() -> None:
    """Else the comparison above would not see one that is ignored."""
    scores, bias = torch.rand(3, 20, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5] + [0.0] * 7)
    plain = choose_experts(scores, None, PLAIN)
    assert not torch.equal(plain, choose_experts(scores, bias, PLAIN))
    assert not torch.equal(plain, choose_experts(scores, None, replace(PLAIN, n_groups=4, top_groups=2)))


@pytest.mark.parametrize("name", VARIANTS)
def test_block_equals_a_loop_over_tokens_and_experts(name: str) -> None:
    """What it gives, and the gradients of the input and of every weight."""
    block = make(VARIANTS[name])
    x = torch.randn(2, 9, D, requires_grad=True)
    pull = torch.randn(2, 9, D)
    results = []
    for run in (block, lambda x: by_a_loop(block, x)):
        out = run(x)
        trained = [p for p in block.parameters() if p.requires_grad]
        results.append((out, *torch.autograd.grad((out * pull).sum(), [x, *trained])))
    for got, expected in zip(*results, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_normalised_weights_of_the_chosen_add_up_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With experts that give their input back, a token is its own weighted sum."""
    monkeypatch.setattr(Experts, "forward", lambda self, rows, counts: rows)
    x = torch.randn(2, 9, D)
    for name, factor in (("mixtral", 1.0), ("sigmoid", 1.0), ("scaled", 2.5)):
        torch.testing.assert_close(make(VARIANTS[name])(x), factor * x)
    assert (make(VARIANTS["top-k not normalised"])(x) - x).abs().max() > 0.1


def test_the_router_computes_in_fp32_of_a_bf16_model() -> None:
    block = make(replace(PLAIN, expert_dim=16)).bfloat16()
    x = torch.randn(2, 9, D).bfloat16()
    scores = block.gate(x)
    assert scores.dtype == torch.float32 and block(x).dtype == torch.bfloat16
    expected = F.linear(x.double(), block.gate.weight.double()).softmax(-1)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [[0, 0, 5, 0], [3, 0, 0, 4], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_experts_without_rows(counts: list[int]) -> None:
    """Sorted rows through their own expert, whoever has none; the gradient of an expert without rows is zero."""
    c = MoEConfig(4, 1, 12)
    torch.manual_seed(0)
    experts = Experts(D, c)
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_()
    rows = torch.randn(sum(counts), D, requires_grad=True)
    out = experts(rows, torch.tensor(counts))
    begin = 0
    for i, n in enumerate(counts):
        part = rows[begin : begin + n]
        hidden = F.silu(part @ experts.gate_proj[i].t()) * (part @ experts.up_proj[i].t())
        torch.testing.assert_close(out[begin : begin + n], hidden @ experts.down_proj[i].t(), rtol=1e-4, atol=1e-4)
        begin += n
    (out * torch.randn(out.shape)).sum().backward()
    for p in experts.parameters():
        assert p.grad is not None
        assert [bool(part.any()) for part in p.grad] == [n > 0 for n in counts]


def test_biased_experts_and_the_clamped_activation() -> None:
    """gpt-oss's, by its formula for every expert; both sides of the limit are met."""
    c = MoEConfig(4, 1, 12, biases=True, swiglu_limit=1.0)
    torch.manual_seed(0)
    experts, router = Experts(D, c), Router(D, c)
    with torch.no_grad():
        for p in (*experts.parameters(), *router.parameters()):
            p.normal_()
    counts = [3, 0, 5, 2]
    rows = torch.randn(sum(counts), D)
    out, begin = experts(rows, torch.tensor(counts)), 0
    for i, n in enumerate(counts):
        part = rows[begin : begin + n]
        gate = part @ experts.gate_proj[i].t() + experts.gate_proj_bias[i]
        up = part @ experts.up_proj[i].t() + experts.up_proj_bias[i]
        assert not n or ((gate > 1).any() and (up > 1).any() and (up < -1).any())
        gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0)
        hidden = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
        expected = hidden @ experts.down_proj[i].t() + experts.down_proj_bias[i]
        torch.testing.assert_close(out[begin : begin + n], expected, rtol=1e-4, atol=1e-4)
        begin += n
    logits = rows[None] @ router.weight.t() + router.bias
    torch.testing.assert_close(router(rows[None]), logits.softmax(-1), rtol=1e-5, atol=1e-6)


# --- balance loss and counts


def written_loss(scores: Tensor, chosen: Tensor, c: MoEConfig) -> Tensor:
    """DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20, of scores and choices [S, ...] of one sequence."""
    tokens, total = len(scores), torch.zeros((), dtype=scores.dtype)
    for i in range(c.n_experts):
        f = c.n_experts / (c.top_k * tokens) * sum(int(i in row) for row in chosen.tolist())
        total = total + f * (scores[:, i] / scores.sum(1)).mean()
    return total


@pytest.mark.parametrize("name", ["mixtral", "sigmoid", "groups", "everything"])
def test_balance_gradient_is_the_one_of_the_written_loss(name: str) -> None:
    c, block = VARIANTS[name], make(VARIANTS[name])
    block.aux_weight = 0.3
    x = torch.randn(3, 10, D)
    scores = block.gate(x).detach().requires_grad_()
    chosen = choose_experts(scores.detach(), block.gate.e_score_correction_bias, c)
    loss = sum((written_loss(scores[b], chosen[b], c) for b in range(3)), torch.zeros(()))
    (expected,) = torch.autograd.grad(0.3 * loss, [scores])
    by_sequence = F.one_hot(chosen, c.n_experts).sum((1, 2))
    got = block._balance_gradient(scores.detach(), by_sequence)
    assert got is not None and expected.abs().max() > 1e-4
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    block.aux_weight = 0.0
    assert block._balance_gradient(scores.detach(), by_sequence) is None


def counting_block(c: MoEConfig = PLAIN) -> MixtureOfExperts:
    block = make(c)
    block.load = nn.Parameter(torch.zeros(c.n_experts))
    return block


def expected_counts(block: MixtureOfExperts, x: Tensor) -> list[int]:
    chosen = choose_experts(block.gate(x), block.gate.e_score_correction_bias, block.config)
    return torch.bincount(chosen.flatten(), minlength=block.config.n_experts).tolist()


def test_balance_gradient_is_added_and_the_output_is_not_changed() -> None:
    block, x = counting_block(), torch.randn(2, 9, D)
    outs, gradients = [], []
    for weight in (0.0, 0.1):
        block.aux_weight = weight
        outs.append(block(x))
        gradients.append(torch.autograd.grad(outs[-1].sum(), [block.gate.weight])[0])
    assert torch.equal(*outs)
    scores = block.gate(x)
    chosen = choose_experts(scores.detach(), None, PLAIN)
    loss = sum((written_loss(scores[b], chosen[b], PLAIN) for b in range(2)), torch.zeros(()))
    (expected,) = torch.autograd.grad(0.1 * loss, [block.gate.weight])
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-3, atol=1e-5)


WAYS: dict[str, Callable[[MixtureOfExperts, Tensor], Tensor]] = {
    "plain": lambda block, x: block(x),
    "recomputed": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "recomputed, reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "compiled": lambda block, x: torch.compile(block, backend="aot_eager", fullgraph=True)(x),
}


@pytest.mark.parametrize("name", ["mixtral", "everything"])
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.long] if way == "compiled" else []) for way in WAYS]
)
def test_counts_are_exact_however_the_backward_gets_its_numbers(way: str, name: str) -> None:
    block = counting_block(VARIANTS[name])
    parts = [torch.randn(2, 9, D, requires_grad=True) for _ in range(2)]
    for x in parts:  # accumulated
        with torch.no_grad():
            block(x)  # an evaluation counts nothing
        block(x)  # nor does a forward without a backward
        WAYS[way](block, x).sum().backward()
    assert block.load is not None and block.load.grad is not None
    expected = [sum(pair) for pair in zip(*(expected_counts(block, x) for x in parts), strict=True)]
    assert block.load.grad.tolist() == expected and sum(expected) == 36 * block.config.top_k


# --- sizes

# Billions of parameters in all and per token, as published: Mixtral (arXiv 2401.04088 and Mistral's pages), Qwen3
# (arXiv 2505.09388), OLMoE (arXiv 2409.02060).
SIZES = {
    ("mixtral", "8x7B"): (46.7, 12.9),
    ("mixtral", "8x22B"): (140.6, 39.2),
    ("qwen3_moe", "30B-A3B"): (30.5, 3.35),
    ("qwen3_moe", "235B-A22B"): (235.1, 22.2),
    ("olmoe", "1B-7B"): (6.92, 1.28),
}
# Its model card (arXiv 2508.10925).
GPT_OSS = {("gpt_oss", "20B"): (20.91, 3.61), ("gpt_oss", "120B"): (116.83, 5.13)}


def test_every_flavor_is_compared() -> None:
    flavors = {(family, name) for family, of in FAMILIES.items() for name, c in of.items() if c.moe is not None}
    assert flavors - {(family, "debugmodel") for family, _ in flavors} == {*SIZES, *GPT_OSS}


@pytest.mark.parametrize("flavor", ["20B", "120B"])
def test_parameters_of_gpt_oss_are_the_published_ones(flavor: str) -> None:
    config = FAMILIES["gpt_oss"][flavor]
    with torch.device("meta"):
        model = Llama(config)
    active = active_parameters(model) - config.vocab_size * config.dim  # the model card leaves the look-up out
    total = sum(p.numel() for p in model.parameters())
    assert (round(total / 1e9, 2), round(active / 1e9, 2)) == GPT_OSS["gpt_oss", flavor]


@pytest.mark.parametrize(("family", "flavor"), SIZES)
def test_parameters_in_all_and_per_token_are_the_published_ones(family: str, flavor: str) -> None:
    config = FAMILIES[family][flavor]
    with torch.device("meta"):
        model = Llama(config)
    total = sum(p.numel() for p in model.parameters())
    for got, published in zip((total, active_parameters(model)), SIZES[family, flavor], strict=True):
        digits = 1 if published >= 3.5 and published != 6.92 else 2
        assert round(got / 1e9, digits) == published
    # FLOPs count the experts that a token takes: all active parameters but the look-up of embeddings and the norms.
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert matmul_parameters(model) == active_parameters(model) - norms - config.vocab_size * config.dim
    attention = attention_flops_per_token(config, 4096)
    expected = 6 * matmul_parameters(model) + config.n_layers * attention
    assert flops_per_token(model, [attention] * config.n_layers) == expected


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_fields_that_a_config_json_leaves_out_have_the_values_of_transformers(kind: str) -> None:
    given = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 32, "num_experts_per_tok": 2,
        "num_local_experts" if kind == "mixtral" else "num_experts": 8,
    }  # fmt: skip
    given |= {"moe_intermediate_size": 16} if kind == "qwen3_moe" else {}
    whole = AutoConfig.for_model(kind, **given).to_dict()
    expected = hf_dimensions(whole, "saved by transformers")
    assert hf_dimensions(given | {"model_type": kind}, "config.json") == expected
    assert expected.moe is not None and expected.moe.n_experts == 8
    assert expected.head_size == 64 // 4  # which transformers leaves out, of Qwen3-MoE too


def test_a_dense_model_has_nothing_of_experts() -> None:
    model = Llama(FAMILIES["qwen3"]["debugmodel"])
    own = [type(module).__name__ for module in model.modules() if type(module).__module__ == moe_module.__name__]
    assert own == [] and active_parameters(model) == sum(p.numel() for p in model.parameters())


def test_first_layers_may_be_dense() -> None:
    base = FAMILIES["qwen3_moe"]["debugmodel"]
    assert base.moe is not None
    model: Any = Llama(replace(base, moe=replace(base.moe, n_dense_layers=2)))
    kinds = [isinstance(model.layers[str(i)].mlp, MixtureOfExperts) for i in range(base.n_layers)]
    assert kinds == [False, False, True, True, True, True]
