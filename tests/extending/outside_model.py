"""A model from outside of dtron: a GPT with learned positions, LayerNorm, parallel blocks (as in GPT-J), no rotary."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel

from dtron.models.attention import CausalAttention
from dtron.models.flops import attention_flops_per_token
from dtron.models.spec import ModelSpec
from dtron.parallel.tensor import VocabParallelEmbedding
from dtron.registry import register


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    max_positions: int

    @property
    def head_size(self) -> int:
        return self.dim // self.n_heads


class Mixer(nn.Module):
    """Attention and feed-forward of the same input, side by side."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.head_size = c.head_size
        sizes = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
        for name, (m, n) in sizes.items():
            self.add_module(name, nn.Linear(m * c.dim, n * c.dim, bias=False))
        self.core = CausalAttention()  # the module that context parallel replaces by its ring

    def forward(self, x: Tensor) -> Tensor:  # [B, S, E]
        q, k, v = (f(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(self.core(q, k, v).transpose(1, 2).flatten(2)) + self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(c.dim), Mixer(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class GPT(nn.Module):
    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(c.vocab_size, c.dim), nn.Embedding(c.max_positions, c.dim)
        self.layers = nn.ModuleDict({str(i): Block(c) for i in range(c.n_layers)})
        self.norm, self.head = nn.LayerNorm(c.dim), nn.Linear(c.dim, c.vocab_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: token ids [B, S], or [B, S, E] on a later pipeline stage, where `token` and `position` are None."""
        h = x if self.token is None else self.token(x) + self.position(positions)
        for block in self.layers.values():
            h = block(h)
        return h if self.head is None else self.head(self.norm(h))


def init_std(name: str, config: GPTConfig) -> float | None:
    return (0.0 if name.endswith("bias") else None) if "norm" in name else 0.1


def tensor_plan(loss_parallel: bool) -> dict:
    logits = Shard(-1) if loss_parallel else Replicate()
    return {
        "token": VocabParallelEmbedding(),
        "position": VocabParallelEmbedding(),
        "layers.*.norm": SequenceParallel(),
        "layers.*.mixer": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        **{f"layers.*.mixer.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")},
        **{f"layers.*.mixer.{name}": RowwiseParallel(output_layouts=Shard(1)) for name in ("out", "down")},
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=logits, use_local_output=not loss_parallel),
    }


SPEC = ModelSpec({"tiny": GPTConfig(96, 32, 4, 4, 4, 64)}, GPT, init_std, attention_flops_per_token, tensor_plan)
register("model", "gpt", SPEC)
