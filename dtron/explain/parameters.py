"""Every parameter of a model in a layout, from the DTensors that `wrap_on_meta` makes."""

import copy
import dataclasses
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from dtron import registry
from dtron.compat import clean_name
from dtron.models.spec import experts_of, layers_of, meta_model
from dtron.parallel.compose import LOAD, stage_plan, wrap_on_meta
from dtron.parallel.pipeline import StagePlan, keep_modules
from dtron.parallel.tensor import tied_parameters
from dtron.train.setup import Setup
from dtron.train.step import Step

__all__ = ["describe_experts", "describe_parameters"]


def describe_parameters(setup: Setup, step: Step) -> list[dict[str, Any]]:
    """A row for each parameter, one for those of blocks that are alike. Inside the world of `setup`.

    One block of each kind and all outside of blocks are wrapped on the groups of this rank's stage; a parameter of
    another stage has the same placements on the ranks of that stage.
    """
    whole = meta_model(setup.spec, setup.model_config)
    kinds = _kinds_of_blocks(whole)
    tied = {first: second for first, second in tied_parameters(whole)}
    plan = stage_plan(setup.spec, setup.model_config, step.config) if setup.degrees.pp > 1 else None
    kept = [name for name, _ in whole.named_children() if name != "layers"] + [f"layers.{block}" for block in kinds]
    spec = dataclasses.replace(setup.spec, build=lambda config: keep_modules(setup.spec.build(config), kept))
    mesh = copy.copy(step.mesh)
    mesh.degrees = dataclasses.replace(setup.degrees, pp=1)
    names = setup.config.model.converters
    converters = [registry.look_up("converter", name, "model.converters") for name in names]
    loss = registry.look_up("loss", setup.config.training.loss, "training.loss")
    (wrapped,) = wrap_on_meta(spec, setup.model_config, step.config, mesh, loss, converters).parts
    rows = []
    for name, p in ((clean_name(name), p) for name, p in wrapped.named_parameters() if not name.endswith(LOAD)):
        row = _row(p, (_pp_rank(plan, name) - step.mesh.pp_rank) * setup.degrees.stage)
        _, block, suffix = f"{name}..".split(".", 2)
        if name.startswith("layers."):
            name = f"layers.N.{suffix.rstrip('.')}"
        rows.append(
            row | {"name": name, "layers": kinds[block] if "layers.N" in name else [], "tied_to": tied.get(name)}
        )
    return rows


def _kinds_of_blocks(model: nn.Module) -> dict[str, list[int]]:
    """Name of the first block of each kind -> all blocks that are alike."""
    kinds: dict[Any, list[int]] = {}
    for name, block in layers_of(model).items():
        kinds.setdefault(tuple((n, p.shape) for n, p in block.named_parameters()), []).append(int(name))
    return {str(blocks[0]): blocks for blocks in kinds.values()}


def _pp_rank(plan: StagePlan | None, name: str) -> int:
    """Of the rank that holds a parameter of the plain model; of a tied one the first that does."""
    if plan is None:
        return 0
    stage = next(i for i, names in enumerate(plan.modules) if any(name.startswith(f"{module}.") for module in names))
    return next(rank for rank, stages in enumerate(plan.of_rank) if stage in stages)


def _row(p: torch.Tensor, shift: int) -> dict[str, Any]:
    """shift: from this rank's stage to the one that holds the parameter, in ranks."""
    row: dict[str, Any] = {"global_shape": list(p.shape), "local_shape": list(p.shape), "placements": {}}
    row |= {"elements": p.numel(), "global_bytes": p.nbytes, "local_bytes": p.nbytes, "same_shard": None, "ranks": None}
    if not isinstance(p, DTensor):  # frozen, and the same everywhere
        return row
    mesh, local = p.device_mesh, p.to_local()
    row |= {"local_shape": list(local.shape), "local_bytes": local.nbytes}
    row["placements"] = {
        name: "Replicate" if isinstance(placement, Replicate) else f"Shard({cast(Any, placement).dim})"
        for name, placement in zip(mesh.mesh_dim_names or (), p.placements, strict=True)
    }
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    index = tuple(
        slice(None) if isinstance(placement, Replicate) else at
        for placement, at in zip(p.placements, coordinate, strict=True)
    )
    row["same_shard"] = sorted(rank + shift for rank in mesh.mesh[index].flatten().tolist())
    row["ranks"] = sorted(rank + shift for rank in mesh.mesh.flatten().tolist())
    return row


def describe_experts(setup: Setup, step: Step, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Where experts are; None without. rows: of `describe_parameters`."""
    experts, ep = experts_of(setup.model_config), step.mesh.ep
    if experts is None:
        return None
    found = next(row for row in rows if row["name"].endswith(".experts.gate_proj"))
    ranks = ep.mesh.tolist() if ep else []
    held = torch.arange(experts.n_experts).chunk(max(1, len(ranks)))
    return {
        "experts": experts.n_experts,
        "per_token": experts.top_k,
        "ranks": ranks,
        "experts_of_rank": [[int(part[0]), int(part[-1])] for part in held][: len(ranks)],
        "placements": found["placements"],
        "local_shape": found["local_shape"],
    }
