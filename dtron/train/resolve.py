"""The order of all checks that need the world size, the device or the model's dimensions; then a run is possible.

What a single key must satisfy is declared on the key (`dtron/config/sections.py`), what a dimension must satisfy in its
file under `dtron/parallel/`; here is the order in which they are checked.
"""

import dataclasses
from typing import Any, Literal

import torch

from dtron import registry
from dtron.config import Config, replace
from dtron.data.loader import check_dataloader
from dtron.errors import UserError
from dtron.mesh import Degrees, resolve_degrees
from dtron.models.hf import from_hf_config
from dtron.models.spec import ModelSpec
from dtron.observe.profiler import check_profiling
from dtron.parallel.context import check_sequence
from dtron.parallel.incompatible import check_compatible
from dtron.parallel.schedules import check_pipeline
from dtron.parallel.tensor import check_tensor
from dtron.train.data import check_datasets
from dtron.train.initial import check_export, check_initial, resolve_initial
from dtron.train.setup import Setup

__all__ = ["check_batch", "choose_device_type", "resolve"]


def resolve(config: Config, world: int, device_type: Literal["cpu", "cuda"] | None = None) -> Setup:
    """Check a configuration for `world` ranks. UserError with the first thing that cannot work.

    device_type: of the machine that will run it, where that is not this one.
    """
    registry.import_custom(config.job.custom_import)
    device_type = device_type or choose_device_type(config)
    config = replace(config, "training.device", device_type)
    config = resolve_initial(config)
    if config.validation.only:
        config = replace(config, "validation.enable", True)
        _check_evaluation(config)
    else:
        _check_training(config)
    _check_values(config)
    _check_names(config)
    check_dataloader(config)
    degrees = resolve_degrees(config.parallelism, world)
    check_compatible(config)
    spec, model_config = _model(config)
    check_initial(config, model_config)
    check_export(config, spec)
    if config.training.attention_mask == "document" and not spec.document_masks:
        raise UserError(f"model.name {config.model.name} takes no documents; set training.attention_mask causal")
    _check_model(model_config)
    check_tensor(config, spec, model_config, degrees)
    check_sequence(config, degrees)
    if degrees.pp > 1:
        check_pipeline(config, spec, model_config, degrees)
    if not config.validation.only:
        check_batch(config, degrees, config.training.global_batch_size)
    return Setup(config, degrees, device_type, spec, model_config)


def _check_evaluation(c: Config) -> None:
    """What validation.only needs and what it leaves without effect."""
    if not c.checkpoint.initial_load_path:
        raise UserError(
            "validation.only evaluates a checkpoint, and none is named: set checkpoint.initial_load_path to "
            "outputs/RUN/checkpoint/step-N of a run, or to a Hugging Face folder"
        )
    if c.checkpoint.exclude_from_loading:
        raise UserError(
            "checkpoint.exclude_from_loading has no meaning with validation.only, which evaluates the weights of a "
            "checkpoint and no initial values: leave it out, or clear that of the file by "
            "--checkpoint.exclude_from_loading="
        )


def _check_training(c: Config) -> None:
    """Values that only a training has: optimizer, schedule, clipping, profiler."""
    sched = c.lr_scheduler
    for key in ("beta1", "beta2"):
        if getattr(c.optimizer, key) >= 1:
            raise UserError(f"optimizer.{key} is {getattr(c.optimizer, key)}; expected a number in [0, 1)")
    if c.training.max_norm == 0:
        raise UserError(
            "training.max_norm is 0, which makes every gradient 0; expected more, a huge number for no clipping"
        )
    total = sched.total_steps or c.training.steps
    if sched.total_steps and sched.warmup_steps > sched.total_steps:
        raise UserError(
            f"lr_scheduler.warmup_steps {sched.warmup_steps} is more than its total_steps {sched.total_steps}; "
            "lower the one or raise the other"
        )
    if sched.decay_ratio is not None and sched.warmup_steps + round(total * sched.decay_ratio) > total:
        raise UserError(
            f"lr_scheduler: {sched.warmup_steps} warm-up steps and a decay over {sched.decay_ratio:.0%} "
            f"of {total} steps overlap; lower warmup_steps or decay_ratio"
        )
    check_profiling(c.profiling)
    registry.look_up("optimizer", c.optimizer.name, "optimizer.name")


def _check_values(c: Config) -> None:
    """Values of several keys that go together; what a single key must satisfy is declared on the key."""
    if c.compile.enable and not c.compile.components:
        raise UserError(
            "compile.enable is true and compile.components is empty; name model, loss or both, or set it false"
        )
    if c.compile.enable and c.compile.backend not in (known := torch._dynamo.list_backends(None)):
        raise UserError(f"compile.backend {c.compile.backend!r} is unknown to torch; known: {', '.join(known)}")
    if c.checkpoint.folder.startswith("memory:"):
        raise UserError("checkpoint.folder in memory:// is gone when the run ends; name a place that stays")
    if c.checkpoint.resume_run and not c.checkpoint.enable:
        raise UserError("checkpoint.resume_run has no effect without checkpoint.enable = true; set it, or leave it out")
    if c.checkpoint.exclude_from_loading and not c.checkpoint.initial_load_path:
        raise UserError("checkpoint.exclude_from_loading has no effect without checkpoint.initial_load_path")


def _check_names(c: Config) -> None:
    """Everything a run looks up by name is registered; building it comes later."""
    check_datasets(c)
    registry.look_up("loss", c.training.loss, "training.loss")
    for name in c.model.converters:
        registry.look_up("converter", name, "model.converters")


def _model(c: Config) -> tuple[ModelSpec, Any]:
    """The family and the flavor's dimensions with the overrides applied."""
    spec: ModelSpec = registry.look_up("model", c.model.name, "model.name")
    if c.model.hf_config_path:
        model_config: Any = from_hf_config(c.model.hf_config_path)
    elif c.model.flavor in spec.flavors:
        model_config = spec.flavors[c.model.flavor]
    else:
        raise UserError(
            f"model.flavor {c.model.flavor!r} is unknown for {c.model.name}; known: {', '.join(spec.flavors)}"
        )
    names = ("n_layers", "dim", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "tie_embeddings", "rope_theta")
    given = {name: getattr(c.model, name) for name in names if getattr(c.model, name) is not None}
    if lacking := [name for name in given if not hasattr(model_config, name)]:
        raise UserError(f"model.{lacking[0]} cannot be set: {c.model.name} has no such dimension")
    return spec, dataclasses.replace(model_config, **given)


def _check_model(m: Any) -> None:
    heads, kv_heads, explicit = m.n_heads, m.n_kv_heads, getattr(m, "head_dim", None)
    if heads % kv_heads:
        raise UserError(f"model: {heads} query heads are not a multiple of {kv_heads} key/value heads")
    if explicit is None and m.dim % heads:
        raise UserError(f"model: dim {m.dim} is not divisible by {heads} heads")
    if getattr(m, "rope_theta", 1.0) <= 0:
        raise UserError(f"model.rope_theta is {m.rope_theta}; expected a positive number")
    if hasattr(m, "rope_theta") and (explicit or m.dim // heads) % 2:
        raise UserError(f"model: the head size {explicit or m.dim // heads} is odd; the rotary embedding needs pairs")


def check_batch(config: Config, degrees: Degrees, global_batch: int, source: str = "") -> int:
    """The global batch in sequences, -1 resolved. UserError unless it is a whole number of local batches.

    source: a few words on where the batch comes from, if it is not the configured one.
    """
    local = config.training.local_batch_size
    unit = local * degrees.dp
    if global_batch == -1:
        return unit
    if global_batch < 1 or global_batch % unit:
        raise UserError(
            f"the global batch of {global_batch} sequences{source} is not a positive multiple of "
            f"training.local_batch_size {local} x {degrees.dp} data-parallel ranks = {unit}; change "
            "training.global_batch_size or training.local_batch_size"
        )
    return global_batch


def choose_device_type(config: Config) -> Literal["cpu", "cuda"]:
    """Of `training.device`, auto resolved. UserError if it is a GPU that is not there."""
    configured = config.training.device
    if configured == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"training.device = cuda, but torch {torch.__version__} finds no GPU here; "
            "set training.device cpu or auto, or install a CUDA build of torch on a GPU machine"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if configured == "auto" else configured
