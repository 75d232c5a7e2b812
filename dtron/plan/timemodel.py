"""The time of an optimizer step from first principles, in some tenths of a millisecond: for ranking layouts.

A block's matmuls run in tiles over the multiprocessors, its attention at a rate of its own, the rest at the rate of the
memory; the sum is no less than the host needs to launch it. Tensor parallel's messages are on the path, the ring's are
behind attention, FSDP's behind the blocks, whose work they slow down, but for the latency of each message, which grows
with the ranks; its copies are work of the memory, too (`network.py` has the messages). A pipeline's step is that of
torch's own schedule, action by action (`schedule.py`), with whole layers in each stage and the head in the last.

`Constants`, and the shares of `Hardware`, are all that is fitted; `scripts/bench/plan_error.py` holds the model against
published steps.
"""

import dataclasses
import math
from dataclasses import dataclass

from dtron.config import Config
from dtron.errors import UserError
from dtron.plan.float8 import Float8, float8_of
from dtron.plan.hardware import Constants, Hardware
from dtron.plan.layout import Layout, Sizes, layers_per_stage
from dtron.plan.matmul import matmul_s
from dtron.plan.memory import budget_shares
from dtron.plan.muon import muon_s
from dtron.plan.network import Group, message_s
from dtron.plan.schedule import StageTimes, step_s

__all__ = ["ASYNC_TP", "COMPILED", "EAGER", "Prediction", "Style", "predict", "stage_times", "style_of"]


@dataclass(frozen=True)
class Style:
    """What an implementation does to memory in a block: bytes per token and hidden unit, for the residual stream and
    norms, the heads, the feed-forward; bytes for each logit, and in a loss of chunks; kernels; attention's rate
    relative to that of `Hardware`; rows, bytes per hidden unit and row of a token's experts, which are gathered by
    expert and summed by token, in the forward: a third of what the operators of `dtron/models/moe.py` read and write,
    forward and backward together.

    dtron's are `EAGER` and `COMPILED`. The rest is only of others, whose published steps calibrate the model: fsdp
    False is gradients reduced once in a step, in so many messages for each block; accumulated_bytes for each parameter,
    where a microbatch's gradient is added to a sum in fp32; optimizer_bytes, of AdamW with the norm; work, of a block's
    time; hop_s and sync_s, what a message of the pipeline and each doubling of the data-parallel ranks cost besides.
    stops_early: recomputing a block ends before its last matmul, whose result no backward needs (torch does so from
    2.1 on; not inside a compiled block, which is one function). op_matmuls: of the forward's, the share that
    recomputation by operation repeats; None: `o` alone, as dtron. ring: by how much longer attention takes for each
    doubling of cp, in the blocks of a ring; torch's, by torchtitan's published steps of cp 2 to 8.
    """

    residual: float
    heads: float
    ffn: float
    logits: float
    kernels: int
    chunk_logits: float = 8
    attention: float = 1.0
    fused_projections: bool = False
    hidden_tp: float = 0.0  # share of tensor parallel's messages that is hidden
    fsdp: bool = True
    gradient_bytes: int = 4
    messages: int = 1
    accumulated_bytes: int = 10
    optimizer_bytes: int = 34
    work: float = 1.0
    hop_s: float = 0.0
    sync_s: float = 0.0
    stops_early: bool = False
    op_matmuls: float | None = None
    ring: float = 0.0
    rows: float = 24
    float8: Float8 | None = None


EAGER = Style(36, 60, 12, 36, 62, chunk_logits=44, stops_early=True, ring=0.2)
COMPILED = Style(22, 14, 6, 16, 26, ring=0.2, rows=6)
EXCHANGED = 8  # bytes more per hidden unit and row where rows come from other ranks: sorted by expert, and back
# The rate of grouped products over that of plain ones: 524 to 545 TFLOP/s on an H100 (pytorch/ao, pull request 2490),
# 569 to 608 on an H200 (pytorch, issue 163425).
GROUPED = 0.75
ASYNC_TP = 0.5  # of tensor parallel's messages it hides: torchtitan's published 6 and 10%
CHUNKED_HEAD = 14  # bytes for each parameter of the head: its gradient zeroed in fp32, cast, multiplied in the backward
STATE_BYTES = 8  # of AdamW's two moments read and written: what bfloat16 ones save
GATHER, CAST, REDUCE = 4, 6, 6  # bytes that FSDP copies for each gathered parameter, casts of its shard, and reduces


def style_of(config: Config, hw: Hardware) -> Style:
    """What dtron does under a configuration. UserError for float8 on a GPU without."""
    float8 = float8_of(config)
    if float8 and hw.name.startswith("a100"):
        raise UserError(f"float8 needs an h100 or newer, and --hardware is {hw.name}; leave it out of model.converters")
    hidden = ASYNC_TP if config.parallelism.enable_async_tensor_parallel else 0.0
    return dataclasses.replace(COMPILED if config.compile.enable else EAGER, float8=float8, hidden_tp=hidden)


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
class _Block:
    """Seconds of one block and microbatch, forward and backward; weights: of the backward's matmuls, those that make
    gradients of weights.
    """

    matmul: tuple[float, float]
    weights: float
    attention: tuple[float, float]
    memory: tuple[float, float]
    host: tuple[float, float]
    tensor: float  # of either direction
    expert: float
    context: tuple[float, float]
    work: float
    last: float  # of the forward's matmuls, the last one, where recomputing stops before it
    by_operation: float  # of the forward's matmuls, those that recomputation by operation repeats

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
    fused = s.matrices - 1 if style.fused_projections else 1
    ups = [(s.dim, fused * s.ffn // split)] * ((s.matrices - 1) // fused)
    products += [(rows, k, n) for k, n in [*ups, (s.ffn // split, s.dim)]]
    if s.shared:
        products += [(tokens, s.dim, s.shared // tp)] * 2 + [(tokens, s.shared // tp, s.dim)]
    f8 = style.float8
    first = len(ins) + 1
    plain = [GROUPED if s.experts and first <= i < first + s.matrices else 1.0 for i in range(len(products))]
    faster = [x * y for x, y in zip(f8.faster(s), plain, strict=True)] if f8 else plain
    of_weights = faster if f8 and f8.weights else plain
    each = [matmul_s(m, n, k, hw, c, x) for (m, k, n), x in zip(products, faster, strict=True)]
    forward, output = sum(each), each[len(ins)]
    last = each[-1] if style.stops_early and not s.experts else 0.0
    inputs = sum(matmul_s(m, k, n, hw, c, x) for (m, k, n), x in zip(products, faster, strict=True))
    weights = sum(matmul_s(k, n, m, hw, c, x) for (m, k, n), x in zip(products, of_weights, strict=True))
    rate = hw.flops * hw.attention * math.sqrt(hw.power) * style.attention * (1.0 if d >= 128 else 0.8)
    windows = [min(window or seq_len, seq_len) for window in s.windows or (None,)]
    seen = sum(w - w * w / (2 * seq_len) for w in windows) / len(windows)  # tokens, of which the mask leaves so many
    attention = 4 * tokens * seen * s.heads // tp * d / rate * (1 + style.ring * math.log2(a.cp))
    hidden = s.ffn * (width if s.experts else 1 / tp)
    bound = tokens * (style.residual * s.dim / tp + style.heads * both + style.ffn * hidden)
    if s.experts:
        bound += rows * s.dim * (style.rows + (EXCHANGED if a.ep > 1 else 0))
    bound /= hw.memory_rate * c.memory
    casts = [x / (hw.memory_rate * c.memory) for x in f8.cast_bytes(s, tp, tokens)] if f8 else [0.0, 0.0]
    group = Group.of(tp, 1, hw.gpus_per_node)
    per_pair = 1 if s.experts else 2  # experts route each rank's own tokens
    tensor = 2 * per_pair * message_s(2 * tokens * s.dim, group, hw, c) * (1 - style.hidden_tp)
    expert = 0.0
    if s.experts and a.ep > 1:
        expert = 2 * message_s(2 * tokens / tp * s.top_k * s.dim, Group.of(a.ep, 1, hw.gpus_per_node), hw, c)
    return _Block(
        (forward, inputs + weights), weights, (attention, attention * FORWARD_TO_BACKWARD),
        (bound + casts[0], 2 * bound + casts[1]),
        (style.kernels * c.launch_s, 2 * style.kernels * c.launch_s), tensor, expert,
        _ring(a, 4 * tokens * kv, attention, hw, c), style.work, last,
        style.op_matmuls * forward if style.op_matmuls is not None else output,
    )  # fmt: skip


FORWARD_TO_BACKWARD = 2.5 / 0.8  # attention's backward has 5 matmuls for 2, at 0.8 of the rate (560 and 430 TF on H200)


def _ring(a: Layout, size: float, attention: float, hw: Hardware, c: Constants) -> tuple[float, float]:
    """Exposed seconds of context parallel's ring, forward and backward; size: bytes of a rank's keys and values."""
    if a.cp == 1:
        return 0.0, 0.0
    pair = Group.of(2, a.tp * (a.cp - 1), hw.gpus_per_node)  # the farthest neighbours
    hops = (a.cp - 1) * message_s(2 * size, pair, hw, c)
    beside = (a.cp - 1) / a.cp * attention
    tail = 0.15 * hops
    return max(0.0, hops - beside) + tail, max(0.0, 2 * hops - FORWARD_TO_BACKWARD * beside) + tail


def _recompute_s(b: _Block, a: Layout) -> float:
    if a.recompute == "budget":  # all that memory bounds, and of the rest what the compiler chose
        return b.memory[0] + budget_shares(a.memory_budget, a.tp)[1] * (b.matmul[0] + b.attention[0])
    whole = b.total(0) - b.last * b.work
    by_operation = b.memory[0] + b.by_operation + b.tensor / 2  # and the gathers again
    return {"none": 0.0, "op": by_operation, "full": whole, "second": whole / 2}[a.recompute]


@dataclass(frozen=True)
class _Work:
    """Seconds of one microbatch: of a block's forward, its backward and of that the gradients of weights, with FSDP's
    messages; of the head. data_s: of data parallel once in a step, copied_s and exposed_s: in each block.
    """

    block: _Block
    again: float
    forward: float
    backward: float
    weights: float
    head: tuple[float, float, float]
    bound: float  # of the head, what memory bounds
    messages: float  # of the head, tensor parallel's
    data_s: float


def _work(s: Sizes, a: Layout, seq_len: int, hw: Hardware, c: Constants, style: Style) -> _Work:
    b = _block(s, a, seq_len, hw, c, style)
    again, tokens = _recompute_s(b, a), a.tokens(seq_len)
    head, bound, messages = _head(s, a, tokens, hw, c, style)
    forward, backward = b.total(0), b.total(1) + again
    data, slower, more = _data_parallel(s, a, forward, backward, hw, c, style)
    return _Work(
        b, again, (forward + more[0]) * slower, (backward + more[1]) * slower, b.weights * b.work,
        head, bound, messages, data,
    )  # fmt: skip


def _head(
    s: Sizes, a: Layout, tokens: int, hw: Hardware, c: Constants, style: Style
) -> tuple[tuple[float, float, float], float, float]:
    """Seconds of the head and the loss of a microbatch, (forward, inputs, weights), what memory bounds of them, and of
    tensor parallel's messages, which are in them, too.
    """
    vocab, bandwidth = s.vocab // a.tp, hw.memory_rate * c.memory
    chunks = -(-tokens // a.loss_chunk) if a.loss_chunk else 1
    group = Group.of(a.tp, 1, hw.gpus_per_node)
    # The embedding's output is scattered and the head's input gathered, in the backward the other way round. Of each
    # token three numbers are reduced, the largest logit, the sum of exponentials and the label's logit; of a chunk the
    # last two together.
    passed = 2 * message_s(2 * tokens * s.dim, group, hw, c)
    reduced = message_s(12 * tokens, group, hw, c, tree=True, messages=2 * chunks if a.loss_chunk else 3)
    if not a.loss_chunk:
        bound = tokens * vocab * style.logits / bandwidth
        products = [matmul_s(m, n, k, hw, c) for m, n, k in ((tokens, vocab, s.dim), (tokens, s.dim, vocab))]
        forward, inputs = products[0] + bound / 2 + passed + reduced, products[1] + bound / 2 + passed
        return (forward, inputs, matmul_s(s.dim, vocab, tokens, hw, c)), bound, 2 * passed + reduced
    rows = -(-tokens // chunks)
    # All is made in the forward; the gradient of weights is added to one in fp32.
    added = max(matmul_s(s.dim, vocab, rows, hw, c), (8 * s.dim * vocab + 2 * rows * (s.dim + vocab)) / bandwidth)
    products = [matmul_s(rows, vocab, s.dim, hw, c), matmul_s(rows, s.dim, vocab, hw, c), added]
    bound = (tokens * vocab * style.chunk_logits + CHUNKED_HEAD * s.dim * vocab + 4 * tokens * s.dim) / bandwidth
    return (chunks * sum(products) + bound + passed + reduced, passed, 0.0), bound, 2 * passed + reduced


def stage_times(
    s: Sizes,
    a: Layout,
    seq_len: int,
    hw: Hardware,
    style: Style = COMPILED,
    c: Constants = Constants(),  # noqa: B008
) -> StageTimes:
    """Of a pipeline's stages and one microbatch."""
    return _stage_times(_work(s, a, seq_len, hw, c, style), s, a, seq_len, hw, style, c)


def _stage_times(w: _Work, s: Sizes, a: Layout, seq_len: int, hw: Hardware, style: Style, c: Constants) -> StageTimes:
    layers = layers_per_stage(s, seq_len, a.pp * a.virtual)
    rows = [[n * w.forward, n * (w.backward - w.weights), n * w.weights] for n in layers]
    rows[-1] = [row + head for row, head in zip(rows[-1], w.head, strict=True)]
    pair = Group.of(2, a.gpus // a.pp, hw.gpus_per_node)
    hop = message_s(4 * a.tokens(seq_len) * s.dim / a.tp, pair, hw, c) + style.hop_s
    forward, inputs, weights = zip(*rows, strict=True)
    return StageTimes(forward, inputs, weights, hop)


def predict(
    s: Sizes,
    a: Layout,
    seq_len: int,
    hw: Hardware,
    style: Style = COMPILED,
    c: Constants = Constants(),  # noqa: B008
) -> Prediction:
    """A step of `a.microbatches` microbatches on each rank."""
    w = _work(s, a, seq_len, hw, c, style)
    b, m, layers = w.block, a.microbatches, s.layers / a.pp
    work = m * (layers * (w.forward + w.backward) + sum(w.head) / a.pp)
    bubble = passed = 0.0
    if a.pp > 1:
        times = _stage_times(w, s, a, seq_len, hw, style, c)
        alone = step_s(a.schedule, a.pp, m, dataclasses.replace(times, hop_s=0.0))
        bubble, passed = alone - work, step_s(a.schedule, a.pp, m, times) - alone
    outer = s.vocab * s.dim * (1 if a.pp > 1 or s.tied else 2)
    local = ((0 if a.muon_steps else layers * s.block_parameters) + outer) / (a.tp * a.dp_shard * a.cp)
    moved = style.optimizer_bytes - (STATE_BYTES if a.state_dtype == "bfloat16" else 0)
    optimizer = local * moved / (hw.memory_rate * c.memory) + c.optimizer_s
    optimizer += muon_s(s, a, hw, c) if a.muon_steps else 0.0
    step = work + bubble + passed + w.data_s + optimizer
    rate = a.dp * a.microbatch * m * seq_len / step / a.gpus
    n = m * layers
    parts = {
        "matmul_s": n * sum(b.matmul) + m / a.pp * (sum(w.head) - w.bound - w.messages),
        "attention_s": n * sum(b.attention),
        "memory_bound_s": n * sum(b.memory) + m / a.pp * w.bound,
        "recompute_s": n * w.again,
        "tensor_s": n * 2 * b.tensor + m / a.pp * w.messages,
        "context_s": n * sum(b.context),
        "expert_s": n * 2 * b.expert,
        "data_s": w.data_s + n * (w.forward + w.backward - b.total(0) - b.total(1) - w.again),
    }
    other = step - sum(parts.values()) - bubble - passed - optimizer  # the host, where it is slower than the GPU
    mfu = [rate * s.flops_per_token(seq_len, causal) / (hw.peak_flops or hw.flops) for causal in (False, True)]
    parts |= {"bubble_s": bubble, "pipeline_s": passed, "optimizer_s": optimizer, "other_s": other}
    return Prediction(step, rate, *mfu, **parts)


def _data_parallel(
    s: Sizes, a: Layout, forward: float, backward: float, hw: Hardware, c: Constants, style: Style
) -> tuple[float, float, tuple[float, float]]:
    """(seconds once in a step, factor on a block's time, seconds more of a block forward and backward)."""
    shards, layers, bandwidth = a.dp_shard * a.cp, s.layers / a.pp, hw.memory_rate * c.memory
    dense = s.attention_parameters / a.tp + (0 if s.experts else s.expert_parameters / a.tp)
    sparse = s.expert_parameters / a.ep if s.experts else 0.0
    group, spread = Group.of(shards, a.tp, hw.gpus_per_node), Group.of(shards * a.tp // a.ep, a.ep, hw.gpus_per_node)
    matrix = s.vocab * s.dim / a.tp
    ends = matrix * (1 if a.pp > 1 or s.tied else 2)
    outer = Group.of(a.dp_replicate, a.tp * shards, hw.gpus_per_node)
    if not style.fsdp:
        held = layers * (dense + sparse) + ends
        added = style.accumulated_bytes * (dense + sparse) / bandwidth
        n = style.messages * layers
        once = message_s(style.gradient_bytes * held / shards, outer, hw, c, tree=True)
        once += message_s(4 * held, group, hw, c, messages=n)
        once = max(0.3 * once, once - 0.8 * layers * backward)  # behind the last backward
        once += message_s(2 * held, group, hw, c, messages=n)  # after the update
        return once + style.sync_s * math.log2(a.dp * a.cp), 1.0, (0.0, added)

    narrow = style.float8.gathered_parameters(s) if style.float8 else 0.0  # in a byte less

    def gather_and_reduce(bytes_each: float, less: float = 0.0) -> float:
        messages = message_s(bytes_each * dense - less, group, hw, c)
        return messages + (message_s(bytes_each * sparse, spread, hw, c) if sparse else 0.0)

    gather, reduce, wait = gather_and_reduce(2, narrow), gather_and_reduce(style.gradient_bytes), gather_and_reduce(0)
    # One shard, the whole, is cast into what is gathered (`dtron/compat/units.py`).
    gathered = GATHER * (dense + sparse) - 2 * narrow if shards > 1 else 0.0
    copied = (gathered + CAST * (dense + sparse) / shards) / bandwidth
    added = (REDUCE * (dense + sparse)) / bandwidth
    once, slower = message_s(2 * ends, group, hw, c) + message_s(style.gradient_bytes * ends, group, hw, c), 1.0
    if a.dp_replicate > 1:
        size = style.gradient_bytes * (dense + sparse) / shards  # behind the rest of the last backward, but for the end
        replicas = message_s(size, outer, hw, c, tree=True)
        once += replicas + message_s(style.gradient_bytes * ends / shards, outer, hw, c, tree=True)
        once += layers * max(0.0, replicas - max(0.0, backward - gather - reduce))
    if a.pp > 1:  # gathered before the first microbatch, reduced after the last
        once += layers * (copied + added) + 0.6 * layers * (gather + reduce)
        return once, slower, (0.0, style.accumulated_bytes * (dense + sparse) / bandwidth)
    if not a.reshard:
        exposed = 0.0, max(wait, reduce - backward) + added
        slower += c.overlap_tax * min(1.0, reduce / (forward + backward))
        return once + layers * (copied + gather * 0.6), slower, exposed
    exposed = max(wait, gather - forward) + copied, max(2 * wait, gather + reduce - backward) + copied + added
    slower += c.overlap_tax * min(1.0, (2 * gather + reduce) / (forward + backward))
    return once + gather, slower, exposed
