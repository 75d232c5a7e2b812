"""The time of an optimizer step from first principles, in a tenth of a millisecond: for ranking layouts.

A block's matmuls run in tiles over the multiprocessors, its attention at a rate of its own, the rest at the rate of the
memory; the sum is no less than the host needs to launch it. Tensor parallel's messages are on the path, the ring's are
behind attention, FSDP's behind the blocks, whose work they slow down. NCCL's gathers and scatters are rings, whose
latency grows with the nodes, its all-reduces trees. A pipeline adds its bubble and what its stages pass on.

`Constants` are all that is fitted; `scripts/bench/plan_error.py` holds the model against published steps.
"""

import math
from dataclasses import dataclass

from dtron.plan.hardware import Hardware
from dtron.plan.layout import Layout, Sizes

__all__ = ["COMPILED", "EAGER", "Constants", "Prediction", "Style", "contended", "predict"]


@dataclass(frozen=True)
class Constants:
    """Shares of peak rates unless a unit is said. Fitted by `scripts/bench/plan_error.py --fit`, but for launch_s."""

    matmul: float = 0.72  # the best measured bf16 matmuls of H100 and H200 reach 0.80
    attention: float = 0.40  # flash attention's forward, masked half not counted
    memory: float = 0.71
    link: float = 0.71
    network: float = 0.54
    launch_s: float = 6e-6  # of one kernel by the host, in eager mode
    latency_s: float = 15e-6  # of a message between nodes
    contention: float = 0.10  # of the network's rate, for each doubling of the nodes
    overlap_tax: float = 0.07  # of a block's time, while as much is gathered and reduced behind it
    optimizer_s: float = 2e-3  # beside its bytes


@dataclass(frozen=True)
class Style:
    """What an implementation does to memory in a block: bytes per token and hidden unit, for the residual stream and
    norms, the heads, the feed-forward; bytes for each logit; kernels; attention's rate relative to `Constants`.

    dtron's are `EAGER` and `COMPILED`. The rest is only of others, whose published steps calibrate the model: fsdp
    False is gradients reduced once in a step; work, of a block's time; hop_s and sync_s, what a message of the pipeline
    and each doubling of the data-parallel ranks cost besides.
    """

    residual: float
    heads: float
    ffn: float
    logits: float
    kernels: int
    attention: float = 1.0
    fused_projections: bool = False
    hidden_tp: float = 0.0  # share of tensor parallel's messages that is hidden
    fsdp: bool = True
    gradient_bytes: int = 4
    work: float = 1.0
    hop_s: float = 0.0
    sync_s: float = 0.0


EAGER = Style(36, 60, 12, 36, 62)
COMPILED = Style(22, 14, 6, 16, 26)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step and what they are; tokens_per_s: for each GPU."""

    step_s: float
    tokens_per_s: float
    mfu_full: float
    mfu_causal: float
    matmul_s: float
    attention_s: float
    memory_bound_s: float
    recompute_s: float
    tensor_s: float
    context_s: float
    expert_s: float
    data_s: float
    bubble_s: float
    pipeline_s: float
    optimizer_s: float
    other_s: float


@dataclass(frozen=True)
class _Group:
    """Ranks that communicate; here: how many of them are in one node."""

    ranks: int
    here: int

    @classmethod
    def of(cls, ranks: int, stride: int, per_node: int) -> "_Group":
        """stride: ranks of the world from one to the next."""
        return cls(ranks, max(1, min(ranks, per_node // stride)))


def _matmul_s(m: float, n: float, k: float, hw: Hardware, c: Constants) -> float:
    """m x k by k x n: whole waves of 128 x 256 tiles, which smaller tiles soften, or the traffic."""
    waves = math.ceil(math.ceil(m / 128) * math.ceil(n / 256) / hw.multiprocessors)
    whole = 2 * m * n * k / (hw.flops * c.matmul)
    tiled = waves * 2 * 128 * 256 * k * hw.multiprocessors / (hw.flops * c.matmul)
    return max(min(tiled, 1.35 * whole), 2 * (m * k + k * n + m * n) / (hw.memory_rate * c.memory)) + 2e-6


def contended(nodes: float, c: Constants) -> float:
    """By how much longer messages take between so many nodes."""
    return 1 + c.contention * math.log2(nodes / 2) if nodes > 2 else 1.0


def _message_s(size: float, group: _Group, hw: Hardware, c: Constants, tree: bool = False) -> float:
    """A gather, scatter or exchange of `size` bytes in all; tree: an all-reduce, of twice as much."""
    n = group.ranks
    if n == 1:
        return 0.0
    moved = size * (n - 1) / n * (2 if tree else 1)
    if group.here == n:
        return moved / (hw.link_rate * c.link) + 5e-6 + 0.5e-6 * n
    nodes = n / group.here
    rate = min(hw.link_rate * c.link, hw.network_rate * c.network * group.here)
    return moved / rate * contended(nodes, c) + c.latency_s * (1 + (math.log2(nodes) if tree else nodes / 2))


@dataclass(frozen=True)
class _Block:
    """Seconds of one block and microbatch, forward and backward."""

    matmul: tuple[float, float]
    attention: tuple[float, float]
    memory: tuple[float, float]
    host: tuple[float, float]
    tensor: float  # of either direction
    expert: float
    context: tuple[float, float]
    work: float

    def total(self, direction: int) -> float:
        work = self.matmul[direction] + self.attention[direction] + self.memory[direction]
        return max(work * self.work, self.host[direction]) + self.tensor + self.expert + self.context[direction]


def _block(s: Sizes, a: Layout, seq_len: int, hw: Hardware, c: Constants, style: Style) -> _Block:
    tokens, tp, d = a.tokens(seq_len), a.tp, s.head_size
    heads, both = s.heads * d // tp, (s.heads + 2 * s.kv_heads) * d // tp
    kv = s.kv_heads * d // tp
    ins = [(s.dim, both)] if style.fused_projections else [(s.dim, heads), (s.dim, kv), (s.dim, kv)]
    products = [(tokens, k, n) for k, n in [*ins, (heads, s.dim)]]
    rows, split, width = (tokens, tp, 1.0) if not s.experts else (tokens * s.top_k // tp, 1, s.top_k / tp)
    ups = [(s.dim, 2 * s.ffn // split)] if style.fused_projections else [(s.dim, s.ffn // split)] * 2
    products += [(rows, k, n) for k, n in [*ups, (s.ffn // split, s.dim)]]
    forward = sum(_matmul_s(m, n, k, hw, c) for m, k, n in products)
    backward = sum(_matmul_s(m, k, n, hw, c) + _matmul_s(k, n, m, hw, c) for m, k, n in products)
    rate = hw.flops * c.attention * style.attention * (1.0 if d >= 128 else 0.8)
    attention = 2 * tokens * seq_len * s.heads // tp * d / rate
    hidden = s.ffn * (width if s.experts else 1 / tp)
    bound = tokens * (style.residual * s.dim / tp + style.heads * both + style.ffn * hidden)
    bound /= hw.memory_rate * c.memory
    group = _Group.of(tp, 1, hw.gpus_per_node)
    per_pair = 1 if s.experts else 2  # experts route each rank's own tokens
    tensor = 2 * per_pair * _message_s(2 * tokens * s.dim, group, hw, c) * (1 - style.hidden_tp)
    expert = 0.0
    if s.experts and a.ep > 1:
        expert = 2 * _message_s(2 * tokens / tp * s.top_k * s.dim, _Group.of(a.ep, 1, hw.gpus_per_node), hw, c)
    ring = (0.0, 0.0)
    if a.cp > 1:
        inside = tp * a.cp <= hw.gpus_per_node
        link = hw.link_rate * c.link if inside else hw.network_rate * c.network
        hops = (a.cp - 1) * (4 * tokens * kv / link + c.latency_s / 2)
        beside = (a.cp - 1) / a.cp * attention
        ring = max(0.0, hops - beside) + 0.15 * hops, max(0.0, 2 * hops - 2.5 / 0.85 * beside) + 0.15 * hops
    return _Block(
        (forward, backward), (attention, 2.5 * attention / 0.85), (bound, 2 * bound),
        (style.kernels * c.launch_s, 2 * style.kernels * c.launch_s), tensor, expert, ring, style.work,
    )  # fmt: skip


def _recompute_s(b: _Block, recompute: str) -> float:
    whole = b.total(0)
    by_operation = b.memory[0] + 0.28 * b.matmul[0] + b.tensor / 2  # `o`, `down` and a gather again
    return {"none": 0.0, "op": by_operation, "full": whole, "second": whole / 2}[recompute]


def predict(
    s: Sizes,
    a: Layout,
    seq_len: int,
    hw: Hardware,
    style: Style = COMPILED,
    c: Constants = Constants(),  # noqa: B008
) -> Prediction:
    """A step of `a.microbatches` microbatches on each rank."""
    b = _block(s, a, seq_len, hw, c, style)
    tokens, m = a.tokens(seq_len), a.microbatches
    again = _recompute_s(b, a.recompute)
    forward, backward = b.total(0), b.total(1) + again
    vocab = s.vocab // a.tp
    bound = tokens * vocab * style.logits / (hw.memory_rate * c.memory)
    head_f = _matmul_s(tokens, vocab, s.dim, hw, c) + bound / 2
    head_b = _matmul_s(tokens, s.dim, vocab, hw, c) + _matmul_s(s.dim, vocab, tokens, hw, c) + bound / 2
    layers = s.layers / a.pp
    data, slower, gathers = _data_parallel(s, a, layers, forward, backward, hw, c, style)
    fs, bs = (forward + gathers[0]) * slower, (backward + gathers[1]) * slower
    work = m * (layers * (fs + bs) + (head_f + head_b) / a.pp)
    bubble = passed = 0.0
    if a.pp > 1:
        per_stage = (layers * (fs + bs) + (head_f + head_b) / a.pp) / a.virtual
        bubble = (a.pp - 1) * per_stage
        hop = 2 * tokens * s.dim / a.tp / (hw.network_rate * c.network) + c.latency_s + style.hop_s
        passed = 2 * (a.pp - 1) * hop + m * a.virtual * hop
    outer = s.vocab * s.dim * (1 if a.pp > 1 or s.tied else 2)
    local = (layers * s.block_parameters + outer) / (a.tp * a.dp_shard * a.cp)
    optimizer = local * 34 / (hw.memory_rate * c.memory) + c.optimizer_s
    step = work + bubble + passed + data + optimizer
    rate = a.dp * a.microbatch * m * seq_len / step / a.gpus
    n = m * layers
    parts = {
        "matmul_s": n * sum(b.matmul) + m / a.pp * (head_f + head_b - bound),
        "attention_s": n * sum(b.attention),
        "memory_bound_s": n * sum(b.memory) + m / a.pp * bound,
        "recompute_s": n * again,
        "tensor_s": n * 2 * b.tensor,
        "context_s": n * sum(b.context),
        "expert_s": n * 2 * b.expert,
        "data_s": data + n * (fs + bs - forward - backward),
    }
    other = step - sum(parts.values()) - bubble - passed - optimizer  # the host, where it is slower than the GPU
    mfu = [rate * s.flops_per_token(seq_len, causal) / (hw.peak_flops or hw.flops) for causal in (False, True)]
    parts |= {"bubble_s": bubble, "pipeline_s": passed, "optimizer_s": optimizer, "other_s": other}
    return Prediction(step, rate, *mfu, **parts)


def _data_parallel(
    s: Sizes, a: Layout, layers: float, forward: float, backward: float, hw: Hardware, c: Constants, style: Style
) -> tuple[float, float, tuple[float, float]]:
    """(seconds once in a step, factor on a block's time, exposed seconds of a block forward and backward)."""
    shards = a.dp_shard * a.cp
    dense = s.attention_parameters / a.tp + (0 if s.experts else s.expert_parameters / a.tp)
    group = _Group.of(shards, a.tp, hw.gpus_per_node)
    matrix = s.vocab * s.dim / a.tp
    gather, reduce = _message_s(2 * dense, group, hw, c), _message_s(style.gradient_bytes * dense, group, hw, c)
    if s.experts:
        experts = s.expert_parameters / a.ep
        sparse = _Group.of(shards * a.tp // a.ep, a.ep, hw.gpus_per_node)
        gather += _message_s(2 * experts, sparse, hw, c)
        reduce += _message_s(style.gradient_bytes * experts, sparse, hw, c)
    once, slower, exposed = 0.0, 1.0, (0.0, 0.0)
    if not style.fsdp:
        held = layers * s.block_parameters / a.tp + matrix * (1 if a.pp > 1 or s.tied else 2)
        outer = _Group.of(a.dp_replicate, a.tp * shards, hw.gpus_per_node)
        if shards > 1:
            once += _message_s(4 * held, group, hw, c) + _message_s(2 * held, group, hw, c)
        once += _message_s(style.gradient_bytes * held / shards, outer, hw, c, tree=True)
        once = max(0.3 * once, once - 0.8 * layers * backward) + style.sync_s * math.log2(a.dp * a.cp)
        return once, slower, exposed
    ends = _message_s(2 * matrix, group, hw, c) + _message_s(style.gradient_bytes * 2 * matrix, group, hw, c)
    if a.reshard and a.pp == 1 and shards > 1:
        exposed = max(0.0, gather - forward), max(0.0, gather + reduce - backward)
        slower += c.overlap_tax * min(1.0, (2 * gather + reduce) / (forward + backward))
        once += gather + ends
    elif shards > 1:
        once += ends + 0.6 * layers * (gather + reduce)
    if a.dp_replicate > 1:
        outer = _Group.of(a.dp_replicate, a.tp * shards, hw.gpus_per_node)
        size = style.gradient_bytes * (layers * s.block_parameters / a.tp + 2 * matrix / a.pp) / shards
        once += 0.5 * _message_s(size, outer, hw, c, tree=True)
    return once, slower, exposed
