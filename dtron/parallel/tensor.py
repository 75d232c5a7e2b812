"""Tensor parallel: every matrix split over the `tp` ranks, with sequence and loss parallel.

Between blocks the activations are sharded along the sequence (Shard(1)), so that norms and residuals
are computed once (Korthikanti et al. 2022, arXiv 2205.05198). Attention and feed-forward gather the
sequence, split heads and columns, and reduce-scatter back. The embedding and the head are sharded along the
vocabulary's rows, and the cross-entropy is computed without gathering the logits: in chunks (`VocabParallelHead`), or,
of a loss that is given logits, by torch's `loss_parallel`.
"""

import fnmatch
import math
from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from dtron.config.sections import Config
from dtron.errors import UserError
from dtron.mesh import Degrees
from dtron.models.loss import VocabularyShard
from dtron.models.spec import ModelConfig, ModelSpec
from dtron.models.variants import XIELU, NormOfHeads, NormPerHead
from dtron.parallel.expert import FeedForwardInput, LocalRouter
from dtron.parallel.forwards import replace_forward

__all__ = [
    "VocabParallelEmbedding", "VocabParallelHead", "apply_tensor_parallel", "check_tensor", "llama_plan",
    "tied_parameters", "vocabulary_shard", "whole_sequence",
]  # fmt: skip

SEQUENCE, VOCABULARY = Shard(1), Shard(-1)
ACTIVATION_GRADIENT = Partial()  # each rank's hidden values give a part of it
SHARD_GRADIENT = Partial()  # each rank's rows of the head give a part of it


class VocabParallelEmbedding(ParallelStyle):
    """Sharded along the vocabulary; each rank looks up its own rows, the sum is reduce-scattered along the sequence.

    Unlike RowwiseParallel, whose gradient is a replicated full-vocabulary matrix (7.8 GiB instead of
    1 at 405B with tp 8), the gradient here is that of the rank's own rows. The output is a plain, finished tensor:
    an asynchronous one loses its autograd history on entering a compiled block (torch 2.13), and with FSDP the
    embedding's gradient would be silently zero.
    """

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        weight = distribute_tensor(module.weight, mesh, [Shard(0)], src_data_rank=None)  # type: ignore[arg-type]
        module.weight = nn.Parameter(weight)
        module.forward = partial(self._look_up, module, mesh)
        return module

    @staticmethod
    def _look_up(module: nn.Module, mesh: DeviceMesh, tokens: Tensor) -> Tensor:
        rows = module.weight.to_local()  # type: ignore[union-attr,operator]  # [V / tp, E]
        local = tokens - mesh.get_local_rank() * rows.size(0)  # [B, S]
        mine = (local >= 0) & (local < rows.size(0))
        out = F.embedding(local.clamp(0, rows.size(0) - 1), rows) * mine.unsqueeze(-1)  # [B, S, E], to be summed
        partial_sums = DTensor.from_local(out, mesh, [Partial()], run_check=False)
        return partial_sums.redistribute(placements=[SEQUENCE]).to_local()  # [B, S / tp, E]


class VocabParallelHead(ParallelStyle):
    """The head where the loss is made in chunks: sharded along the vocabulary, and multiplied by the loss itself."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, p in list(module.named_parameters()):
            rows = distribute_tensor(p, mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(rows))
        return module


def whole_sequence(hidden: Tensor, mesh: DeviceMesh) -> Tensor:
    """Hidden states [B, S, E] before the head, of the ranks' [B, S / tp, E].

    Each rank multiplies them by its own rows of the head, so the gradient that comes back is a part of theirs.
    """
    if not isinstance(hidden, DTensor):
        hidden = DTensor.from_local(hidden, mesh, [SEQUENCE], run_check=False)
    return hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[SHARD_GRADIENT])


def vocabulary_shard(weight: DTensor) -> VocabularyShard:
    """This rank's rows of a head, and how the shards add up the numbers of a chunk of logits."""
    group, rank = weight.device_mesh.get_group(), weight.device_mesh.get_local_rank()
    maximum, total = (partial(_all_reduced, op, group) for op in (dist.ReduceOp.MAX, dist.ReduceOp.SUM))
    return VocabularyShard(rank * weight.to_local().size(0), maximum, total)


def _all_reduced(op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup, numbers: Tensor) -> Tensor:
    dist.all_reduce(numbers, op, group)
    return numbers


class QueryKeyNorm(ParallelStyle):
    """The norm of queries or keys, whose heads are split over the ranks.

    Per head [B, S, H / tp, D]: each rank normalises its own, and the gradients of the weights are summed; where each
    head has its own weights they are sharded as the heads are. Over all heads [B, S, H * D / tp]: so are they, and the
    sums of squares are added over the ranks.
    """

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, NormOfHeads | NormPerHead):
            return SequenceParallel(sequence_dim=2, use_local_output=True)._apply(module, mesh)
        module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)], src_data_rank=None))
        replace_forward(module, _norm_of_heads if isinstance(module, NormOfHeads) else _norm_per_head)
        return module


def _norm_of_heads(module: NormOfHeads, x: Tensor) -> Tensor:
    weight, local = cast(DTensor, module.weight), x.float()  # [B, S, H * D / tp]
    squares = DTensor.from_local(local.square().sum(-1, keepdim=True), weight.device_mesh, [Partial()], run_check=False)
    # Every rank uses the sum for its own heads, so the gradients by it add up over the ranks.
    whole = squares.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    assert module.eps is not None
    normal = (local * torch.rsqrt(whole / module.normalized_shape[0] + module.eps)).type_as(x)
    return normal * weight.to_local()


def _norm_per_head(module: NormPerHead, x: Tensor) -> Tensor:
    return module.normalise(x, cast(DTensor, module.weight).to_local())


class SinksOfHeads(ParallelStyle):
    """Attention sinks, sharded as the heads are."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        weight = distribute_tensor(module.weight, mesh, [Shard(0)], src_data_rank=None)  # type: ignore[arg-type]
        module.weight = nn.Parameter(weight)
        replace_forward(module, _local_weight)
        return module


def _local_weight(module: nn.Module) -> Tensor:
    return cast(DTensor, module.weight).to_local()


class LearnedActivation(ParallelStyle):
    """Numbers that all hidden values share: each rank has a part of these, so the gradients are summed."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, XIELU)
        for name, p in list(module.named_parameters()):
            whole = distribute_tensor(p.detach(), mesh, [Replicate()], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(whole))
        replace_forward(module, _learned_activation)
        return module


def _learned_activation(module: XIELU, x: Tensor) -> Tensor:
    alphas = [cast(DTensor, p) for p in (module.alpha_p, module.alpha_n)]
    return module.of(x, *(p.to_local(grad_placements=[ACTIVATION_GRADIENT]) for p in alphas))


def llama_plan(loss_parallel: bool) -> dict[str, ParallelStyle]:
    """Module names (with wildcards) -> styles for dtron.models.llama; those that match nothing are ignored."""
    gather = partial(PrepareModuleInput, input_layouts=(SEQUENCE,), desired_input_layouts=(Replicate(),))
    head_layout = VOCABULARY if loss_parallel else Replicate()
    added = SequenceParallel(use_local_output=True)  # a norm of what is added to the residual stream, a plain tensor
    return {
        "embed_tokens": VocabParallelEmbedding(),
        "layers.*.input_layernorm": SequenceParallel(),
        "layers.*.self_attn": PrepareModuleInput(
            input_layouts=(SEQUENCE, None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "layers.*.self_attn.q_proj": ColwiseParallel(),
        "layers.*.self_attn.k_proj": ColwiseParallel(),
        "layers.*.self_attn.v_proj": ColwiseParallel(),
        "layers.*.self_attn.q_norm": QueryKeyNorm(),
        "layers.*.self_attn.k_norm": QueryKeyNorm(),
        "layers.*.self_attn.sinks": SinksOfHeads(),
        "layers.*.self_attn.o_proj": RowwiseParallel(output_layouts=SEQUENCE),
        "layers.*.post_attention_layernorm": added,
        "layers.*.pre_feedforward_layernorm": SequenceParallel(),
        "layers.*.post_feedforward_layernorm": added,
        "layers.*.mlp": FeedForwardInput(),
        "layers.*.mlp.gate_proj": ColwiseParallel(),
        "layers.*.mlp.up_proj": ColwiseParallel(),
        "layers.*.mlp.down_proj": RowwiseParallel(output_layouts=SEQUENCE),
        "layers.*.mlp.act_fn": LearnedActivation(),
        "layers.*.mlp.gate": LocalRouter(),
        "layers.*.mlp.shared_experts": gather(),
        "layers.*.mlp.shared_experts.gate_proj": ColwiseParallel(),
        "layers.*.mlp.shared_experts.up_proj": ColwiseParallel(),
        "layers.*.mlp.shared_experts.down_proj": RowwiseParallel(output_layouts=SEQUENCE),
        "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(
            input_layouts=SEQUENCE, output_layouts=head_layout, use_local_output=not loss_parallel
        ),
    }


def apply_tensor_parallel(model: nn.Module, tp: DeviceMesh, plan: Mapping[str, ParallelStyle]) -> None:
    """Shard a meta model's parameters by `plan`; tied weights stay tied. UserError for a parameter that is left out.

    A parameter outside the plan would be a plain tensor next to sharded ones, with the gradient of this
    rank's part of the sequence only: silently wrong, hence the error.
    """
    tied = tied_parameters(model)
    with torch.no_grad():
        parallelize_module(model, tp, _present(model, plan))
    for first, second in tied:
        _set_parameter(model, second, model.get_parameter(first))
    plain = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if left_out := [name for name in plain if model.get_parameter(name).requires_grad]:
        raise UserError(
            f"the tensor-parallel plan leaves out {', '.join(left_out)}; every parameter that is trained needs an "
            "entry: SequenceParallel for a norm between the matrices, whose gradient is then summed over the tp ranks"
        )


def _present(model: nn.Module, plan: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The plan by the names of this model's, or stage's, modules: torch warns of patterns that fit only some."""
    names = [name for name, _ in model.named_modules()]
    return {name: style for pattern, style in plan.items() for name in fnmatch.filter(names, pattern)}


def tied_parameters(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names of the same parameter."""
    first: dict[int, str] = {}
    pairs = []
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in first:
            pairs.append((first[id(p)], name))
        first.setdefault(id(p), name)
    return pairs


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)


def check_tensor(c: Config, spec: ModelSpec, m: ModelConfig, d: Degrees) -> None:
    """UserError unless the model has a tensor-parallel plan and the degree divides what the plan splits."""
    if d.tp == 1:
        return
    if spec.tensor_plan is None:
        raise UserError(f"model.name {c.model.name} has no tensor-parallel plan; set tensor_parallel_degree 1")
    sizes = {"n_heads": m.n_heads, "n_kv_heads": m.n_kv_heads, "vocab_size": m.vocab_size}
    if ffn_dim := getattr(m, "ffn_dim", None):
        sizes["ffn_dim"] = ffn_dim
    for name, size in sizes.items():
        if size % d.tp:
            raise UserError(
                f"tensor_parallel_degree {d.tp} does not divide model.{name} {size}; "
                f"degrees that do: {', '.join(str(t) for t in range(1, 129) if size % t == 0)}"
                f"{_larger_vocabulary(size, d.tp) if name == 'vocab_size' else ''}"
            )


def _larger_vocabulary(size: int, tp: int) -> str:
    """GPT-2's 50257 tokens, for one, are usually given 50304 rows: a multiple of 64, which kernels like too."""
    step = math.lcm(64, tp)
    return f"; or set model.vocab_size {-(-size // step) * step}: rows beyond the tokenizer's are allowed and usual"
