"""Features that are incompatible: one table, read by the checks and by the documentation.

A feature is a name and a predicate over the configuration; a rule is a pair of features that exclude each other, the
reason and what to do instead. A pair that is not here composes, and the parity matrix proves it.
"""

from collections.abc import Callable
from typing import NamedTuple

from dtron.config.sections import Config
from dtron.errors import UserError
from dtron.parallel.schedules import SCHEDULES

__all__ = ["FEATURES", "RULES", "Rule", "as_markdown", "check_compatible"]


def _pipeline(c: Config) -> bool:
    return c.parallelism.pipeline_parallel_degree > 1


def _zero_bubble(c: Config) -> bool:
    """A schedule that splits the backward into inputs (I) and weights (W), by name or in its CSV file."""
    p = c.parallelism
    if not _pipeline(c) or c.validation.only:  # an evaluation keeps the schedule's forwards
        return False
    if not p.pipeline_parallel_schedule_csv:
        return SCHEDULES[p.pipeline_parallel_schedule].zero_bubble
    try:
        with open(p.pipeline_parallel_schedule_csv) as file:
            return "I" in file.read()
    except OSError:
        return False  # said by the check of the file itself


FEATURES: dict[str, Callable[[Config], bool]] = {
    "pipeline parallel": _pipeline,
    "zero-bubble schedule": _zero_bubble,
    "compiled blocks": lambda c: c.compile.enable and "model" in c.compile.components,
    "eager blocks": lambda c: not (c.compile.enable and "model" in c.compile.components),
    "recompute by operation": lambda c: (
        c.activation_checkpoint.mode == "selective" and c.activation_checkpoint.selective_ac_option == "op"
    ),
    "memory budget": lambda c: c.activation_checkpoint.mode == "memory_budget",
    "reshard always": lambda c: c.parallelism.fsdp_reshard_after_forward == "always",
    "reduce at the last microbatch": lambda c: (
        c.parallelism.gradient_reduce == "last_microbatch" and not c.validation.only
    ),
    "async tensor parallel": lambda c: c.parallelism.enable_async_tensor_parallel,
    "float8 all-gather": lambda c: (
        any("float8" in name for name in c.model.converters) and c.quantize.linear.float8.enable_fsdp_float8_all_gather
    ),
    "tensor parallel": lambda c: c.parallelism.tensor_parallel_degree > 1,
    "no tensor parallel": lambda c: c.parallelism.tensor_parallel_degree == 1,
    "CPU offload": lambda c: c.training.enable_cpu_offload,
    "Muon": lambda c: c.optimizer.name == "Muon",
    "ring attention": lambda c: c.parallelism.context_parallel_degree > 1 and c.training.attention_mask == "causal",
    "fp32 compute on CUDA": lambda c: c.training.device == "cuda" and c.training.mixed_precision_param == "float32",
    "loss in Triton": lambda c: c.training.loss_kernel == "triton",
    "device cpu": lambda c: c.training.device == "cpu",
}


class Rule(NamedTuple):
    """Two mutually exclusive features."""

    first: str
    second: str
    because: str
    instead: str
    test: str


_TEST = "tests/parallel/test_incompatible.py"
RULES = [
    Rule(
        "zero-bubble schedule", "compiled blocks",
        "the split backward of compiled blocks gives wrong gradients, or raises",
        "set compile.enable false, or compile.components = [\"loss\"], or take Interleaved1F1B", _TEST,
    ),
    Rule(
        "zero-bubble schedule", "recompute by operation",
        "the split backward runs the saved operations out of order and raises",
        "set activation_checkpoint.mode full or none, or selective_ac_option \"2\"", _TEST,
    ),
    Rule(
        "zero-bubble schedule", "reshard always",
        "weights freed between the two halves of the backward make gradients wrong",
        "set parallelism.fsdp_reshard_after_forward default or never", _TEST,
    ),
    Rule(
        "pipeline parallel", "reduce at the last microbatch",
        "the pipeline runtime reduces gradients once a schedule step by itself",
        "set parallelism.gradient_reduce every_microbatch", _TEST,
    ),
    Rule(
        "memory budget", "eager blocks",
        "the compiler chooses what is recomputed",
        "set compile.enable true with \"model\" in compile.components, or activation_checkpoint.mode selective", _TEST,
    ),
    Rule(
        "async tensor parallel", "eager blocks",
        "the overlap is made by the compiler",
        "set compile.enable true with \"model\" in compile.components", _TEST,
    ),
    Rule(
        "async tensor parallel", "no tensor parallel",
        "there is no tensor-parallel communication to overlap",
        "set parallelism.tensor_parallel_degree above 1", _TEST,
    ),
    Rule("async tensor parallel", "device cpu", "it needs CUDA symmetric memory", "leave it off on CPU", _TEST),
    Rule(
        "ring attention", "fp32 compute on CUDA",
        "the flash and cudnn kernels of the ring take 16-bit inputs only",
        "set training.mixed_precision_param bfloat16", _TEST,
    ),
    Rule(
        "Muon", "CPU offload",
        "it multiplies whole matrices, which ranks exchange: both belong on the GPU",
        "set training.enable_cpu_offload false, or optimizer.name AdamW", _TEST,
    ),
    Rule(
        "float8 all-gather", "tensor parallel",
        "each tensor-parallel rank scales its own part of a weight, so that a training would depend on tp",
        "set quantize.linear.float8.enable_fsdp_float8_all_gather false", _TEST,
    ),
    Rule(
        "loss in Triton", "device cpu",
        "Triton compiles for GPUs",
        "set training.loss_kernel torch", _TEST,
    ),
    Rule("CPU offload", "device cpu", "the weights are in CPU memory already", "leave it off on CPU", _TEST),
]  # fmt: skip


def check_compatible(config: Config) -> None:
    """UserError for the first pair of features in the table that the configuration has both of."""
    for rule in RULES:
        if FEATURES[rule.first](config) and FEATURES[rule.second](config):
            raise UserError(f"{rule.first} and {rule.second} are incompatible: {rule.because}; {rule.instead}")


def as_markdown() -> str:
    """The table as the documentation shows it."""
    rows = [f"| {r.first} | {r.second} | {r.because} | {r.instead} | `{r.test}` |" for r in RULES]
    return (
        "\n".join(["| Feature | Incompatible with | Because | Instead | Test |", "|---|---|---|---|---|", *rows]) + "\n"
    )
