"""One optimizer step of any rank of any world, without its memory, its GPUs or the other ranks.

The step is the trainer's own: the model that `wrap_on_meta` and `materialize` make, the optimizers, the guard and
`Step`, on tensors that have shapes and no values (FakeTensorMode), in a process group whose collectives end at once.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dtron import registry
from dtron.checkpoint.files import Progress
from dtron.checkpoint.load import create_state
from dtron.compat import planning
from dtron.config import Config, replace
from dtron.data.loader import Batch
from dtron.errors import UserError
from dtron.mesh import Mesh
from dtron.models.spec import experts_of, layers_of
from dtron.optim.adamw import AdamW, first_chunk
from dtron.parallel.compose import materialize, wrap_on_meta
from dtron.parallel.incompatible import FEATURES
from dtron.plan.cuda_attention import flex_attention_stand_in
from dtron.plan.record import StepRecord
from dtron.plan.recorder import Recorder
from dtron.plan.replay import Replay, UnlikeError
from dtron.plan.taps import tap
from dtron.plan.timeline import reserve, timeline
from dtron.train.balance import Balance
from dtron.train.guard import StepGuard
from dtron.train.optimizer import build_optimizers
from dtron.train.resolve import check_batch
from dtron.train.setup import Setup
from dtron.train.step import Step
from dtron.train.tally import Tally

__all__ = ["build_step", "check_known", "dry_run", "dry_run_stages", "fake_batch", "host_value", "shortened"]

CPU = torch.device("cpu")
# What fake tensors can run: the graphs, decompositions and choice of saved tensors of inductor, without its kernels.
COMPILED = "aot_eager_decomp_partition"
# Microbatches of a dry run: without a pipeline so many, with one so many for each of its ranks. Later ones find what
# those found, but for their rows of the batch and what they are received into, which is added.
RECORDED, RECORDED_ROUNDS = 3, 4


Look = Callable[[Step, Recorder], None]


def dry_run(
    setup: Setup, rank: int, *, gloo: bool = False, replay: bool = True,
    recorder_type: type[Recorder] = Recorder, look: Look = lambda step, recorder: None,
) -> StepRecord:  # fmt: skip
    """Record the steady step of `rank` in the world of `setup`. Needs a process without a process group.

    gloo: count what gloo and a CPU hold besides: copies that operators work in, saved states of the random numbers, and
    what RMSNorm keeps where it is not one operator.
    replay: record blocks that are alike once (`replay.py`), where that is possible. look: called after the step, in the
    world of `setup`, with the step and what recorded it. Experts are taken to be in balance,
    documents to be whole sequences. What is compiled runs with the backend `COMPILED`. UserError for what a dry run
    does not know, see `check_known`.
    """
    check_known(setup.config)
    if replay and _can_replay(setup.config):
        try:
            return _dry_run(setup, rank, gloo, True, recorder_type, look)
        except Exception as error:  # a pipeline raises another one from it
            if not _is_unlike(error):
                raise
    return _dry_run(setup, rank, gloo, False, recorder_type, look)


def shortened(setup: Setup) -> tuple[Setup, int]:
    """The run with no more microbatches than a dry run needs, in one pass of a pipeline; how many those are.

    A schedule in a CSV file keeps its own number.
    """
    c, d = setup.config, setup.degrees
    p, local = c.parallelism, c.training.local_batch_size
    if d.pp == 1:
        recorded = min(check_batch(c, d, c.training.global_batch_size) // d.dp // local, RECORDED)
        c = replace(c, "training.global_batch_size", recorded * local * d.dp)
        return dataclasses.replace(setup, config=c), recorded
    size = p.pipeline_parallel_microbatch_size
    recorded = local // size if p.pipeline_parallel_schedule_csv else min(local // size, RECORDED_ROUNDS * d.pp)
    c = replace(replace(c, "training.local_batch_size", recorded * size), "training.global_batch_size", -1)
    return dataclasses.replace(setup, config=c), recorded


def check_known(config: Config) -> None:
    """UserError for what neither dry runs nor the closed forms know."""
    if config.training.enable_cpu_offload:
        raise UserError(
            "the planner does not know training.enable_cpu_offload, whose speed is that of the host's cores and "
            "memory; set it false"
        )


def dry_run_stages(setup: Setup) -> list[StepRecord]:
    """Record one rank of each pipeline rank's stages."""
    return [dry_run(setup, pp_rank * setup.degrees.stage) for pp_rank in range(setup.degrees.pp)]


def _is_unlike(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, UnlikeError) or _is_unlike(error.__cause__))


def _can_replay(c: Config) -> bool:
    """Not where backwards are split, nor where gradients are added up in place, from the second microbatch on."""
    return not FEATURES["zero-bubble schedule"](c) and c.training.mixed_precision_param != "float32"


def _dry_run(
    setup: Setup, rank: int, gloo: bool, replay: bool, recorder_type: type[Recorder], look: Look
) -> StepRecord:
    if setup.config.compile.enable:
        # What was compiled for another run would be taken for this one's, whatever its memory budget; and of another
        # number of tokens, Dynamo would compile a version for any number, which no run of one shape has.
        torch.compiler.reset()
    fake = planning.FakeTensorMode(allow_non_fake_inputs=True)
    world = planning.fake_world(rank, setup.degrees.world)
    with world, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # marks of `replay.py`
        if not gloo:
            stack.enter_context(planning.fused_norms())
            stack.enter_context(flex_attention_stand_in())
        recorder = recorder_type(host_value(setup), gloo)

        @contextlib.contextmanager
        def recorded() -> Iterator[None]:
            with fake, recorder:
                yield

        step = build_step(setup, recorded)
        recorder.groups = _dimensions(step.mesh)
        for optimizer in step.optimizers:
            if isinstance(optimizer, AdamW) and not gloo:
                optimizer.update = first_chunk  # a CPU's chunks would be 120,000 for 8B parameters
        with recorded():
            record = _record(setup, rank, step, recorder, replay)
        look(step, recorder)
        return record


def _record(setup: Setup, rank: int, step: Step, recorder: Recorder, replay: bool) -> StepRecord:
    """Record the step from a state in which the optimizer has its own, as all steps but the first find it."""
    model = step.model
    recorder.tag((p for _, p in model.named_parameters()), "parameters")
    made = len(recorder.events)
    for optimizer in step.optimizers:
        create_state(optimizer)
        state = (value for values in optimizer.state.values() for value in values.values())
        recorder.tag((value for value in state if isinstance(value, Tensor)), "optimizer state")
    for part in model.parts:
        planning.name_units(part)
    replays = _tap_modules(step, recorder, replay)
    batch = fake_batch(step, setup)
    recorder.tag((t for t in batch if t is not None), "batch")
    before = len(recorder.events)
    recorder.messages.clear()
    recorder.flops.clear()
    step(batch)
    for part in model.parts:
        recorder.tag(planning.fsdp_gathered(part), "gathered weights")
    if model.pipeline:
        recorder.tag(planning.received(model.pipeline._train), "receive buffers")
    return StepRecord(
        layout=str(setup.degrees),
        rank=rank,
        world=setup.degrees.world,
        stages=model.pipeline.indices if model.pipeline else (0,),
        peak=recorder.peak(before),
        start_bytes=recorder.level(before),
        collectives=recorder.collectives(),
        flops=dict(recorder.flops),
        replayed=sum(part.replayed for part in replays),
        timeline=timeline(recorder, before),
        reserved=reserve(recorder, made, before, recorder.computed),
    )


def build_step(setup: Setup, mode: Callable[[], contextlib.AbstractContextManager[Any]]) -> Step:
    """The step of this rank of a started process group; weights have undefined content.

    mode: makes the context in which memory is taken.
    """
    c = replace(setup.config, "training.loss_kernel", "torch")
    if c.compile.enable:
        # Not the loss: inductor makes one kernel of it, where this backend would hold a chunk's logits three times in
        # fp32, and eager does once.
        c = replace(c, "compile.components", [part for part in c.compile.components if part != "loss"])
        c = replace(c, "compile.backend", COMPILED)
    c = replace(c, "training.global_batch_size", check_batch(c, setup.degrees, c.training.global_batch_size))
    experts = experts_of(setup.model_config)
    mesh = Mesh(setup.degrees, "cpu", experts is not None)
    converters = [registry.look_up("converter", name, "model.converters") for name in c.model.converters]
    loss = registry.look_up("loss", c.training.loss, "training.loss")
    # DeviceMesh reads values of tensors of its own, so what makes meshes stays outside of the mode.
    meta = wrap_on_meta(setup.spec, setup.model_config, c, mesh, loss, converters)
    with mode():
        model = materialize(meta, CPU)
        optimizers = build_optimizers(model, c.optimizer)
        progress = Progress()
        guard = StepGuard(c.training, optimizers, progress, CPU)
        balance = Balance(model, c, experts, setup.model_config.n_layers, CPU) if experts else None
        return Step(c, mesh, CPU, model, optimizers, guard, progress, Tally(CPU), balance)


def fake_batch(step: Step, setup: Setup) -> Batch:
    """This rank's rows of a global batch."""
    c = step.config.training
    shape = c.global_batch_size // setup.degrees.dp, c.seq_len
    tokens, labels = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    masks = c.attention_mask == "document"
    return Batch(tokens, labels, torch.zeros_like(tokens) if masks else None)


def host_value(setup: Setup) -> int:
    """Rows that a rank sends to and receives from each rank of ep: what experts in balance give; 1 without experts."""
    experts, d, c = experts_of(setup.model_config), setup.degrees, setup.config
    if experts is None:
        return 1
    rows = c.parallelism.pipeline_parallel_microbatch_size if d.pp > 1 else c.training.local_batch_size
    return rows * c.training.seq_len // d.cp // d.tp * experts.top_k // d.ep


def _dimensions(mesh: Mesh) -> dict[str, list[str]]:
    """Process group -> the dimensions it is of."""
    found: dict[str, list[str]] = {}
    for part in (mesh.pp, mesh.tp, mesh.cp, mesh.fsdp, mesh.expert_fsdp, mesh.ep):
        if part is not None:
            for i, name in enumerate(part.mesh_dim_names or ()):
                found.setdefault(part.get_group(i).group_name, []).append(name)
    found.setdefault(planning.world_name(), []).append("world")
    return found


def _tap_modules(step: Step, recorder: Recorder, replay: bool) -> list[Replay]:
    """Let the recorder know which module is at work and which tensors are gradients; of each part what is replayed."""
    model = step.model
    replays = [Replay(recorder) for _ in model.parts]
    for part, replayed in zip(model.parts, replays, strict=True):
        for name, module in part.named_children():
            if name != "layers":
                module.forward = tap(recorder, name, module.forward)
        for index, block in layers_of(part).items():
            name, nested = f"layers.{index}", any(isinstance(m, FSDPModule) for m in list(block.modules())[1:])
            if planning.is_compiled(block):
                planning.wrap_compiled(block, partial(tap, recorder, name))
            else:
                block.forward = (
                    replayed.tap(name, block) if replay and not nested else tap(recorder, name, block.forward)
                )
    model.loss.compute = tap(recorder, "loss", model.loss.compute)  # type: ignore[method-assign]
    model.forward_backward = _computing(recorder, model)  # type: ignore[method-assign]
    return replays


def _computing(recorder: Recorder, model: Any) -> Callable[..., Tensor]:
    run = model.forward_backward

    def forward_backward(*args: Any, **kwargs: Any) -> Tensor:
        recorder.computing = True
        try:
            return run(*args, **kwargs)
        finally:
            recorder.computing, recorder.computed = False, len(recorder.events)
            for part in model.parts:
                gradients = (p.grad for p in part.parameters() if p.grad is not None)
                recorder.tag(gradients, "gradients")

    return forward_backward
