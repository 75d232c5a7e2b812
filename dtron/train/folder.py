"""Which folder a run writes to: resumed where the same run left checkpoints, fresh otherwise, never overwritten."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from dtron.checkpoint import store
from dtron.config import Config

__all__ = ["choose_run_folder", "run_identity"]


def run_identity(config: Config, model_config: Any) -> str:
    """Hash of what makes two runs the same training: model, data, optimizer and seed; not layout, length or batch size."""
    same = {
        "model": [config.model.name, dataclasses.asdict(model_config), config.model.converters],
        "optimizer": dataclasses.asdict(config.optimizer),
        "schedule": dataclasses.asdict(config.lr_scheduler),
        "data": [config.training.dataset, config.training.dataset_path, config.model.hf_assets_path],
        "seq_len": config.training.seq_len,
        "max_norm": config.training.max_norm,
        "initial": config.checkpoint.initial_load_path,
        "seed": config.debug.seed,
    }
    return hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()[:8]


def choose_run_folder(config: Config, model_config: Any) -> tuple[Path, Path | None, int]:
    """The run folder (made), the checkpoint to resume from if an earlier run of the same identity left one, the attempt."""
    stem = f"{config.model.name}-{config.model.flavor}-{run_identity(config, model_config)}"
    parent = Path(config.job.dump_folder)
    if config.checkpoint.enable:
        for folder in sorted(parent.glob(f"{stem}*"), key=lambda p: p.stat().st_mtime, reverse=True):
            checkpoint = _checkpoint_in(folder / config.checkpoint.folder, config.checkpoint.load_step)
            if checkpoint:
                return folder, checkpoint, 1 + len(list(folder.glob("config*.toml")))
    number = 1
    while (folder := parent / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    folder.mkdir(parents=True)
    return folder, None, 1


def _checkpoint_in(folder: Path, load_step: int) -> Path | None:
    if load_step == -1:
        return store.newest(folder)
    return folder / f"step-{load_step}" if load_step in store.steps_in(folder) else None
