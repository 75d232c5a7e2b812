"""The plan of one run as it is configured: whether it fits, and what it is predicted to cost."""

from dtron.errors import UserError
from dtron.models.spec import meta_model
from dtron.parallel.incompatible import FEATURES
from dtron.plan.dryrun import check_known
from dtron.plan.hardware_file import read_hardware
from dtron.plan.layout import Layout, Sizes, loss_chunk, muon_steps
from dtron.plan.memory import closed_form_peak
from dtron.plan.search import Candidate, record
from dtron.plan.timemodel import predict, style_of
from dtron.train.resolve import check_batch
from dtron.train.setup import Setup, stages_of

__all__ = ["check_sizes", "describe_run", "layout_of"]

SIZES_MAY_DIFFER = 0.03


def check_sizes(setup: Setup) -> None:
    """UserError unless the run is of what the planner knows, and the closed forms' alike blocks are the model's."""
    check_known(setup.config)
    expected = Sizes.of(setup.model_config).parameters
    parameters = sum(p.numel() for p in meta_model(setup.spec, setup.model_config).parameters())
    if abs(parameters / expected - 1) > SIZES_MAY_DIFFER:
        raise UserError(
            f"the planner takes models for Llama-like ones, which of these sizes would have {expected / 1e9:.2f}B "
            f"parameters; this one has {parameters / 1e9:.2f}B. Record single layouts of it by dtron.plan.dryrun"
        )


def layout_of(setup: Setup) -> Layout:
    """The layout of a checked run; with a pipeline the microbatches are those of one of its passes, of which a step may
    have several. Every n-th block recomputed is taken for every second one.
    """
    c, d = setup.config, setup.degrees
    p, ac, stages = c.parallelism, c.activation_checkpoint, stages_of(setup)
    microbatch = p.pipeline_parallel_microbatch_size if d.pp > 1 else c.training.local_batch_size
    rows = c.training.local_batch_size if d.pp > 1 else _rows(setup)
    selective = "op" if ac.selective_ac_option == "op" else "second"
    schedule = (p.pipeline_parallel_schedule_csv or p.pipeline_parallel_schedule) if d.pp > 1 else ""
    return Layout(
        d.pp, d.dp_replicate, d.dp_shard, d.cp, d.tp, d.ep,
        microbatch=microbatch,
        microbatches=rows // microbatch,
        virtual=stages.n_stages // d.pp if stages else 1,
        recompute={"selective": selective, "memory_budget": "budget"}.get(ac.mode, ac.mode),
        memory_budget=ac.memory_budget if ac.mode == "memory_budget" else 1.0,
        loss_chunk=loss_chunk(c, schedule),
        compiled=FEATURES["compiled blocks"](c),
        reshard={"always": True, "never": False}.get(p.fsdp_reshard_after_forward, d.pp == 1),
        state_dtype=c.optimizer.state_dtype,
        muon_steps=muon_steps(c),
        schedule=schedule,
    )  # fmt: skip


def _rows(setup: Setup) -> int:
    """Sequences of a data-parallel rank in a step."""
    c, d = setup.config, setup.degrees
    return check_batch(c, d, c.training.global_batch_size) // d.dp


def describe_run(setup: Setup, hardware: str) -> list[str]:
    """Lines on whether the run fits on GPUs of that kind, its memory, speed and GPU-hours. UserError without a plan."""
    if setup.device_type != "cuda":
        raise UserError("it is for runs on GPUs, and this one is on CPUs")
    check_sizes(setup)
    hw, a, s = read_hardware(hardware), layout_of(setup), Sizes.of(setup.model_config)
    c, gpus = setup.config, setup.degrees.world
    memory = closed_form_peak(s, a, c.training.seq_len)
    time = predict(s, a, c.training.seq_len, hw, style_of(c, hw))
    run = record(Candidate(a, memory, time, memory.peak, 0.0, False), setup, hw)
    gib = 2**30
    step_s = time.step_s * _rows(setup) / (a.microbatch * a.microbatches)
    hours = step_s * c.training.steps * gpus / 3600
    return [
        f"{'fits' if run.fits else 'does not fit'} on {gpus} x {hw.name}: needs {run.needed_bytes / gib:.1f} of "
        f"{hw.memory_bytes / gib:.1f} GiB, of which the step holds {run.peak_bytes / gib:.1f} at its peak",
        f"predicted: {step_s:.3g} s a step, {time.tokens_per_s:,.0f} tokens/s per GPU, MFU {time.mfu_full:.1%}",
        f"predicted: {hours:,.1f} GPU-hours for {c.training.steps:,} steps (training.steps)",
    ]
