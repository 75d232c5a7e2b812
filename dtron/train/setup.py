"""A checked run, and what is said of it when it starts."""

from dataclasses import dataclass

import torch

import dtron
from dtron.config import Config
from dtron.mesh import Degrees
from dtron.models.flops import active_parameters
from dtron.models.spec import ModelConfig, ModelSpec, meta_model
from dtron.observe.device import device_name
from dtron.parallel.compose import stage_plan
from dtron.parallel.float8 import describe_float8
from dtron.parallel.pipeline import StagePlan

__all__ = ["Setup", "describe", "stages_of"]


@dataclass(frozen=True)
class Setup:
    """A checked run: what is needed to build it on any rank."""

    config: Config
    degrees: Degrees
    device_type: str
    spec: ModelSpec
    model_config: ModelConfig

    def device(self, local_rank: int) -> torch.device:
        """Where a rank computes."""
        return torch.device("cuda", local_rank) if self.device_type == "cuda" else torch.device("cpu")


def describe(setup: Setup, device: torch.device) -> str:
    """Two lines for the log: versions, layout and machine; model and size."""
    c, model = setup.config, meta_model(setup.spec, setup.model_config)
    what = c.model.hf_config_path or f"{c.model.name} {c.model.flavor}"
    machines = f"{setup.degrees.world} x {device_name(device)}"
    total, active = sum(p.numel() for p in model.parameters()), active_parameters(model)
    used = f", {active / 1e6:.1f}M of them for each token" if active != total else ""
    return (
        f"dtron {dtron.__version__}, torch {torch.__version__}: {setup.degrees}, on {machines}\n"
        f"{what}: {total / 1e6:.1f}M parameters{used}{describe_float8(c)}{_rotary(setup)}"
    )


def _rotary(setup: Setup) -> str:
    """Of a Llama-like model, what its shapes do not show and its names may not mean elsewhere."""
    c, m = setup.config.model, setup.model_config
    if (theta := getattr(m, "rope_theta", None)) is None:
        return ""
    if scaling := getattr(m, "rope_scaling", None):
        return f", rotary base {theta:g}, scaled by {scaling.factor:g} ({scaling.rope_type})"
    named = c.name == "llama3" and c.flavor != "debugmodel" and not c.hf_config_path
    elsewhere = " (torchtitan's llama3 since 2025-10 is llama3.1 here)" if named else ""
    return f", rotary base {theta:g}, not scaled{elsewhere}"


def stages_of(setup: Setup) -> StagePlan | None:
    """The pipeline split of a checked run, for the log; None without pipeline parallel."""
    return stage_plan(setup.spec, setup.model_config, setup.config) if setup.degrees.pp > 1 else None
