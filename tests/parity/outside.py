"""The same training without dtron: transformers, torch.optim and a plain loop. Imports nothing of the project."""

import math

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, ROWS, SEQ, VOCABULARY = 20, 8, 32, 96
WARMUP, PEAK, FLOOR, CLIP = 4, 1e-2, 0.1, 0.5


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, rms_norm_eps=1e-5, initializer_range=0.1, attn_implementation="sdpa",
    )  # fmt: skip


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and labels [ROWS, SEQ] of a step, a fifth of the labels masked; two batches in turn, to be learnt."""
    g = torch.Generator().manual_seed(step % 2)
    text = torch.randint(0, VOCABULARY, (ROWS, SEQ + 1), generator=g)
    labels = text[:, 1:].masked_fill(torch.rand(ROWS, SEQ, generator=g) < 0.2, -100)
    return text[:, :-1], labels


def learning_rate(step: int, shape: str) -> float:
    """Warm-up, then a cosine to FLOOR of the peak, or (wsd) the peak and a linear last quarter; step from 1."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    length = STEPS - WARMUP if shape == "cosine" else STEPS // 4
    progress = max(0.0, (step - (STEPS - length + 1)) / length)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
    return PEAK * (FLOOR + (1 - FLOOR) * left)


def train(model: LlamaForCausalLM, shape: str) -> list[tuple[float, float, float]]:
    """Loss, gradient norm before clipping and learning rate of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    rows = []
    for step in range(1, STEPS + 1):
        tokens, labels = batch(step)
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.param_groups[0]["lr"] = learning_rate(step, shape)
        optimizer.step()
        rows.append((loss.item(), norm.item(), learning_rate(step, shape)))
    return rows
