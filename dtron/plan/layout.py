"""A model's sizes and a layout, as the closed forms of memory and time read them."""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from dtron.config import Config
from dtron.errors import UserError
from dtron.models.llama import LlamaConfig
from dtron.models.spec import experts_of
from dtron.parallel.loss import chunk_tokens
from dtron.parallel.pipeline import split_by_cost
from dtron.parallel.schedules import SCHEDULES
from dtron.plan import schedule
from dtron.plan.blocks import BlockBytes, block_bytes

__all__ = ["Layout", "Sizes", "describe", "in_flight", "layers_per_stage", "loss_chunk", "muon_steps"]


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a Llama-like model. ffn: of a block's feed-forward; with experts that of one expert.

    matrices: of a feed-forward, two without a gate. shared: hidden size of an expert that every token takes. vectors:
    parameters of a block's norms and biases; None: of two RMSNorms. windows: of the layers, a pattern that repeats.
    scaled_logits: bytes for each logit that a soft cap or a multiplier adds, where the loss is given all of them and
    where it makes them in chunks. block: what a block of the model itself holds; None: of Llama's.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    tied: bool = False
    experts: int = 0
    top_k: int = 0
    shared: int = 0
    matrices: int = 3
    vectors: int | None = None
    windows: tuple[int | None, ...] = ()
    scaled_logits: tuple[int, int] = (0, 0)
    block: BlockBytes | None = None

    @classmethod
    def of(cls, m: Any) -> "Sizes":
        """Of a model's configuration, of which a block is recorded. UserError where it is no Llama-like one."""
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim", "head_size")
        if lacking := [name for name in names if not hasattr(m, name)]:
            raise UserError(
                f"the planner knows Llama-like models, and this one's configuration has no {lacking[0]}; record single "
                "layouts of it by dtron.plan.dryrun"
            )
        moe, tied = experts_of(m), getattr(m, "tie_embeddings", False)
        ffn = moe.expert_dim if moe else m.ffn_dim
        experts = (moe.n_experts, moe.top_k, moe.shared_dim) if moe else (0, 0, 0)
        plain = cls(m.dim, m.n_layers, m.n_heads, m.n_kv_heads, m.head_size, ffn, m.vocab_size, tied, *experts)
        if not isinstance(m, LlamaConfig):
            return plain
        v, block = m.variant, block_bytes(m)
        plain = replace(plain, matrices=3 if v.gated else 2, windows=m.windows, vectors=0, block=block)
        capped, multiplied = v.logits_softcap is not None, v.logits_multiplier != 1
        scaled = 2 * capped, 12 * capped + 4 * multiplied
        return replace(plain, vectors=block.parameters - plain.block_parameters, scaled_logits=scaled)

    @property
    def attention_parameters(self) -> int:
        """Of one block."""
        return self.dim * self.head_size * 2 * (self.heads + self.kv_heads)

    @property
    def expert_parameters(self) -> int:
        """Of one block's feed-forward, of all experts together."""
        return self.matrices * self.dim * self.ffn * max(1, self.experts)

    @property
    def other_parameters(self) -> int:
        """Of one block's router, shared expert, norms and biases."""
        vectors = 2 * self.dim if self.vectors is None else self.vectors
        return self.dim * self.experts + 3 * self.dim * self.shared + vectors

    @property
    def block_parameters(self) -> int:
        return self.attention_parameters + self.expert_parameters + self.other_parameters

    @property
    def active_block_parameters(self) -> int:
        """What multiplies one token."""
        ffn = self.matrices * self.dim * self.ffn * (self.top_k if self.experts else 1)
        return self.attention_parameters + ffn + self.dim * self.experts + 3 * self.dim * self.shared

    @property
    def parameters(self) -> int:
        return self.layers * self.block_parameters + self.vocab * self.dim * (1 if self.tied else 2) + self.dim

    def attended(self, seq_len: float) -> float:
        """Tokens to which one attends, in the mean of the layers; masked ones are counted, but for those of windows."""
        each = [min(window or seq_len, seq_len) for window in self.windows or (None,)]
        return sum(each) / len(each)

    def flops_per_token(self, seq_len: float, causal: bool = False) -> float:
        """Forward and backward, as `dtron/models/flops.py` counts; causal: attention only where it is not masked."""
        attention = (6 if causal else 12) * self.heads * self.head_size * self.attended(seq_len)
        return 6 * (self.layers * self.active_block_parameters + self.vocab * self.dim) + self.layers * attention


@dataclass(frozen=True)
class Layout:
    """microbatch: sequences in one forward; microbatches: of an optimizer step, on each rank.

    virtual: stages per pipeline rank. recompute: none, op, second (every second block), full or budget, of compiled
    blocks: memory_budget, the share that they may keep. reshard: whether gathered weights are freed between forward and
    backward. schedule: of the pipeline, a name or a CSV file; empty:
    1F1B, or Interleaved1F1B with several stages per rank. loss_chunk: training.loss_chunk_tokens, 0 for other
    losses. compiled: whether blocks are. state_dtype: of the optimizer's moments. muon_steps: of Newton-Schulz; 0:
    another optimizer, AdamW.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    microbatch: int = 1
    microbatches: int = 1
    virtual: int = 1
    recompute: str = "op"
    memory_budget: float = 1.0
    reshard: bool = True
    loss_chunk: int = 2048
    compiled: bool = False
    state_dtype: str = "float32"
    muon_steps: int = 0
    schedule: str = ""
    layers_per_stage: int = field(default=0, compare=False)  # of which virtual follows, where that is more than 2

    def __post_init__(self) -> None:
        if not self.schedule:
            object.__setattr__(self, "schedule", "1F1B" if self.virtual == 1 else "Interleaved1F1B")

    @property
    def gpus(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    def tokens(self, seq_len: int) -> int:
        """Of one microbatch on a rank of cp; tp splits them further where the sequence is split."""
        return self.microbatch * seq_len // self.cp


def loss_chunk(config: Config, schedule: str) -> int:
    """Tokens whose logits are made at a time, under a pipeline's schedule; 0: all of a microbatch."""
    zero_bubble = schedule in SCHEDULES and SCHEDULES[schedule].zero_bubble
    return chunk_tokens(config, zero_bubble) if config.training.loss == "cross_entropy" else 0


def muon_steps(config: Config) -> int:
    """`Layout.muon_steps` of a run."""
    return config.optimizer.muon.ns_steps if config.optimizer.name == "Muon" else 0


def describe(a: Layout) -> str:
    """In words, without what is 1."""
    degrees = {"pp": a.pp, "dp_replicate": a.dp_replicate, "dp_shard": a.dp_shard, "cp": a.cp, "tp": a.tp, "ep": a.ep}
    text = " ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one GPU"
    if a.pp > 1:
        text += f" {a.schedule}" + (f" x{a.virtual}" if a.virtual > 2 else "")
    text += "" if a.reshard or a.pp > 1 else " no reshard"
    return text + ("" if a.state_dtype == "float32" else " bf16 moments")


@cache
def layers_per_stage(s: Sizes, seq_len: int, n_stages: int) -> list[int]:
    """As dtron splits them: the head counts as its FLOPs."""
    if n_stages == 1:
        return [s.layers]
    block = 6.0 * s.active_block_parameters + 12 * s.heads * s.head_size * seq_len
    return split_by_cost([block] * s.layers, n_stages, 0.0, 6.0 * s.vocab * s.dim)


def in_flight(layout: Layout, rank: int) -> int:
    """Most microbatches that a pipeline rank has gone forward with and not backward, each of its stages counted."""
    a = layout
    return 1 if a.pp == 1 else schedule.in_flight(a.schedule, a.pp, a.pp * a.virtual, a.microbatches, rank)
