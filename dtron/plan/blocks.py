"""What one block of a model holds for each token, recorded: for the closed form, which knows Llama's own blocks."""

import dataclasses
from functools import cache
from typing import Any

import torch

from dtron.compat import planning
from dtron.models.attention import attention_mask
from dtron.models.llama import Block, LlamaConfig
from dtron.models.rope import rope_table
from dtron.parallel.recompute import apply_recompute
from dtron.plan.cuda_attention import flex_attention_stand_in
from dtron.plan.recorder import Recorder

__all__ = ["BlockBytes", "block_bytes"]

TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class BlockBytes:
    """Bytes per token, without tensor parallel. none, op: kept from forward to backward, with the block's output and
    without its input; temporary: the most that the backward holds besides, without gradients of weights. parameters: of
    the last block.
    """

    none: float
    op: float
    temporary: float
    parameters: int


@cache
def block_bytes(m: LlamaConfig) -> BlockBytes:
    """Of a block in bf16 with CUDA's operators; a mixture of experts is recorded with one of them as feed-forward."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Block(m, m.n_layers - 1).parameters())
    if m.moe is not None:
        m = dataclasses.replace(m, moe=None, ffn_dim=m.moe.expert_dim)
    with planning.fused_norms(), flex_attention_stand_in():
        kept, temporary = _slope(m, "none", "2")
        return BlockBytes(kept, _slope(m, "selective", "op")[0], temporary, parameters)


def _slope(m: LlamaConfig, mode: str, option: str) -> tuple[float, float]:
    """(kept, temporary) per token: of twice as many, what is more."""
    (k1, t1), (k2, t2) = (_record(m, n * TOKENS, mode, option) for n in (1, 2))
    return (k2 - k1) / TOKENS, (t2 - t1) / TOKENS


def _record(m: LlamaConfig, tokens: int, mode: str, option: str) -> tuple[int, int]:
    """Bytes that a block keeps of so many tokens, and that its backward holds besides at most."""
    with torch.device("meta"):
        block = apply_recompute(Block(m, m.n_layers - 1).to(torch.bfloat16), 0, mode, option)
    with planning.FakeTensorMode(allow_non_fake_inputs=True):
        return _run(m, block.to_empty(device="cpu"), tokens)


def _run(m: LlamaConfig, block: Any, tokens: int) -> tuple[int, int]:
    x = torch.zeros(1, tokens, m.dim, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(tokens).expand(1, -1)
    start = torch.zeros_like(positions) if m.needs_masks(0) else None
    tables = rope_table(m.rope(m.n_layers - 1), positions)
    recorder = Recorder()
    with recorder:
        # As others call it, the mask is made once for all blocks.
        mask = attention_mask(None, positions, start) if start is not None else None
        before = recorder.level(len(recorder.events))
        out = block(x, *tables, mask)
        kept = recorder.level(len(recorder.events)) - before
        since = len(recorder.events)
        out.backward(torch.empty_like(out))
    return kept, recorder.peak(since).total - before - kept
