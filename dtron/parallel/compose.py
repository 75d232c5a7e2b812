"""The order in which the dimensions compose, and the only caller of the files beside this one.

    mesh -> meta model -> pipeline split -> converters -> experts -> tensor -> context -> recompute, compile -> FSDP
    -> init

The split comes first, so that no rank parallelises what it does not hold. Tensor parallel turns
parameters into DTensors, which FSDP then shards further. Recomputation by operation goes inside the
compiled region, where its policy is compiled with the block; of whole blocks outside, where it calls the
compiled block again (inside, with tensor parallel, torch raises). FSDP is last: it must see the
module that is really called.

To add a dimension: its degree and groups in `dtron/mesh.py`; a file beside this one with an `apply_...` function, which
`_parallelize_part` calls at its place in the order, and a `check_...` function with its constraints, which
`dtron/train/resolve.py` calls; its keys in `dtron/config/sections.py`; the features it is incompatible with in
`incompatible.py`; its layouts in `tests/parity/table.py`. The gradient norm, checkpoints and initial values read
placements, not layouts: they need no change if every parameter's mesh spans its pipeline stage.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import loss_parallel

from dtron import compat
from dtron.compat import tracing
from dtron.config.sections import Config
from dtron.mesh import Mesh
from dtron.models.flops import matmul_parameters
from dtron.models.loss import Kernel, torch_kernel
from dtron.models.spec import ModelConfig, ModelSpec, attended_tokens, layers_of, meta_model
from dtron.parallel.context import apply_context_parallel, apply_gathered_attention, compile_options, uses_masks
from dtron.parallel.data import (
    apply_data_parallel,
    free_gathered_weights,
    reduce_gradients_now,
    reshards_after_forward,
)
from dtron.parallel.expert import apply_expert_parallel
from dtron.parallel.loss import (
    ChunkedTokenMean,
    TokenLoss,
    TokenMean,
    chunked_head,
    plain_loss,
    return_hidden_states,
)
from dtron.parallel.materialize import initialize
from dtron.parallel.pipeline import Pipeline, StagePlan, hidden_states, keep_modules, plan_stages
from dtron.parallel.recompute import apply_recompute
from dtron.parallel.tensor import VocabParallelHead, apply_tensor_parallel, tied_parameters

__all__ = ["MetaParts", "ParallelModel", "materialize", "parallelize", "stage_plan", "wrap_on_meta"]

Converter = Callable[[nn.Module, Config], nn.Module]
LOAD = ".mlp.load"  # no parameter of the model: its gradient counts an experts' rows


@dataclass
class ParallelModel:
    """This rank's part of the model, ready to train.

    parts: one module without pipeline parallel, one per stage with it. aliases: names of second copies
    of tied parameters -> the first name, by which they are initialised and saved. gathered_keys: attention is to the
    gathered keys of all context ranks, so that every forward needs document_start and keys. keeps_weights: gathered
    weights are kept from a step's first forward to its last backward.
    """

    parts: list[nn.Module]
    pipeline: Pipeline | None
    loss: TokenMean
    aliases: dict[str, str]
    every_microbatch: bool
    sharded_loss: bool
    gathered_keys: bool = False
    keeps_weights: bool = False

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their names in the plain model; the second copy of a tied one under its own name."""
        for part in self.parts:
            for name, p in part.named_parameters():
                if not name.endswith(LOAD):
                    yield compat.clean_name(name), p

    def forward_backward(self, tokens: Tensor, labels: Tensor, *extra_inputs: Tensor, last: bool) -> Tensor:
        """Add the gradients of tokens [B, S / cp]; returns this rank's share of the loss.

        extra_inputs: positions, and where `local_batches` gives them document_start and keys, as `Llama.forward` takes
        them.
        last: the step's last batch.
        """
        with self._loss_context():
            if self.pipeline:
                return self.pipeline.forward_backward(tokens, labels, *extra_inputs)
            reduce_gradients_now(self.parts[0], self.every_microbatch, last, self.keeps_weights)
            with tracing.span("forward"):
                loss = self.loss(self.parts[0](tokens, *extra_inputs), labels)
            with tracing.span("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
        return plain_loss(loss)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor, *extra_inputs: Tensor) -> Tensor:
        """This rank's share of a batch's loss, without gradients and in eval mode: dropout is off."""
        with self._eval_mode(), self._loss_context():
            if self.pipeline:
                loss = self.pipeline.evaluate(tokens, labels, *extra_inputs)
            else:
                loss = plain_loss(self.loss(self.parts[0](tokens, *extra_inputs), labels))
        for part in self.parts:
            free_gathered_weights(part)
        return loss

    @contextlib.contextmanager
    def _eval_mode(self) -> Iterator[None]:
        for part in self.parts:
            part.eval()
        try:
            yield
        finally:
            for part in self.parts:
                part.train()

    def finish_gradients(self) -> None:
        """After a step's last backward: sum the gradients of the two copies of a tied matrix."""
        if self.pipeline and self.aliases:
            parameters = dict(self.named_parameters())
            for copy, first in self.aliases.items():
                self.pipeline.sum_tied_gradients(parameters.get(first), parameters.get(copy))

    def _loss_context(self) -> contextlib.AbstractContextManager[Any]:
        return loss_parallel() if self.sharded_loss else contextlib.nullcontext()


def stage_plan(spec: ModelSpec, model_config: ModelConfig, config: Config) -> StagePlan:
    """The pipeline split of a whole model by FLOPs per token; the look-up costs none."""
    model = meta_model(spec, model_config)
    blocks = [6 * matmul_parameters(block) for block in layers_of(model).values()]
    attended = attended_tokens(model_config, config.training.seq_len)
    costs = [cost + spec.attention_flops(model_config, n) for cost, n in zip(blocks, attended, strict=True)]
    head = 6 * matmul_parameters(model) - sum(blocks)
    return plan_stages(config.parallelism, model, costs, head, 0.0)


@dataclass(frozen=True)
class MetaParts:
    """This rank's part of a model, wrapped for the layout and without memory; plan: None without pipeline parallel.

    heads: that of the model, where it is here and the loss is made in chunks; the parts then return hidden states.
    """

    spec: ModelSpec
    model_config: ModelConfig
    config: Config
    mesh: Mesh
    token_loss: TokenLoss
    parts: list[nn.Module]
    heads: list[nn.Linear]
    plan: StagePlan | None
    aliases: dict[str, str]
    reshard: bool

    @property
    def sharded_loss(self) -> bool:
        """Whether the loss is given logits that are sharded over the vocabulary."""
        gathered = self.config.parallelism.disable_loss_parallel
        return self.mesh.degrees.tp > 1 and not gathered and not self.heads

    @property
    def gathered_keys(self) -> bool:
        """Whether context parallel gathers keys and values in place of the ring."""
        return self.mesh.degrees.cp > 1 and uses_masks(self.config, self.model_config)


def parallelize(
    spec: ModelSpec, model_config: ModelConfig, config: Config, mesh: Mesh, device: torch.device,
    token_loss: TokenLoss, converters: list[Converter],
) -> ParallelModel:  # fmt: skip
    """Build this rank's part of the model on `device` with its initial weights.

    token_loss: where it is `dtron.models.loss.cross_entropy`, and the model's head is known, it is made in chunks.
    """
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    model = materialize(wrap_on_meta(spec, model_config, config, mesh, token_loss, converters, memory), device)
    canonical = ((model.aliases.get(name, name), parameter) for name, parameter in model.named_parameters())
    initialize(canonical, lambda name: spec.init_std(name, model_config), config.debug.seed)
    return model


def wrap_on_meta(
    spec: ModelSpec, model_config: ModelConfig, config: Config, mesh: Mesh, token_loss: TokenLoss,
    converters: list[Converter], memory_bytes: int | None = None,
) -> MetaParts:  # fmt: skip
    """Everything up to FSDP, on meta: no memory is taken and no message sent. memory_bytes: of the GPU."""
    if config.compile.enable:
        compat.compile_without_autograd_cache()
        recompute = config.activation_checkpoint
        compat.set_memory_budget(recompute.memory_budget if recompute.mode == "memory_budget" else 1.0)
    whole = meta_model(spec, model_config)
    aliases = {copy: first for first, copy in tied_parameters(whole)}
    parameters = sum(p.numel() for p in whole.parameters())
    reshard = reshards_after_forward(config.parallelism, mesh, parameters, memory_bytes)
    plan = stage_plan(spec, model_config, config) if mesh.degrees.pp > 1 else None
    parts: list[nn.Module] = []
    meta = MetaParts(spec, model_config, config, mesh, token_loss, parts, [], plan, aliases, reshard)
    for stage in plan.of_rank[mesh.pp_rank] if plan else (None,):
        part = meta_model(spec, model_config)
        if plan and stage is not None:
            part = keep_modules(part, plan.modules[stage])
        for converter in converters:
            part = converter(part, config)
        parts.append(_parallelize_part(part, meta))
    return meta


def materialize(meta: MetaParts, device: torch.device) -> ParallelModel:
    """Give the parts memory on `device`, of undefined content, and a pipeline where there is one. Done once."""
    config, p, mesh = meta.config, meta.config.parallelism, meta.mesh
    loss = _mean_loss(meta, device)
    for part in meta.parts:
        part.to_empty(device="cpu" if config.training.enable_cpu_offload else device)
    pipeline = None
    if meta.plan:
        evaluated = config.validation.local_batch_size if config.validation.enable else config.training.local_batch_size
        trained = evaluated if config.validation.only else config.training.local_batch_size
        size = p.pipeline_parallel_microbatch_size
        microbatches = trained // size, evaluated // size
        hidden = hidden_states(meta.spec, meta.model_config, config, mesh)
        pipeline = Pipeline(meta.parts, meta.plan, p, mesh.pp, microbatches, device, loss, hidden)
    every_microbatch = p.gradient_reduce == "every_microbatch"
    return ParallelModel(
        meta.parts, pipeline, loss, meta.aliases, every_microbatch, meta.sharded_loss, meta.gathered_keys,
        keeps_weights=not meta.reshard,
    )  # fmt: skip


def _mean_loss(meta: MetaParts, device: torch.device) -> TokenMean:
    """The loss, compiled if it is to be."""
    c, (head, *_) = meta.config.compile, (*meta.heads, None)
    compiled = c.enable and "loss" in c.components
    if head is None or meta.spec.logits_variant is None:
        compile_loss = partial(torch.compile, backend=c.backend, fullgraph=True)
        return TokenMean(compile_loss(meta.token_loss) if compiled else meta.token_loss, device)
    kernel: Kernel = torch_kernel
    if meta.config.training.loss_kernel == "triton":
        from dtron.models.loss_triton import triton_kernel as kernel
    elif compiled:  # chunks are of at most two sizes, of which neither is worth a kernel for all sizes
        kernel = torch.compile(kernel, backend=c.backend, fullgraph=True, dynamic=False)
    variant, tokens = meta.spec.logits_variant(meta.model_config), meta.config.training.loss_chunk_tokens
    return ChunkedTokenMean(head, variant, tokens, kernel, device)


def _parallelize_part(part: nn.Module, meta: MetaParts) -> nn.Module:
    """Everything between the split and the initial values, on meta."""
    spec, config, mesh = meta.spec, meta.config, meta.mesh
    p, recompute = config.parallelism, config.activation_checkpoint
    compiled = config.compile.enable and "model" in config.compile.components
    apply_expert_parallel(part, mesh)
    head = chunked_head(part, config, spec, meta.token_loss)
    if head is not None:
        return_hidden_states(part, head)
        meta.heads.append(head)
    if mesh.degrees.tp > 1:
        assert spec.tensor_plan is not None
        of_head = {} if head is None else {"lm_head": VocabParallelHead()}
        apply_tensor_parallel(part, mesh.tp, {**spec.tensor_plan(meta.sharded_loss), **of_head})
    if mesh.cp is not None:
        if meta.gathered_keys:
            apply_gathered_attention(part, mesh.cp)
        else:
            head_tail = bool(p.context_parallel_load_balancer)
            apply_context_parallel(part, mesh.cp, p.context_parallel_rotate_method, head_tail, compiled)
    if p.enable_async_tensor_parallel:
        compat.enable_async_tensor_parallel(mesh.tp)
    wrap = partial(apply_recompute, mode=recompute.mode, option=recompute.selective_ac_option)
    by_operation = recompute.mode == "selective" and recompute.selective_ac_option == "op"
    options = compile_options(config.compile.backend) if mesh.cp is not None else None
    layers = layers_of(part)
    for name, block in layers.items():
        block = wrap(block, int(name)) if by_operation else block
        if compiled:
            block.compile(fullgraph=True, backend=config.compile.backend, options=options)
        layers[name] = block if by_operation else wrap(block, int(name))
    dtype = getattr(torch, config.training.mixed_precision_param)
    apply_data_parallel(part, mesh.fsdp, dtype, meta.reshard, config.training.enable_cpu_offload, mesh.expert_fsdp)
    return part
