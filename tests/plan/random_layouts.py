"""Random models and legal layouts of them, for tests of the closed form of the peak."""

import random
from collections.abc import Iterator
from dataclasses import replace

from test_peak import MODEL

from dtron.config import load
from dtron.errors import UserError
from dtron.plan.layout import Layout, Sizes, loss_chunk
from dtron.plan.search import layouts, with_keys
from dtron.train.resolve import resolve
from dtron.train.setup import Setup

__all__ = ["draw"]

# dim, heads, kv heads, ffn, vocabulary
WIDTHS = (256, 4, 2, 640, 2048), (1024, 8, 4, 3584, 32000), (4096, 32, 8, 14336, 128256), (8192, 64, 8, 28672, 128256)
EXPERTS = (2048, 32, 4, 6144, 151936)
GPUS = 1, 2, 4, 8, 16, 32, 64, 128


def draw(rng: random.Random) -> Iterator[tuple[Setup, Sizes, Layout]]:
    """One after the other, without end."""
    while True:
        moe = rng.random() < 0.25
        dim, heads, kv, ffn, vocab = EXPERTS if moe else rng.choice(WIDTHS)
        keys = f"--model.n_layers {rng.choice((2, 4, 8))} --model.dim {dim} --model.n_heads {heads} "
        keys += f"--model.n_kv_heads {kv} --model.ffn_dim {ffn} --model.vocab_size {vocab} "
        keys += f"--training.seq_len {rng.choice((512, 2048, 8192))} --training.mixed_precision_param bfloat16 "
        keys += f"--training.loss_chunk_tokens {rng.choice((0, 2048))} "
        if moe:
            keys += "--model.name qwen3_moe --training.expert_balance_loss 0 "
        config = load(f"{MODEL} {keys}".split())
        sizes = Sizes.of(resolve(config, 1, "cpu").model_config)
        gpus = rng.choice(GPUS)
        found = list(layouts(sizes, config.training.seq_len, gpus, rng.choice((1, 2, 4)) * gpus, 8))
        layout = rng.choice([a for a in found if a.microbatches <= 16] or [Layout()])
        layout = replace(layout, loss_chunk=loss_chunk(config, layout.schedule))
        try:
            yield resolve(with_keys(config, layout), layout.gpus, "cuda"), sizes, layout
        except UserError:
            continue
