"""The order of all checks that need the world size, the device or the model's dimensions; then a run is possible.

What a single key must satisfy is declared on the key (`dtron/config/sections.py`), what a dimension must satisfy in its
file under `dtron/parallel/`; here is the order in which they are checked.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch

from dtron import registry
from dtron.checkpoint.load import check_excluded
from dtron.config import Config, replace
from dtron.config.optimizer import Optimizer
from dtron.config.rope import RopeScalingKeys
from dtron.config.torchtitan import said_of
from dtron.data.loader import check_dataloader
from dtron.errors import Mistakes, UserError
from dtron.mesh import Degrees, resolve_degrees
from dtron.models.hf import dropouts_of, hf_dimensions, read_hf_config
from dtron.models.hf_rope import read_scaling
from dtron.models.llama import LlamaConfig
from dtron.models.rope import SCALINGS, RopeScaling, for_length
from dtron.models.spec import ModelSpec, experts_of, meta_model, needs_masks
from dtron.observe.plan_hardware import check_plan_hardware
from dtron.observe.profiler import check_profiling
from dtron.optim.adamw import LARGEST_BETA
from dtron.parallel.context import check_sequence
from dtron.parallel.expert import check_experts
from dtron.parallel.float8 import check_float8, converters_of_parameters
from dtron.parallel.incompatible import check_compatible
from dtron.parallel.schedules import check_pipeline
from dtron.parallel.tensor import check_tensor
from dtron.train.data import check_datasets
from dtron.train.initial import check_export, check_initial, resolve_initial
from dtron.train.setup import Setup

__all__ = ["check_batch", "check_model", "choose_device_type", "resolve"]


def resolve(
    config: Config,
    world: int,
    device_type: Literal["cpu", "cuda"] | None = None,
    mistakes: Sequence[str] = (),
) -> Setup:
    """Check a configuration for `world` ranks. UserError with all that cannot work.

    device_type: of the machine that will run it, where that is not this one. mistakes: found when it was read; the keys
    in question have their defaults.
    """
    found = Mistakes(mistakes)
    with found.collect():
        registry.import_custom(config.job.custom_import)
    if len(found) > len(mistakes):  # of the names, some may be of the module that cannot be imported
        found.raise_any()
    device = device_type or "cpu"
    with found.collect():
        device = device_type or choose_device_type(config)
    config = replace(config, "training.device", device)
    with found.collect():
        config = resolve_initial(config)
    if config.validation.only:
        config = replace(config, "validation.enable", True)
    model = _check_names(config, found)
    if mistakes:  # what several keys make together would not be what was meant
        found.raise_any()
    found += _evaluation_mistakes(config) if config.validation.only else _training_mistakes(config)
    found += _value_mistakes(config)
    for check in (check_dataloader, check_compatible, check_plan_hardware):
        with found.collect():
            check(config)
    degrees = None
    with found.collect():
        degrees = resolve_degrees(config.parallelism, world)
    if model is not None:
        check_model(config, *model, degrees, found)
    if degrees is not None and not config.validation.only:
        with found.collect():
            check_batch(config, degrees, config.training.global_batch_size)
    found.raise_any()
    assert model is not None and degrees is not None
    return Setup(config, degrees, device, *model)


def _evaluation_mistakes(c: Config) -> Iterator[str]:
    """What validation.only needs and what it leaves without effect."""
    if not c.checkpoint.initial_load_path:
        yield (
            "validation.only evaluates a checkpoint, and none is named: set checkpoint.initial_load_path to "
            "outputs/RUN/checkpoint/step-N of a run, or to a Hugging Face folder"
        )
    if c.checkpoint.exclude_from_loading:
        yield (
            "checkpoint.exclude_from_loading has no meaning with validation.only, which evaluates the weights of a "
            "checkpoint and no initial values: leave it out, or clear that of the file by "
            "--checkpoint.exclude_from_loading="
        )


def _training_mistakes(c: Config) -> Iterator[str]:
    """Values that only a training has: optimizer, schedule, clipping, profiler."""
    sched = c.lr_scheduler
    for key in ("beta1", "beta2"):
        if getattr(c.optimizer, key) >= 1:
            yield f"optimizer.{key} is {getattr(c.optimizer, key)}; expected a number in [0, 1)"
    yield from _state_dtype_mistakes(c.optimizer)
    if c.training.max_norm == 0:
        yield "training.max_norm is 0, which makes every gradient 0; expected more, a huge number for no clipping"
    if 0 < c.training.spike_factor <= 1:
        yield (
            f"training.spike_factor is {c.training.spike_factor}, by which every usual norm is a spike; expected a "
            "number above 1, or 0 for none"
        )
    total = sched.total_steps or c.training.steps
    if sched.total_steps and sched.warmup_steps > sched.total_steps:
        yield (
            f"lr_scheduler.warmup_steps {sched.warmup_steps} is more than its total_steps {sched.total_steps}; "
            "lower the one or raise the other"
        )
    elif sched.decay_ratio and sched.warmup_steps + round(total * sched.decay_ratio) > total:
        yield (
            f"lr_scheduler: {sched.warmup_steps} warm-up steps and a decay over {sched.decay_ratio:.0%} "
            f"of {total} steps overlap; lower warmup_steps or decay_ratio"
        )
    try:
        check_profiling(c.profiling)
    except UserError as error:
        yield str(error)


def _state_dtype_mistakes(c: Optimizer) -> Iterator[str]:
    """What moments of 16 bits need."""
    if c.state_dtype == "float32":
        return
    setting = f"optimizer.state_dtype = {c.state_dtype}"
    if c.name not in ("AdamW", "Muon"):
        yield f"{setting} is AdamW's and Muon's, and optimizer.name is {c.name}; set it float32, or take AdamW"
    if c.implementation != "fused":
        yield f"{setting} has one implementation, fused, and optimizer.implementation is {c.implementation}"
    betas = {"beta1": c.beta1, "beta2": c.beta2} | ({"muon.momentum": c.muon.momentum} if c.name == "Muon" else {})
    for key, beta in betas.items():
        if LARGEST_BETA < beta < 1:
            yield (
                f"{setting} with optimizer.{key} {beta}: above {LARGEST_BETA} a step moves a moment by less "
                f"than bfloat16 can hold, and it would stay where it is; lower {key}, or set state_dtype float32"
            )


def _value_mistakes(c: Config) -> Iterator[str]:
    """Values of several keys that go together; what a single key must satisfy is declared on the key."""
    if c.compile.enable and not c.compile.components:
        yield "compile.enable is true and compile.components is empty; name model, loss or both, or set it false"
    if c.compile.enable and c.compile.backend not in (known := torch._dynamo.list_backends(None)):
        yield f"compile.backend {c.compile.backend!r} is unknown to torch; known: {', '.join(known)}"
    if c.training.loss_kernel == "triton" and importlib.util.find_spec("triton") is None:
        yield "training.loss_kernel = triton, and it is not installed here: pip install triton, or set torch"
    if c.checkpoint.folder.startswith("memory:"):
        yield "checkpoint.folder in memory:// is gone when the run ends; name a place that stays"
    if c.checkpoint.resume_run and not c.checkpoint.enable:
        yield "checkpoint.resume_run has no effect without checkpoint.enable = true; set it, or leave it out"
    if c.checkpoint.exclude_from_loading and not c.checkpoint.initial_load_path:
        yield "checkpoint.exclude_from_loading has no effect without checkpoint.initial_load_path"


def _check_names(c: Config, found: Mistakes) -> tuple[ModelSpec, Any] | None:
    """Everything a run looks up by name is registered; building it comes later. The model, where it is known."""
    with found.collect():
        check_datasets(c)
    with found.collect():
        registry.look_up("loss", c.training.loss, "training.loss")
    if not c.validation.only:
        with found.collect():
            registry.look_up("optimizer", c.optimizer.name, "optimizer.name")
    for name in c.model.converters:
        with found.collect():
            registry.look_up("converter", name, "model.converters")
    with found.collect():
        return _model(c)
    return None


def _model(c: Config) -> tuple[ModelSpec, Any]:
    """The family and the flavor's dimensions with the overrides applied."""
    spec: ModelSpec = registry.look_up("model", c.model.name, "model.name")
    if c.model.hf_config_path:
        hf, file = read_hf_config(c.model.hf_config_path)
        model_config: Any = hf_dimensions(hf, file)
        if (dropouts := dropouts_of(hf, file)) and not c.validation.only:
            raise UserError(
                f"model.hf_config_path: {file} has {dropouts}, and dtron trains without dropout: set it to 0 there, or "
                "in a copy of the file that model.hf_config_path names"
            )
    elif c.model.flavor in spec.flavors:
        model_config = spec.flavors[c.model.flavor]
    else:
        what = said_of("model.flavor", c.model.flavor) or f" is unknown for {c.model.name}"
        raise UserError(f"model.flavor {c.model.flavor!r}{what}; known: {', '.join(spec.flavors)}")
    names = ("n_layers", "dim", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "tie_embeddings", "rope_theta")
    given = {name: getattr(c.model, name) for name in names if getattr(c.model, name) is not None}
    if c.model.rope_scaling.rope_type:
        given["rope_scaling"] = _rope_scaling(c.model.rope_scaling)
    if lacking := [name for name in given if not hasattr(model_config, name)]:
        raise UserError(f"model.{lacking[0]} cannot be set: {c.model.name} has no such dimension")
    evaluated = c.validation.seq_len if c.validation.only else None
    return spec, for_length(dataclasses.replace(model_config, **given), evaluated or c.training.seq_len)


def _rope_scaling(keys: RopeScalingKeys) -> RopeScaling | None:
    """What [model.rope_scaling] describes. UserError naming what it lacks, or what its type has no use for."""
    given = {name: value for name, value in vars(keys).items() if value is not None}
    kind = SCALINGS.get(keys.rope_type or "")
    known = {"rope_type", *(field.name for field in dataclasses.fields(kind))} if kind else {"rope_type"}
    if more := [name for name in given if name not in known]:
        raise UserError(f"model.rope_scaling.{more[0]} has no meaning for rope_type {keys.rope_type}; leave it out")
    return read_scaling(given, "model.rope_scaling")


def check_model(c: Config, spec: ModelSpec, m: Any, degrees: Degrees | None, found: Mistakes) -> None:
    """The model by itself, with its initial weights and its export, and in the layout."""
    if c.training.attention_mask == "document" and not spec.document_masks:
        found.append(f"model.name {c.model.name} takes no documents; set training.attention_mask causal")
    found += _shape_mistakes(m)
    exempt = c.optimizer.weight_decay_exclude if c.optimizer.weight_decay and not c.validation.only else []
    if exempt and not found and not converters_of_parameters(c.model.converters):  # which may change the names
        with found.collect():
            names = [name for name, _ in meta_model(spec, m).named_parameters()]
            check_excluded(exempt, names, "optimizer.weight_decay_exclude")
    for check in (partial(check_initial, c, m), partial(check_export, c, spec)):
        with found.collect():
            check()
    if degrees is None:
        return
    if degrees.cp > 1 and needs_masks(m, c.training.seq_len) and not spec.document_masks:
        found.append(
            f"model.name {c.model.name} needs attention masks at training.seq_len {c.training.seq_len}, and takes none "
            "under context parallel; set context_parallel_degree 1"
        )
    with found.collect():
        check_experts(c, experts_of(m), m.dim, degrees)
    with found.collect():
        check_float8(c, partial(meta_model, spec, m), degrees.tp, degrees.cp)
    with found.collect():
        check_tensor(c, spec, m, degrees)
    with found.collect():
        check_sequence(c, degrees)
    if degrees.pp > 1:
        with found.collect():
            check_pipeline(c, spec, m, degrees)


def _shape_mistakes(m: Any) -> Iterator[str]:
    heads, kv_heads, explicit = m.n_heads, m.n_kv_heads, getattr(m, "head_dim", None)
    if heads % kv_heads:
        yield f"model: {heads} query heads are not a multiple of {kv_heads} key/value heads"
    if explicit is None and m.dim % heads:
        yield f"model: dim {m.dim} is not divisible by {heads} heads"
    elif isinstance(m, LlamaConfig):
        yield from (f"model: {rope.mistake}" for rope in m.all_ropes if rope and rope.mistake)
    elif hasattr(m, "rope_theta") and (explicit or m.dim // heads) % 2:
        yield f"model: the head size {explicit or m.dim // heads} is odd; the rotary embedding needs pairs"
    if getattr(m, "rope_theta", 1.0) <= 0:
        yield f"model.rope_theta is {m.rope_theta}; expected a positive number"


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
            f"training.global_batch_size (-1 makes it {unit}) or training.local_batch_size"
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
