"""Every check that needs the world size, the device or the model's dimensions; then a run is known to be possible."""

import dataclasses
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch

import dtron
from dtron import registry
from dtron.checkpoint.hf import is_hf
from dtron.checkpoint.place import Place
from dtron.config import Config
from dtron.config.sections import Checkpoint, Comm, Dataset, Training
from dtron.data.loader import check_dataloader
from dtron.data.order import Mixture
from dtron.errors import UserError
from dtron.mesh import Degrees, resolve_degrees
from dtron.models.hf import from_hf_config
from dtron.models.llama import LlamaConfig
from dtron.models.spec import ModelSpec, meta_model
from dtron.observe.device import device_name
from dtron.observe.profiler import check_profiling
from dtron.parallel.compose import stage_plan
from dtron.parallel.context import check_sequence
from dtron.parallel.incompatible import check_compatible
from dtron.parallel.pipeline import StagePlan
from dtron.parallel.schedules import SCHEDULES, check_pipeline
from dtron.parallel.tensor import check_tensor

__all__ = ["Setup", "check_batch", "choose_device_type", "describe", "resolve", "stages_of"]

NAMED = ("dataset", "dataset_path", "dataset_subset", "dataset_split", "text_column")  # keys that say which data


@dataclass(frozen=True)
class Setup:
    """A checked run: what is needed to build it on any rank."""

    config: Config
    degrees: Degrees
    device_type: str
    spec: ModelSpec
    model_config: Any

    def device(self, local_rank: int) -> torch.device:
        """Where a rank computes."""
        return torch.device("cuda", local_rank) if self.device_type == "cuda" else torch.device("cpu")


def resolve(config: Config, world: int, device_type: Literal["cpu", "cuda"] | None = None) -> Setup:
    """Check a configuration for `world` ranks. UserError with the first thing that cannot work.

    device_type: of the machine that will run it, where that is not this one.
    """
    registry.import_custom(config.job.custom_import)
    device_type = device_type or choose_device_type(config)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, device=device_type))
    config = _resolve_initial(config)
    if config.validation.only:
        config = dataclasses.replace(config, validation=dataclasses.replace(config.validation, enable=True))
        _check_evaluation(config)
    else:
        _check_training(config)
    _check_values(config)
    _check_names(config)
    check_dataloader(config)
    degrees = resolve_degrees(config.parallelism, world)
    check_compatible(config)
    spec, model_config = _model(config)
    _check_initial(config, model_config)
    _check_export(config, spec)
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


def _resolve_initial(config: Config) -> Config:
    """initial_load_in_hf without a path takes model.hf_assets_path."""
    c = config.checkpoint
    if not c.initial_load_in_hf or c.initial_load_path:
        return config
    if not config.model.hf_assets_path:
        raise UserError(
            "checkpoint.initial_load_in_hf needs the folder with the weights: set checkpoint.initial_load_path, or "
            "model.hf_assets_path where the tokenizer lies there too"
        )
    return dataclasses.replace(config, checkpoint=dataclasses.replace(c, initial_load_path=config.model.hf_assets_path))


# Most of these the shapes of the weights do not tell: a wrong value would spoil the model silently.
_TRAINED_WITH = (
    "n_layers", "dim", "ffn_dim", "n_heads", "n_kv_heads", "head_size", "rope_theta", "rope_scaling", "norm_eps",
    "tie_embeddings", "qkv_bias", "qk_norm",
)  # fmt: skip


def _check_initial(config: Config, model_config: Any) -> None:
    """UserError if the config.json beside the initial weights is of another model, or not of Hugging Face at all."""
    folder = config.checkpoint.initial_load_path
    place = Place.at(folder).local if folder else None
    if folder is None or place is None or not place.is_dir():
        return
    names = os.listdir(place)
    if config.checkpoint.initial_load_in_hf and not ("config.json" in names and is_hf(names)):
        raise UserError(
            f"checkpoint.initial_load_in_hf: {folder} has no config.json with safetensors beside it; leave the key out "
            "for a checkpoint"
        )
    if "config.json" not in names:
        return
    if not isinstance(model_config, LlamaConfig):
        return
    there, m = from_hf_config(place, "checkpoint.initial_load_path"), config.model
    meant = {"rope_theta"} if m.rope_theta is not None else set()
    for name in _TRAINED_WITH:
        ours, theirs = getattr(model_config, name), getattr(there, name)
        if ours == theirs or name in meant:
            continue
        mend = f"set model.hf_config_path = {folder} to take the dimensions of its config.json"
        if getattr(m, name, None) is not None:
            mend = f"take model.{name} out of the configuration"
        raise UserError(
            f"checkpoint.initial_load_path: the model has {name} {ours}, but the weights in {folder} were trained "
            f"with {theirs}; {mend}, or change its config.json where another value is meant"
        )


def _check_export(c: Config, spec: ModelSpec) -> None:
    """UserError if last_save_in_hf cannot be done, or what goes with it has no effect."""
    if not c.checkpoint.last_save_in_hf:
        if c.checkpoint.export_dtype != Checkpoint().export_dtype:
            raise UserError("checkpoint.export_dtype has no effect without checkpoint.last_save_in_hf")
        return
    if not c.checkpoint.enable or c.checkpoint.load_only:
        raise UserError("checkpoint.last_save_in_hf needs checkpoint.enable = true, and load_only false")
    if spec.hf_config is None or c.model.converters:
        what = "model.converters change the model" if c.model.converters else f"model.name is {c.model.name}"
        raise UserError(f"checkpoint.last_save_in_hf: {what}, which Hugging Face has no name for; leave it out")


def check_batch(config: Config, degrees: Degrees, global_batch: int) -> int:
    """The global batch in sequences, -1 resolved. UserError unless it is a whole number of local batches."""
    local = config.training.local_batch_size
    unit = local * degrees.dp
    if global_batch == -1:
        return unit
    if global_batch < 1 or global_batch % unit:
        raise UserError(
            f"the global batch of {global_batch} sequences is not a positive multiple of training.local_batch_size "
            f"{local} x {degrees.dp} data-parallel ranks = {unit}; change training.global_batch_size or "
            "training.local_batch_size"
        )
    return global_batch


def choose_device_type(config: Config) -> Literal["cpu", "cuda"]:
    """Of `training.device`, auto resolved. UserError if it is a GPU that is not there."""
    asked = config.training.device
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"training.device = cuda, but torch {torch.__version__} finds no GPU here; "
            "set training.device cpu or auto, or install a CUDA build of torch on a GPU machine"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


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
    if c.training.max_norm == 0:
        raise UserError(
            "training.max_norm is 0, which makes every gradient 0; expected more, a huge number for no clipping"
        )
    check_profiling(c.profiling)
    registry.look_up("optimizer", c.optimizer.name, "optimizer.name")


def _check_values(c: Config) -> None:
    """Single values whose legal range is more than a type and a minimum."""
    ac, schedule = c.activation_checkpoint, c.parallelism.pipeline_parallel_schedule
    if ac.mode == "memory_budget":
        raise UserError("activation_checkpoint.mode = memory_budget is not built; expected selective, full or none")
    option = ac.selective_ac_option
    if option != "op" and not (option.isdecimal() and int(option) > 0):
        raise UserError(
            f'activation_checkpoint.selective_ac_option is {option!r}; expected "op" or n >= 1 for every n-th block'
        )
    if unknown := set(c.compile.components) - {"model", "loss"}:
        raise UserError(f"compile.components has {', '.join(sorted(unknown))}; expected any of model, loss")
    if schedule not in SCHEDULES:
        near = get_close_matches(schedule, SCHEDULES, 1, 0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"parallelism.pipeline_parallel_schedule = {schedule!r} is unknown; {hint}known: {', '.join(SCHEDULES)}"
        )
    if c.parallelism.context_parallel_load_balancer not in ("headtail", None, ""):
        raise UserError(
            f"parallelism.context_parallel_load_balancer is {c.parallelism.context_parallel_load_balancer!r}; "
            'expected headtail or "" (contiguous)'
        )
    if c.validation.steps != -1 and c.validation.steps < 1:
        raise UserError(f"validation.steps is {c.validation.steps}; expected a number of batches, or -1 for all")
    if c.compile.enable and not c.compile.components:
        raise UserError(
            "compile.enable is true and compile.components is empty; name model, loss or both, or set it false"
        )
    if c.compile.enable and c.compile.backend not in (known := torch._dynamo.list_backends(None)):
        raise UserError(f"compile.backend {c.compile.backend!r} is unknown to torch; known: {', '.join(known)}")
    for key, folder in (
        ("checkpoint.folder", c.checkpoint.folder),
        ("metrics.save_tb_folder", c.metrics.save_tb_folder),
        ("profiling.save_traces_folder", c.profiling.save_traces_folder),
        ("comm.save_traces_folder", c.comm.save_traces_folder),
    ):
        if key == "checkpoint.folder" and "://" in folder:
            if folder.startswith("memory:"):
                raise UserError("checkpoint.folder in memory:// is gone when the run ends; name a place that stays")
            continue
        if Path(folder).is_absolute() or ".." in Path(folder).parts or Path(folder) == Path():
            raise UserError(f"{key} is {folder!r}; expected the name of a folder inside the run folder")
    _check_comm(c.comm)
    if c.checkpoint.exclude_from_loading and not c.checkpoint.initial_load_path:
        raise UserError("checkpoint.exclude_from_loading has no effect without checkpoint.initial_load_path")
    if c.checkpoint.load_step < -1:
        raise UserError(f"checkpoint.load_step is {c.checkpoint.load_step}; expected a step, or -1 for the newest")


def _check_comm(c: Comm) -> None:
    """torch's analyzer takes every file whose name has the prefix in it for one of its own, and the rest for a rank."""
    prefix = c.save_traces_file_prefix
    if not prefix or "/" in prefix or prefix in "stack_":
        raise UserError(
            f"comm.save_traces_file_prefix is {prefix!r}; expected the beginning of a file name, such as rank_, that "
            "is no part of stack_, with which the files beside begin"
        )


def _check_names(c: Config) -> None:
    """Everything a run looks up by name is registered; building it comes later."""
    _check_datasets(c)
    registry.look_up("loss", c.training.loss, "training.loss")
    for name in c.model.converters:
        registry.look_up("converter", name, "model.converters")


def _check_datasets(c: Config) -> None:
    """Every data set is known by name or place, and every key that names it takes effect."""
    sections = {} if c.validation.only else _training_sources(c.training)
    if c.validation.enable:
        sections["validation"] = c.validation
    for name, section in sections.items():
        registry.find_dataset(section, f"{name}.dataset")
        given = [key for key in NAMED[1:] if getattr(section, key)]
        if section.dataset == "stdlib" and given:
            raise UserError(
                f"{name}.{given[0]} has no effect with dataset = stdlib; leave it out or name another dataset"
            )


def _training_sources(t: Training) -> dict[str, Dataset]:
    """What is trained on, under the names that errors give it."""
    if not t.mixture:
        return {"training": t}
    for key in NAMED:
        if getattr(t, key) != getattr(Training(), key):
            raise UserError(f"training.{key} has no effect beside training.mixture; leave one of them out")
    Mixture([source.weight for source in t.mixture])
    return {f"training.mixture[{i}]": source for i, source in enumerate(t.mixture)}


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


def describe(setup: Setup, device: torch.device) -> str:
    """Two lines for the log: versions, layout and machine; model and size."""
    c, model = setup.config, meta_model(setup.spec, setup.model_config)
    what = c.model.hf_config_path or f"{c.model.name} {c.model.flavor}"
    machines = f"{setup.degrees.world} x {device_name(device)}"
    return (
        f"dtron {dtron.__version__}, torch {torch.__version__}: {setup.degrees}, on {machines}\n"
        f"{what}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    )


def stages_of(setup: Setup) -> StagePlan | None:
    """The pipeline split of a checked run, for the log; None without pipeline parallel."""
    return stage_plan(setup.spec, setup.model_config, setup.config) if setup.degrees.pp > 1 else None
