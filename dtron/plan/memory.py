"""The peak of memory in closed form, in microseconds: for ranking layouts, of which the best are then recorded.

The most of three moments (bf16 compute, fp32 weights and reductions, AdamW, CUDA's operators):

* the loss, when all activations are kept and the logits of a chunk exist;
* the backward of a block, with what it recomputes, its weights and gradients, and the last reduction's input;
* the end, when the gradients of the last unit are reduced.

Letters as in the models: E hidden size, F of the feed-forward, H and K heads, D head size, V vocabulary, T tokens.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from dtron.plan.layout import Layout, Sizes, in_flight, layers_per_stage
from dtron.plan.schedule import stages_of

__all__ = ["FRAGMENTATION", "Memory", "beside_allocator", "block_bytes_per_token", "budget_shares", "closed_form_peak"]

BF16, FP32 = 2, 4
EXPERT_ROWS = 11  # bytes for each value of a routed row in its backward; from one recorded layout with ep and tp
CHUNK_LOGITS = BF16 + FP32  # bytes for each logit of a chunk of the loss
LOGITS = 12  # of each where the loss is given all: in bf16, fp32 and twice more in its backward
SHARDED_LOGITS = 16  # with tensor parallel, one fp32 copy more
# `budget_shares` of some budgets, with a straight line between them: the middle of compiled dry runs of llama3 (two
# shapes), qwen3, starcoder2 and gemma2, TP: with tensor parallel. Above the last budget all is taken to be kept.
BUDGETS = (0.0, 0.25, 0.5, 0.75, 0.9)
KEPT_OF_BUDGET, AGAIN = (0.0, 0.38, 0.80, 1.0, 1.0), (0.65, 0.45, 0.23, 0.0, 0.0)
KEPT_OF_BUDGET_TP, AGAIN_TP = (0.0, 0.73, 0.97, 1.0, 1.07), (0.65, 0.37, 0.20, 0.19, 0.0)
# What a GPU holds besides. The CUDA context, about. Workspaces of cuBLAS and cublasLt, 32 MiB each on Hopper, 8 before
# (getChosenWorkspaceSize in aten/src/ATen/cuda/CublasHandlePool.cpp). NCCL's buffers of a communicator in use, as
# measured on 4 A100s with more than two ranks (github.com/NVIDIA/nccl/issues/964), and of one with an all-to-all, on 8
# H100s (issues/1685); they grow with NCCL's channels.
CONTEXT, WORKSPACES, COMMUNICATOR, ALL_TO_ALL = 0.5 * 2**30, 64 * 2**20, 688 * 2**20, 3.3 * 2**30
# What the caching allocator reserves beyond a peak that is not recorded, as a share of it: 0.11 for Llama 3 8B on 64
# ranks, 0.08 to 0.24 for smaller models, by the model of it.
FRAGMENTATION = 0.12


def beside_allocator(layout: Layout) -> float:
    """Bytes that a GPU holds besides what the caching allocator reserves."""
    a = layout
    dimensions = sum(degree > 1 for degree in (a.pp, a.dp_replicate, a.dp_shard * a.cp, a.cp, a.tp, a.gpus))
    return CONTEXT + WORKSPACES + COMMUNICATOR * dimensions + (ALL_TO_ALL if a.ep > 1 else 0)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak; moment: loss, block or end. The rest says what there is at any moment."""

    peak: float
    moment: str
    state: float
    gradients: float
    activations: float
    gathered: float
    logits: float
    receive: float

    def parts(self) -> dict[str, float]:
        """Bytes that add up to the peak, by name."""
        logits = self.logits if self.moment == "loss" else 0.0
        parts = {"state": self.state, "gradients": self.gradients, "activations": self.activations}
        parts |= {"gathered": self.gathered, "logits": logits, "receive": self.receive}
        return parts | {"working memory": self.peak - sum(parts.values())}

    def largest_part(self) -> tuple[str, float]:
        """Its name, and bytes."""
        parts = {"parameters and optimizer state": self.state, "gradients": self.gradients}
        parts |= {"activations": self.activations, "gathered weights": self.gathered}
        parts |= {"logits": self.logits, "receive buffers": self.receive}
        return max(parts.items(), key=lambda part: part[1])


@cache
def block_bytes_per_token(
    s: Sizes, tp: int, recompute: str, budget: float = 1.0, compiled: bool = False
) -> tuple[float, float]:
    """(kept from forward to backward, made again in the backward) by one block, in bytes per token of the rank."""
    whole, by_operation = _llama_block(s, tp)
    if s.block:  # what another block holds besides is split by tp
        known = _llama_block(replace(s, experts=0), 1)
        whole, by_operation = whole + (s.block.none - known[0]) / tp, by_operation + (s.block.op - known[1]) / tp
    x = BF16 * s.dim / tp
    # Compiled, the gate's activation is made again from its input.
    gate = BF16 * s.ffn / tp if compiled and s.matrices == 3 and not s.experts else 0.0
    if recompute == "budget" and budget <= BUDGETS[-1]:
        # Beside what recompute by operation keeps, both norms' outputs as the products take them, in place of inputs.
        most = min(whole - gate, by_operation + 2 * BF16 * s.dim - (2 if tp > 1 else 1) * x)
        kept_of_it = min(whole - gate, x + (most - x) * budget_shares(budget, tp)[0])
        return kept_of_it, whole - kept_of_it
    everything = whole - gate
    kept = {"none": everything, "op": by_operation, "full": x, "second": (everything + x) / 2, "budget": everything}
    again = {"none": gate, "op": whole - by_operation, "full": whole - x, "second": whole - x, "budget": gate}
    return kept[recompute], again[recompute]


@cache
def budget_shares(budget: float, tp: int) -> tuple[float, float]:
    """Of a compiled block under a memory budget: what it keeps of what it keeps under 0.9, without its input, and the
    share of its forward's matmuls and attention that its backward computes again.
    """
    kept, again = (KEPT_OF_BUDGET, AGAIN) if tp == 1 else (KEPT_OF_BUDGET_TP, AGAIN_TP)
    return float(np.interp(budget, BUDGETS, kept)), float(np.interp(budget, BUDGETS, again))


def _llama_block(s: Sizes, tp: int) -> tuple[float, float]:
    """Bytes per token kept by one of Llama's blocks, with a gate or without: all of it, and recomputed by operation."""
    heads, x = s.heads / tp, BF16 * s.dim / tp
    qkv, out = BF16 * (s.heads + 2 * s.kv_heads) * s.head_size / tp, BF16 * s.heads * s.head_size / tp
    lse, norms = FP32 * heads, 2 * FP32 / tp
    gathered = BF16 * s.dim  # a norm's output; with sequence parallel gathered for the projections
    if s.experts:  # rows are not gathered: each rank of tp routes its own tokens
        rows = s.top_k / tp
        ffn = rows * (6 * s.dim + 8 * s.ffn + 50) + (FP32 * s.dim + 3 * FP32 * s.experts + BF16 * s.dim) / tp
        ffn_op = rows * (6 * s.dim + 4 * s.ffn + 50)
        ffn += 4 * BF16 * s.shared / tp
        ffn_op += 2 * BF16 * s.shared / tp
    else:
        ffn, ffn_op = gathered + 4 * BF16 * s.ffn / tp, 2 * BF16 * s.ffn / tp
    scattered = 2 * x if tp > 1 else 0.0
    return 2 * x + gathered + qkv + out + lse + norms + ffn, x + qkv + out + lse + ffn_op + scattered


def closed_form_peak(s: Sizes, layout: Layout, seq_len: int) -> Memory:
    """Of the rank that holds most: pipeline ranks differ, and the first, second and last are looked at."""
    ranks = {0, min(1, layout.pp - 1), layout.pp - 1}
    return max((_of_rank(s, layout, seq_len, rank) for rank in ranks), key=lambda memory: memory.peak)


def _loss_bytes(s: Sizes, a: Layout, tokens: int) -> tuple[float, float]:
    """(most that the loss of a microbatch holds, what is kept of it between its forward and its backward)."""
    vocab, hidden = s.vocab / a.tp, BF16 * s.dim * tokens
    if not a.loss_chunk:
        most = ((SHARDED_LOGITS if a.tp > 1 else LOGITS) + s.scaled_logits[0]) * tokens * vocab
        return most, (BF16 + FP32) * tokens * vocab
    rows, matrix = -(-tokens // -(-tokens // a.loss_chunk)), vocab * s.dim
    # The head's gradient in fp32, and beside it a chunk or, at the end, the same gradient in bf16.
    most = FP32 * matrix + max((CHUNK_LOGITS + s.scaled_logits[1]) * rows * vocab, BF16 * matrix)
    return most + hidden * (2 if a.tp > 1 else 1), hidden + BF16 * matrix


def _state_bytes(a: Layout, local: float, outer: float) -> float:
    """Of so many parameters, `outer` of them outside of blocks, and AdamW's moments; Muon has one of a block's."""
    moment = FP32 if a.state_dtype == "float32" else BF16
    return local * (FP32 + 2.0 * moment) - (moment * (local - outer) if a.muon_steps else 0.0)


def _of_rank(s: Sizes, a: Layout, seq_len: int, rank: int) -> Memory:
    """Of pipeline rank `rank`."""
    tp, shards, tokens = a.tp, a.dp_shard * a.cp, a.tokens(seq_len)
    reshard = a.reshard
    n_stages = a.pp * a.virtual
    split = layers_per_stage(s, seq_len, n_stages)
    stages = stages_of(a.schedule, a.pp, n_stages)[rank]
    first, last = 0 in stages, n_stages - 1 in stages
    layers = sum(split[stage] for stage in stages)
    # Parameters of one tensor rank, whole over the shards; experts are split by ep, not by tp.
    dense = s.attention_parameters / tp + s.other_parameters
    ffn = s.expert_parameters / (a.ep if s.experts else tp)
    block = dense + ffn
    matrix = s.vocab * s.dim / tp
    outer = matrix * (first + last - (s.tied and first and last))
    local = (layers * dense + outer) / shards + layers * ffn / (shards * tp / a.ep if s.experts else shards)
    state = _state_bytes(a, local, outer / shards)

    kept, again = block_bytes_per_token(s, tp, a.recompute, a.memory_budget, a.compiled)
    if a.compiled and a.cp > 1 and a.recompute in ("none", "budget"):
        kept += 3 * BF16 * s.dim / tp  # the compiler splits blocks at the ring, and keeps what passes there
    live = in_flight(a, rank)
    hidden = BF16 * s.dim * tokens / tp
    activations = live * layers / a.virtual * kept * tokens + 2 * hidden * last + tokens * (4 * s.head_size + 16)
    again *= tokens
    receive = 0.0
    logits, kept_of_loss = _loss_bytes(s, a, tokens) if last else (0.0, 0.0)
    head = BF16 * matrix if last else 0.0
    unsharded = layers * block + outer
    if a.pp > 1:
        passed = sum((stage > 0) + (stage < n_stages - 1) for stage in stages)
        receive = passed * hidden * a.microbatches
        activations -= live * hidden * (not first or a.virtual > 1)  # received inputs are the first blocks' inputs
        gathered, gradients = BF16 * unsharded, FP32 * unsharded
        # The stage keeps the output of the microbatch before, logits or hidden states, and more of those in flight.
        output = (hidden if a.loss_chunk else BF16 * tokens * s.vocab / tp) * last
        waiting = output * (a.microbatches > 1) + kept_of_loss * (max(1, live // a.virtual) - 1)
        held_at_loss, held_at_block, prefetched = 0.0, 0.0, 0.0
    else:
        gathered = head + (BF16 * matrix if s.tied and not last else 0.0)
        gathered += 0.0 if reshard else BF16 * (layers * block + (0 if s.tied else matrix))
        gradients = FP32 * local if a.microbatches > 1 else 0.0
        waiting = 0.0
        held_at_loss = FP32 * matrix if a.microbatches > 1 else 0.0
        held_at_block = 0.0 if s.tied else FP32 * matrix
        prefetched = BF16 * block if reshard and layers > 1 else 0.0
    fixed = state + receive + waiting
    loss = fixed + activations + gathered + gradients + held_at_loss + logits
    # A block's backward: its own gathered weights and gradients, the next one's weights, temporaries of SwiGLU.
    own = (BF16 * block if reshard and a.pp == 1 else 0.0) + prefetched + BF16 * block
    rows = tokens * (s.top_k / tp if s.experts else 1 / tp)
    temporary = 3 * BF16 * s.ffn * rows
    if s.block:
        temporary = max(temporary, s.block.temporary * tokens / tp)
    if s.experts:
        temporary += EXPERT_ROWS * s.dim * rows
    ring = tokens * (8 * s.heads + 2 * BF16 * s.kv_heads * a.cp) * s.head_size / tp if a.cp > 1 else 0.0
    without_head = gathered - (head if a.pp == 1 and not s.tied else 0.0)
    inside = fixed + again + own + max(temporary, ring) + without_head
    one_less = activations * (1 - 1 / max(1, layers))
    if a.pp == 1:
        block_peak = inside + gradients + max(activations + held_at_block, one_less + FP32 * block)
    elif a.microbatches * a.virtual > live:
        block_peak = inside + gradients + activations
    else:  # all forwards come before the first backward, when there are no gradients
        block_peak = inside + max(activations, activations * (1 - 1 / live) + gradients)
        loss -= gradients * last
    # FSDP reduces from another buffer, where there is a shard group of more than one.
    buffers = int(shards > 1 or (s.experts > 0 and shards * tp > a.ep))
    largest = max(block, matrix if first or last else 0.0)
    end = fixed + max(gradients, FP32 * local) + (BF16 + FP32 * buffers) * largest + (FP32 * block if a.pp == 1 else 0)
    if a.pp > 1:
        end = fixed + gradients + FP32 * buffers * largest + FP32 * local
    elif not reshard:  # all is gathered until the end
        end = fixed + max(gradients, FP32 * local) + FP32 * buffers * largest + gathered
    peak, moment = max((loss, "loss"), (block_peak, "block"), (end, "end"))
    return Memory(peak, moment, state, gradients, activations, gathered, logits, receive)
