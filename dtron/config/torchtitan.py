"""The words of torchtitan's TOML files, 2024-06 to 2026-02, that dtron spells otherwise or does not have.

`RENAMED`: the same meaning under another name. `ABSENT`: what dtron lacks; accepted where it asks for nothing. The file
says when it was written, too: since 2025-10-08 torchtitan's `llama3` has the rotary embedding of Llama 3.1.
"""

import fnmatch
from collections.abc import Callable, Collection
from pathlib import PurePosixPath
from typing import Any, NamedTuple

__all__ = ["ABSENT", "NAMES", "OWN_SECTIONS", "RENAMED", "Absent", "Renamed", "absent", "llama3_means", "said_of"]


class Renamed(NamedTuple):
    """name: dtron's. value: of the old value; a value of another type is returned as it is, for its key to refuse."""

    name: str
    value: Callable[[Any], Any] = lambda value: value


class Absent(NamedTuple):
    """harmless: the values that ask for nothing, None where any value does. reason: why another one is refused."""

    harmless: tuple[Any, ...] | None
    reason: str = ""


def _not(value: Any) -> Any:
    return not value if isinstance(value, bool) else value


def _folder_of(value: Any) -> Any:
    """The folder of a tokenizer.model, which torchtitan named itself until 2025-07."""
    return str(PurePosixPath(value).parent) if isinstance(value, str) and value.endswith(".model") else value


def _implementation(value: Any) -> Any:
    return {True: "fused", False: "foreach"}[value] if isinstance(value, bool) else value


def _schedule(value: Any) -> Any:
    """1f1b, gpipe and interleaved_1f1b of 2024-06."""
    return {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved_1f1b": "Interleaved1F1B"}.get(str(value), value)


def _float8(value: Any) -> Any:
    return {True: ["float8"], False: []}[value] if isinstance(value, bool) else value


RENAMED = {
    "job.print_args": Renamed("job.print_config"),
    "metrics.enable_color_printing": Renamed("metrics.disable_color_printing", _not),
    "model.tokenizer_path": Renamed("model.hf_assets_path", _folder_of),
    "optimizer.fused": Renamed("optimizer.implementation", _implementation),
    "lr_scheduler.lr_min": Renamed("lr_scheduler.min_lr_factor"),
    "training.batch_size": Renamed("training.local_batch_size"),
    "training.warmup_steps": Renamed("lr_scheduler.warmup_steps"),
    "training.data_parallel_degree": Renamed("parallelism.data_parallel_shard_degree"),
    "training.data_parallel_shard_degree": Renamed("parallelism.data_parallel_shard_degree"),
    "training.data_parallel_replicate_degree": Renamed("parallelism.data_parallel_replicate_degree"),
    "training.tensor_parallel_degree": Renamed("parallelism.tensor_parallel_degree"),
    "training.disable_loss_parallel": Renamed("parallelism.disable_loss_parallel"),
    "training.enable_loss_parallel": Renamed("parallelism.disable_loss_parallel", _not),
    "training.compile": Renamed("compile.enable"),
    "training.seed": Renamed("debug.seed"),
    "training.deterministic": Renamed("debug.deterministic"),
    "experimental.context_parallel_degree": Renamed("parallelism.context_parallel_degree"),
    "experimental.context_parallel_rotate_method": Renamed("parallelism.context_parallel_rotate_method"),
    "experimental.enable_async_tensor_parallel": Renamed("parallelism.enable_async_tensor_parallel"),
    "experimental.pipeline_parallel_degree": Renamed("parallelism.pipeline_parallel_degree"),
    "experimental.pipeline_parallel_schedule": Renamed("parallelism.pipeline_parallel_schedule", _schedule),
    "experimental.pipeline_parallel_schedule_csv": Renamed("parallelism.pipeline_parallel_schedule_csv"),
    "checkpoint.enable_checkpoint": Renamed("checkpoint.enable"),
    "checkpoint.model_weights_only": Renamed("checkpoint.last_save_model_only"),
    "checkpoint.last_save_model_weights_only": Renamed("checkpoint.last_save_model_only"),
    "checkpoint.initial_load_model_weights_only": Renamed("checkpoint.initial_load_model_only"),
    "float8.enable_float8_linear": Renamed("model.converters", _float8),
    "float8.enable_fsdp_float8_all_gather": Renamed("quantize.linear.float8.enable_fsdp_float8_all_gather"),
    "float8.precompute_float8_dynamic_scale_for_fsdp": Renamed(
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
    ),
    "float8.recipe_name": Renamed("quantize.linear.float8.recipe_name"),
    "float8.filter_fqns": Renamed("quantize.linear.float8.filter_fqns"),
    "float8.emulate": Renamed("quantize.linear.float8.emulate"),
}

GROUPED = "float8 products of experts are not built yet"
EXPERTS = "this mixture of experts is not built yet (mixtral, qwen3_moe and olmoe are)"
QWEN3_MOE = ' is unknown; as model.name "qwen3_moe" it is the flavor'
BALANCED = "experts are balanced by training.expert_balance_loss, never by force"
_CODE = "torchtitan's own code is not read; job.custom_import takes modules written for dtron"
_SPLIT = "name the modules of every stage in parallelism.module_fqns_per_model_part"

# By name or pattern; the first that fits counts. None: it belongs to a feature that is refused where it is turned on.
ABSENT = {
    "job.use_for_integration_test": Absent(None),
    "job.custom_config_module": Absent(("",), _CODE),
    "experimental.custom_import": Absent(("",), _CODE),
    "experimental.custom_args_module": Absent(("",), _CODE),
    "*.enable_compiled_autograd": Absent((False,), "compiled autograd is not built"),
    "*.pipeline_parallel_split_points": Absent(([],), _SPLIT),
    "*.pipeline_parallel_split_mode": Absent(("manual",), _SPLIT),
    "*.pipeline_parallel_microbatches": Absent(
        (), "dtron counts sequences: set parallelism.pipeline_parallel_microbatch_size to training.local_batch_size "
        "divided by it",
    ),
    "model.norm_type": Absent(("rmsnorm", "fused_rmsnorm", "compiled_rmsnorm"), "Llama's norm is RMSNorm"),
    "model.print_after_conversion": Absent((False,), "models are not printed"),
    "metrics.rank_0_only": Absent((True,), "metrics are reduced over all ranks and written once"),
    "training.fp8_linear": Absent(("",), "float8 is model.converters = [\"float8\"] here"),
    "training.gc_debug": Absent((False,), "there is no such debugging mode"),
    "training.debug_moe_force_load_balance": Absent((False,), BALANCED),
    "debug.moe_force_load_balance": Absent((False,), BALANCED),
    "debug.deterministic_warn_only": Absent((False,), "debug.deterministic raises for an operation that is not"),
    "checkpoint.interval_type": Absent(("steps",), "checkpoint.interval counts steps"),
    "checkpoint.enable_ft_dataloader_checkpoints": Absent(None),  # of fault_tolerance
    "parallelism.pipeline_parallel_expert_parallel_overlap": Absent(None),  # of expert parallel
    "parallelism.expert_parallel_comm_backend": Absent(("standard",), "rows travel by torch's own all-to-all"),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": Absent(
        (["moe.router.gate"], []), "recompute by operation saves every second matrix product, whatever its shape"
    ),
    "activation_checkpoint.determinism_check": Absent(None),  # a check only
    "activation_checkpoint.visualize_memory_budget_pareto": Absent((False,), "the graph of budgets is not drawn"),
    "float8.*": Absent(None),
    "mx.*": Absent(None),
    "quantize.linear.mx.*": Absent(None),
    "quantize.grouped_mm.*": Absent(None),
    "fault_tolerance.enable": Absent((False,), "torchft is not used; a run that lost ranks resumes on others"),
    "fault_tolerance.*": Absent(None),
    "memory_estimation.enable*": Absent((False,), "estimating memory is not built yet"),
    "memory_estimation.disable_fake_mode": Absent(None),
    "estimate.memory": Absent((False,), "estimating memory is not built yet"),
    "estimate.mode": Absent(None),
}  # fmt: skip

# Sections of these keys alone.
OWN_SECTIONS = (
    "experimental", "float8", "mx", "fault_tolerance", "memory_estimation", "estimate", "quantize.linear.mx",
    "quantize.grouped_mm",
)  # fmt: skip

# Names that torchtitan knows and dtron does not, by the last part of the key: what is said of them.
_C4 = (
    ' is unknown; dataset = "allenai/c4" with dataset_subset = "en" streams it from the hub, and a path names a copy '
    "on disk"
)
_C4_TEST = (
    " is unknown; it is tests/assets/c4_test of a checkout of torchtitan, which dataset_path can name; dataset = "
    '"stdlib" needs no file'
)
NAMES = {
    "converters": {
        "quantize.grouped_mm.float8": f": {GROUPED}",
        **dict.fromkeys(("mx", "mxfp8", "quantize.linear.mx", "quantize.grouped_mm.mx"), ": MXFP8 is not built yet"),
    },
    "name": {
        **dict.fromkeys(("deepseek_v2", "deepseek_v3", "llama4"), f": {EXPERTS}"),
        **dict.fromkeys(("flux", "vlm", "transformers_modeling_backend"), ": only Llama-like text models are built"),
        "llama": " is unknown; its generations are named, such as llama3",
    },
    "flavor": {
        **{name: f"{QWEN3_MOE} {name}" for name in ("30B-A3B", "235B-A22B")},
        "debugmodel_moe": f"{QWEN3_MOE} debugmodel",
        **dict.fromkeys(
            ("debugmodel_flex_attn", "debugmodel_varlen_attn", "8B_flex", "8B_varlen"),
            ' is unknown; the flavor without the suffix has their masks by training.attention_mask = "document"',
        ),
    },
    "dataset": {
        "c4": _C4, "c4_validation": f'{_C4}; its dataset_split is "validation"', "c4_test": _C4_TEST,
        "c4_mini": _C4_TEST,
    },
}  # fmt: skip


def said_of(key: str, name: str) -> str:
    """What follows the name in a message, of one of torchtitan's that dtron does not know; empty for any other."""
    return NAMES.get(key.rpartition(".")[2], {}).get(name, "")


def absent(name: str) -> Absent | None:
    """What is to be done with a key of torchtitan's that dtron has under no name; None for any other key."""
    return next((entry for pattern, entry in ABSENT.items() if fnmatch.fnmatch(name, pattern)), None)


_UNTIL_2026 = ("job.print_args", "model.tokenizer_path")  # which files of both times have
_SINCE_2025_10 = ("quantize.*", "job.custom_config_module", "debug.moe_force_load_balance")


def llama3_means(names: Collection[str]) -> tuple[str, str]:
    """The family that a torchtitan file with these keys calls llama3, and the key that says so; empty if none does.

    `quantize` came 2025-09-26, the rotary scaling 2025-10-08. No other word of torchtitan's changed in between.
    """
    for name in names:
        if any(fnmatch.fnmatch(name, pattern) for pattern in _SINCE_2025_10):
            return "llama3.1", name
    old = [name for name in names if name in RENAMED and name not in _UNTIL_2026]
    return ("llama3", old[0]) if old else ("", "")
