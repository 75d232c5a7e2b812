"""The truth: the plain model on one process, written without any of dtron's parallel code."""

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.models.init import initial_rows, llama_init_std
from dtron.models.llama import Llama, LlamaConfig, RopeScaling

STEPS, ROWS, SEQ, CLIP = 2, 8, 32, 0.5
SMALL = LlamaConfig(vocab_size=96, dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64, init_std=0.15)
MODELS = {
    "small": SMALL,
    "deep": replace(SMALL, n_layers=8),
    "tied": replace(SMALL, tie_embeddings=True),
    "deep_tied": replace(SMALL, n_layers=8, tie_embeddings=True),
    "scaled": replace(SMALL, rope_theta=500.0, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16)),
}
# AdamW divides by sqrt(v) + eps: where a gradient is rounding noise, the quotient is +-1 noise and a
# parameter moves by up to the learning rate. eps 1e-4 is about 100 times the noise measured on one process
# between 1 and 4 microbatches, so such elements stay put and all others still see AdamW.
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1),
}


@dataclass
class Run:
    """Loss and global gradient norm before clipping of each step, and the weights after the last."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """tokens and labels [ROWS, SEQ]; the share of masked labels grows from row to row, so ranks differ."""
    g = torch.Generator().manual_seed(100 + step)
    text = torch.randint(0, SMALL.vocab_size, (ROWS, SEQ + 1), generator=g)
    labels = text[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=g) < torch.linspace(0, 0.6, ROWS)[:, None]] = -100
    return text[:, :-1], labels


def plain_model(config: LlamaConfig) -> Llama:
    """The model on CPU with the weights every layout starts from."""
    model = Llama(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_rows(name, p.shape, 0, p.shape[0], llama_init_std(name, config), 0, p.device))
    return model


@cache
def single_process(model_name: str, optimizer_name: str) -> Run:
    model = plain_model(MODELS[model_name])
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    losses, norms = [], []
    for step in range(STEPS):
        tokens, labels = batch(step)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return Run(losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()})
