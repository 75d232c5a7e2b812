"""The points of a sweep: each a whole configuration, checked for its ranks before anything runs."""

import dataclasses
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dtron.cluster.sweep.file import DEGREES, SweepFile, assignments
from dtron.config import Config, flatten, load
from dtron.config.cli import SHORT_FORMS
from dtron.config.keys import KEYS
from dtron.errors import UserError
from dtron.mesh import Degrees, resolve_degrees
from dtron.models.spec import meta_model
from dtron.train.resolve import resolve

__all__ = ["Point", "check_machine", "make_points"]

# What a sweep sets where neither SWEEP.toml nor the sweep itself says otherwise: a point measures steps, no more.
QUIET = {
    "checkpoint.enable": False,
    "metrics.enable_tensorboard": False,
    "validation.enable": False,
    SHORT_FORMS["dp"]: -1,  # the ranks that the other degrees leave
}
# Keys without a bearing on what a point is: they name places and texts.
PLACES = ("job.config_file", "job.dump_folder", "job.control_folder", "job.description", "job.cache_folder")
# Keys that leave the losses as they are: dtron promises the same on every layout.
SAME_LOSS = (
    "job.", "metrics.", "profiling.", "parallelism.", "activation_checkpoint.", "compile.", "comm.", "validation.",
    "checkpoint.enable", "training.local_batch_size", "training.global_batch_size", "training.dataloader",
    "training.enable_cpu_offload", "training.gc_freq", "optimizer.implementation",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """name: of its folder, a function of its resolved settings and nothing else.

    settings: what [axes], layouts or [[points]] set, by dotted name. pruned: why it cannot work, or empty; degrees are
    those that would be asked for, and parameters and same_loss None, where that is not known. same_loss: equal for
    points that must have the same losses.
    """

    name: str
    config: Config
    settings: dict[str, Any]
    degrees: Degrees
    global_batch: int
    parameters: int | None = None
    same_loss: str | None = None
    pruned: str = ""

    @property
    def recompute(self) -> str:
        """none, full, selective 2, selective op."""
        ac = self.config.activation_checkpoint
        return f"selective {ac.selective_ac_option}" if ac.mode == "selective" else ac.mode

    @property
    def model(self) -> str:
        m = self.config.model
        return m.hf_config_path or f"{m.name} {m.flavor}"


def make_points(file: SweepFile, device_type: Literal["cpu", "cuda"] | None = None) -> list[Point]:
    """Every point of a sweep, those that cannot work with the reason; equal ones once, the first of them.

    device_type: of the machines that run them, where those are not this one.
    """
    points: dict[str, Point] = {}
    for settings in assignments(file):
        point = _point(file, settings, device_type)
        points.setdefault(point.name, point)
    return list(points.values())


def check_machine(points: list[Point], ranks: int) -> None:
    """UserError if the points need more GPUs than this machine has."""
    n_gpus = torch.cuda.device_count()
    on_gpus = [p for p in points if p.config.training.device != "cpu" and not p.pruned]
    if on_gpus and torch.cuda.is_available() and ranks > n_gpus:
        raise UserError(
            f"the points need {ranks} ranks, each with a GPU of its own, and this machine has {n_gpus}; lower ranks, "
            'set training.device = "cpu" under [fixed], or run them elsewhere with --slurm'
        )


def _point(file: SweepFile, settings: dict[str, Any], device_type: Literal["cpu", "cuda"] | None) -> Point:
    config, ranks, pruned = _configured(file, settings), file.ranks, ""
    try:
        degrees = resolve_degrees(config.parallelism, ranks)
        config = _explicit(config, degrees)
        setup = resolve(config, ranks, device_type)
    except UserError as error:
        pruned = " ".join(str(error).split())
        degrees = _asked(config)
    name, batch = _name(config, degrees), config.training.global_batch_size
    if pruned:
        return Point(name, config, settings, degrees, batch, pruned=pruned)
    same = {key: value for key, value in flatten(config).items() if not key.startswith(SAME_LOSS)}
    parameters = sum(p.numel() for p in meta_model(setup.spec, setup.model_config).parameters())
    return Point(name, config, settings, degrees, batch, parameters, _digest([batch, _changed(same)]))


def _explicit(config: Config, degrees: Degrees) -> Config:
    """The shard degree and the global batch in numbers: two ways to say the same are one point."""
    t, p = config.training, config.parallelism
    batch = t.local_batch_size * degrees.dp if t.global_batch_size == -1 else t.global_batch_size
    return dataclasses.replace(
        config,
        training=dataclasses.replace(t, global_batch_size=batch),
        parallelism=dataclasses.replace(p, data_parallel_shard_degree=degrees.dp_shard),
    )


def _asked(config: Config) -> Degrees:
    """The degrees as they stand, which do not make the ranks."""
    values = flatten(config)
    return Degrees(*(values[key] for key in DEGREES))


def _configured(file: SweepFile, settings: dict[str, Any]) -> Config:
    """base < what a sweep sets by itself < [fixed] < the point."""
    given = file.fixed | settings
    config = load(["--job.config_file", given["base"]])
    values = QUIET | {"metrics.log_freq": 1, "training.steps": file.steps}
    if config.lr_scheduler.total_steps is None:  # the learning rates of the beginning of the base's own run
        values["lr_scheduler.total_steps"] = max(config.training.steps, config.lr_scheduler.warmup_steps)
    for name, value in (values | given).items():
        if name != "base":
            *sections, leaf = name.split(".")
            setattr(functools.reduce(getattr, sections, config), leaf, value)
    return config


def _name(config: Config, degrees: Degrees) -> str:
    """What a person looks for first, and a hash of every setting that is not the default."""
    ac, layout = config.activation_checkpoint, str(degrees).replace(" x ", "-").replace("_", "").replace(" ", "")
    recompute = f"selective{ac.selective_ac_option}" if ac.mode == "selective" else ac.mode
    readable = f"{config.model.flavor}-{layout}-local{config.training.local_batch_size}-{recompute}"
    settings = {key: value for key, value in flatten(config).items() if key not in PLACES}
    return f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', readable)}-{_digest(_changed(settings))}"


def _changed(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that are not the default: a key that a later version adds makes no point another one."""
    return {key: value for key, value in settings.items() if value != KEYS[key].default}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=vars).encode()).hexdigest()[:8]
