"""The truth: the plain model on one process, written without any of dtron's parallel code."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.config.optimizer import Optimizer
from dtron.models.init import initial_rows, llama_init_std
from dtron.models.llama import Llama, LlamaConfig
from dtron.models.moe import MoEConfig
from dtron.models.rope import Llama3Scaling, LongRopeScaling, YarnScaling
from dtron.models.variants import Variant
from dtron.optim import muon
from dtron.optim.adamw import AdamW
from dtron.train.optimizer import block_matrices
from dtron.verify.plain import Routers

STEPS, ROWS, SEQ, CLIP = 2, 8, 32, 0.5
SMALL = LlamaConfig(vocab_size=96, dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64, init_std=0.15)
MODELS = {
    "small": SMALL,
    "shallow": replace(SMALL, n_layers=2),
    "deep": replace(SMALL, n_layers=8),
    "mha": replace(SMALL, n_kv_heads=4),
    "tied": replace(SMALL, tie_embeddings=True),
    "deep_tied": replace(SMALL, n_layers=8, tie_embeddings=True),
    "uneven": LlamaConfig(vocab_size=98, dim=36, n_layers=4, n_heads=2, n_kv_heads=2, ffn_dim=50, init_std=0.15),
    "qwen2": replace(SMALL, qkv_bias=True),
    "biases": replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True, head_bias=True),
    "qwen3": replace(SMALL, qk_norm=True, head_dim=16, init_std=0.3),
    "moe": replace(SMALL, init_std=0.136, moe=MoEConfig(8, 2, 32)),
    "olmoe": replace(
        SMALL, qk_norm_whole=True, n_layers=2, init_std=0.169, moe=MoEConfig(8, 2, 32, normalize_top_k=False)
    ),
    "qwen3 moe": replace(SMALL, qk_norm=True, head_dim=16, init_std=0.181, moe=MoEConfig(8, 2, 32)),
    "moe all": replace(
        SMALL,
        init_std=0.128,
        moe=MoEConfig(
            8,
            2,
            32,
            score="sigmoid",
            route_scale=1.5,
            shared_dim=32,
            n_dense_layers=1,
            n_groups=4,
            top_groups=2,
            balancing_bias=True,
        ),
    ),
    # Every second value rotated, and of four layers one by yarn, one without positions, one of a base of its own.
    "ropes": replace(
        SMALL, rope_scaling=YarnScaling(4.0, 16), ropes=("global", "none", "local"), local_rope_theta=300.0,
        partial_rotary_factor=0.5,
    ),
    "longrope": replace(
        SMALL, rope_scaling=LongRopeScaling(4.0, 24, (1.0, 1.2, 1.5, 2.0), (1.5, 3.0, 4.0, 5.0), length=SEQ)
    ),
    "scaled": replace(SMALL, rope_theta=500.0, rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 16)),
    "gpt oss": replace(
        SMALL,
        qkv_bias=True,
        o_bias=True,
        attention_sinks=True,
        windows=(9, None),
        n_layers=2,
        init_std=0.14,
        moe=MoEConfig(8, 2, 32, biases=True, swiglu_limit=0.5),
    ),
    # Every second layer attends to the 6 last tokens.
    "windows": replace(SMALL, windows=(6, None)),
    "scores": replace(SMALL, windows=(None, 9), attention_scale=0.6, attention_softcap=1.5, attention_sinks=True),
    "scale": replace(SMALL, attention_scale=0.6),
    # Parts that are not Llama's, each in one of these.
    "gemma": replace(
        SMALL, qk_norm=True, tie_embeddings=True,
        variant=Variant("rms_1p", "both", activation="gelu_tanh", embedding_multiplier="sqrt", logits_softcap=2.0),
    ),
    "cohere": replace(
        SMALL, attention_scale=0.7, variant=Variant("layer", "parallel", norm_per_head=True, logits_multiplier=0.7)
    ),
    "nemotron": replace(
        SMALL,
        variant=Variant(
            "layer_1p", activation="relu2", gated=False, embedding_multiplier=3.0, residual_multiplier=0.6
        ),
    ),
    # xIELU has a step in its slope at 0, which no hidden value may lie beside: one does with the usual init_std.
    "apertus": replace(
        SMALL,
        n_layers=2,
        qk_norm_whole=True,
        init_std=0.18,
        variant=Variant(norms="after", activation="xielu", gated=False),
    ),
}  # fmt: skip
# Tolerances of a weight, from one process against itself with 4 microbatches in place of 1 (test_noise measures it):
# the clipped gradients then differ by at most 1.7e-8, 7e-10 in the mean square. AdamW divides by sqrt(v) + eps, so an
# element whose gradient is rounding noise moves by lr * noise / eps: with the usual eps of 1e-8 the noise of one
# process is up to 3.9 times the tolerance, with 1e-5 0.67 times, with 1e-4 0.17. Hence 1e-4: 1/20 of the root mean
# square of the gradients, 2e-3.
# Learning rates are such that every parameter moves by at least 15 times its tolerance (root mean square).
RTOL, ATOL = 1e-4, 1e-6
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=3.0),
    "AdamW": lambda parameters: torch.optim.AdamW(
        parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1, fused=True
    ),
}
# Only in cases that name them. An element of a moment whose fp32 values on two layouts lie on both sides of the middle
# between two bf16 numbers is rounded to both: half of 2^-8 of it, by which a weight moves lr * 2^-8 more or less.
# Muon iterates in fp32 here, on both sides: in bf16 the noise of the gradients would be a hundred times as large.
SECTIONS = {
    "AdamW bf16": Optimizer(lr=1e-2, eps=1e-4, state_dtype="bfloat16"),
    "Muon": Optimizer(name="Muon", lr=1e-2, eps=1e-4),
}
ATOLS = {"AdamW bf16": 4e-5}


class Several:
    """Optimizers of different parameters of one model."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers

    def step(self) -> None:
        with fp32_iteration():
            for optimizer in self._optimizers:
                optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()


@contextlib.contextmanager
def fp32_iteration() -> Iterator[None]:
    """torch's Muon and dtron's orthogonalize in fp32."""
    with patch.object(Tensor, "bfloat16", lambda t: t.clone()), patch.object(muon, "DTYPE", torch.float32):
        yield


def plain_optimizer(name: str, model: Llama) -> Any:
    """The optimizer of the truth: torch's, but for AdamW with bf16 moments, which torch lacks."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name](model.parameters())
    c = SECTIONS[name]
    adamw = {"lr": c.lr, "betas": (c.beta1, c.beta2), "eps": c.eps}
    if name == "AdamW bf16":
        groups = [{"params": list(model.parameters()), "weight_decay": c.weight_decay}]
        return AdamW(groups, **adamw, state_dtype=torch.bfloat16)
    whole = [p for p in block_matrices(model) if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in block_matrices(model)) and p.requires_grad]
    torchs = torch.optim.Muon(whole, c.lr, c.weight_decay, adjust_lr_fn=c.muon.adjust_lr_fn)
    stacks = [p for p in block_matrices(model) if p.ndim == 3]
    own = [muon.Muon([{"params": stacks, "weight_decay": c.weight_decay}], c.lr, adjust_lr_fn="match_rms_adamw")]
    return Several(torchs, torch.optim.AdamW(rest, **adamw, weight_decay=c.weight_decay), *(own if stacks else []))


# Of models with experts: weight of the balance loss, so large that leaving it out shows, and step of the bias.
BALANCE_LOSS, BIAS_RATE = 0.2, 0.01


@dataclass
class Run:
    """Loss and global gradient norm before clipping of each step, and the weights after the last.

    counts: of each step the rows of each expert [layers][experts], none without experts. gap: between the score of the
    last expert that any token chose and of the first that it did not: rounding must not cross it.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    counts: list[list[list[int]]]
    gap: float


def batch(step: int) -> tuple[Tensor, Tensor]:
    """tokens and labels [ROWS, SEQ]; the share of masked labels grows from row to row, so ranks differ."""
    g = torch.Generator().manual_seed(100 + step)
    text = torch.randint(0, SMALL.vocab_size, (ROWS, SEQ + 1), generator=g)
    labels = text[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=g) < torch.linspace(0, 0.6, ROWS)[:, None]] = -100
    return text[:, :-1], labels


def document_starts(step: int) -> Tensor:
    """document_start of a step, [ROWS, SEQ]: rows of one document, of many, and of documents of one token."""
    g = torch.Generator().manual_seed(200 + step)
    begins = torch.rand(ROWS, SEQ, generator=g) < torch.linspace(0, 0.5, ROWS)[:, None]
    return torch.where(begins, torch.arange(SEQ), 0).cummax(1).values


def plain_model(config: LlamaConfig) -> Llama:
    """The model on CPU with the weights every layout starts from."""
    model = Llama(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_rows(name, p.shape, 0, p.shape[0], llama_init_std(name, config), 0, p.device))
    return model


def in_float8(model: Llama, recipe: str, powers_of_two: bool = True) -> None:
    """Emulate float8 in the linear layers of the blocks, by torchao's own call; rowwise scales always are such."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    config = replace(config, emulate=True, round_scales_to_power_of_2=powers_of_two)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name.startswith("layers."))


@cache
def single_process(
    model_name: str, optimizer_name: str, microbatches: int = 1, masked: bool = False, recipe: str = ""
) -> Run:
    """STEPS optimizer steps, the gradients accumulated over `microbatches`; masked: attention inside documents only.

    recipe: of float8, none for none.
    """
    model = plain_model(MODELS[model_name])
    if recipe:
        in_float8(model, "tensorwise" if recipe == "plain scales" else recipe, recipe != "plain scales")
    optimizer = plain_optimizer(optimizer_name, model)
    routers = Routers(model, model.config.moe, BALANCE_LOSS / ROWS)
    losses, norms, all_counts = [], [], []
    for step in range(STEPS):
        tokens, labels = batch(step)
        valid = (labels != -100).sum()
        optimizer.zero_grad()
        losses.append(0.0)
        starts = document_starts(step).chunk(microbatches) if masked else [None] * microbatches
        for x, y, d in zip(tokens.chunk(microbatches), labels.chunk(microbatches), starts, strict=True):
            logits = model(x, document_start=d).flatten(0, 1)
            loss = F.cross_entropy(logits, y.flatten(), ignore_index=-100, reduction="sum") / valid
            (loss + routers.balance_loss()).backward()
            losses[-1] += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        all_counts.append(routers.move_biases(BIAS_RATE))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Run(losses, norms, weights, all_counts, routers.gap)


def off(weight: Tensor, expected: Tensor, atol: float = ATOL) -> float:
    """The largest difference as a multiple of the tolerance: above 1 is a failure (NaN counts as one)."""
    worst = ((weight - expected).abs() / (RTOL * expected.abs() + atol)).max() if weight.numel() else torch.zeros(())
    return float("inf") if worst.isnan() else worst.item()
