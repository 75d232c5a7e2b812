"""The points of a sweep: each a complete configuration, checked for its ranks before anything runs."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dtron.cluster.sweep.file import DEGREES, SweepFile, assignments
from dtron.config import Config, changed_keys, digest, flatten, load, replace
from dtron.config.cli import SHORT_FORMS
from dtron.config.declare import ANOTHER_TRAINING
from dtron.errors import UserError
from dtron.mesh import Degrees, resolve_degrees
from dtron.models.spec import meta_model
from dtron.train.resolve import resolve

__all__ = ["Point", "check_machine", "make_points"]

# Settings of a point unless SWEEP.toml or the sweep sets them: a point only measures steps.
POINT_DEFAULTS = {
    "checkpoint.enable": False,
    "metrics.enable_tensorboard": False,
    "validation.enable": False,
    SHORT_FORMS["dp"]: -1,  # inferred from the ranks
}
# Keys that do not distinguish points.
PATHS_AND_TEXTS = (
    "job.config_file",
    "job.dump_folder",
    "job.control_folder",
    "job.description",
    "job.cache_folder",
)


@dataclass(frozen=True)
class Point:
    """name: of its folder; depends only on the resolved settings.

    settings: what [axes], layouts or [[points]] set, by dotted name. pruned: why it cannot run, or empty; then degrees
    are those requested, and parameters and same_loss are None. same_loss: equal for points that must have the same
    losses.
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
        """none, full, selective 2, selective op, memory_budget 0.75."""
        ac = self.config.activation_checkpoint
        options = {"selective": f" {ac.selective_ac_option}", "memory_budget": f" {ac.memory_budget:g}"}
        return ac.mode + options.get(ac.mode, "")

    @property
    def model(self) -> str:
        m = self.config.model
        return m.hf_config_path or f"{m.name} {m.flavor}"


def make_points(file: SweepFile, device_type: Literal["cpu", "cuda"] | None = None) -> list[Point]:
    """Every point of a sweep, those that cannot run with the reason; of equal points only the first.

    device_type: of the machines that run them, if not this one.
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
            f"the points need {ranks} ranks, each with its own GPU, and this machine has {n_gpus} GPUs; lower ranks, "
            'set training.device = "cpu" under [fixed], or run them on a cluster with --slurm'
        )


def _point(file: SweepFile, settings: dict[str, Any], device_type: Literal["cpu", "cuda"] | None) -> Point:
    config, ranks, pruned = _point_config(file, settings), file.ranks, ""
    try:
        degrees = resolve_degrees(config.parallelism, ranks)
        config = _with_explicit_degrees(config, degrees)
        setup = resolve(config, ranks, device_type)
    except UserError as error:
        pruned = " ".join(str(error).split())
        degrees = _requested_degrees(config)
    name, batch = _name(config, degrees), config.training.global_batch_size
    if pruned:
        return Point(name, config, settings, degrees, batch, pruned=pruned)
    same = changed_keys(config, ("losses", *ANOTHER_TRAINING))
    parameters = sum(p.numel() for p in meta_model(setup.spec, setup.model_config).parameters())
    return Point(name, config, settings, degrees, batch, parameters, digest([batch, same]))


def _with_explicit_degrees(config: Config, degrees: Degrees) -> Config:
    """The configuration with explicit shard degree and global batch, so that equal settings are one point."""
    t = config.training
    batch = t.local_batch_size * degrees.dp if t.global_batch_size == -1 else t.global_batch_size
    config = replace(config, "training.global_batch_size", batch)
    return replace(config, "parallelism.data_parallel_shard_degree", degrees.dp_shard)


def _requested_degrees(config: Config) -> Degrees:
    """The degrees as written, whose product is not the ranks."""
    values = flatten(config)
    return Degrees(*(values[key] for key in DEGREES))


def _point_config(file: SweepFile, settings: dict[str, Any]) -> Config:
    """By increasing precedence: base, the sweep's own settings, [fixed], the point."""
    given = file.fixed | settings
    config = load(["--job.config_file", given["base"]])
    values = POINT_DEFAULTS | {"metrics.log_freq": 1, "training.steps": file.steps}
    if config.lr_scheduler.total_steps is None:  # the learning rates of the first steps of the base's run
        values["lr_scheduler.total_steps"] = max(config.training.steps, config.lr_scheduler.warmup_steps)
    for name, value in (values | given).items():
        if name != "base":
            config = replace(config, name, value)
    return config


def _name(config: Config, degrees: Degrees) -> str:
    """A readable summary, and a hash of every setting that is not the default."""
    ac, layout = config.activation_checkpoint, str(degrees).replace(" x ", "-").replace("_", "").replace(" ", "")
    recompute = f"selective{ac.selective_ac_option}" if ac.mode == "selective" else ac.mode
    readable = f"{config.model.flavor}-{layout}-local{config.training.local_batch_size}-{recompute}"
    settings = {key: value for key, value in changed_keys(config).items() if key not in PATHS_AND_TEXTS}
    return f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', readable)}-{digest(settings)}"
