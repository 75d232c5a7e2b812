"""Which folder a run writes to: resumed where the same run left checkpoints, fresh otherwise, never overwritten."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from dtron.checkpoint import store
from dtron.config import Config
from dtron.errors import UserError

__all__ = ["choose_run_folder", "run_identity"]


def run_identity(config: Config, model_config: Any) -> str:
    """Hash of what makes two runs the same training: model, data, optimizer, seed; not layout, length or batch size."""
    t = config.training
    one = [t.dataset, t.dataset_path, t.dataset_subset, t.dataset_split, t.text_column]
    same = {
        "model": [config.model.name, dataclasses.asdict(model_config), config.model.converters],
        "optimizer": dataclasses.asdict(config.optimizer),
        "schedule": dataclasses.asdict(config.lr_scheduler),
        "loss": t.loss,
        "data": [[dataclasses.asdict(source) for source in t.mixture] or one, config.model.hf_assets_path],
        "attention_mask": t.attention_mask,
        "shuffle_documents": t.shuffle_documents,
        "seq_len": t.seq_len,
        "max_norm": t.max_norm,
        "initial": config.checkpoint.initial_load_path,
        "seed": config.debug.seed,
    }
    return hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()[:8]


def choose_run_folder(config: Config, model_config: Any) -> tuple[Path, Path | None, int]:
    """The run folder (made), the checkpoint to resume from if a run of the same identity left one, and the attempt.

    UserError where checkpoint.load_step names a step that cannot be resumed from.
    """
    stem = f"{config.model.name}-{config.model.flavor}-{run_identity(config, model_config)}"
    parent, c = Path(config.job.dump_folder), config.checkpoint
    if c.enable:
        for folder in sorted(parent.glob(f"{stem}*"), key=lambda p: p.stat().st_mtime, reverse=True):
            checkpoint = _checkpoint_in(folder / c.folder, c.load_step)
            if checkpoint:
                return folder, checkpoint, 1 + len(list(folder.glob("config*.toml")))
        if c.load_step != -1:
            raise UserError(
                f"no run of this model, data and optimizer in {parent} has a whole checkpoint of step {c.load_step} "
                "with optimizer state; set checkpoint.load_step to one that is there, or -1 for the newest"
            )
    number = 1
    while True:
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder, None, 1
        except FileExistsError:
            number += 1


def _checkpoint_in(folder: Path, load_step: int) -> Path | None:
    if damaged := store.damaged_in(folder):
        raise UserError(
            f"{damaged[-1]} has no {store.PROGRESS_FILE}: it is damaged and cannot be resumed; move it away to go on "
            "from the checkpoint before it"
        )
    if load_step == -1:
        return store.newest(folder)
    path = folder / f"step-{load_step}"
    whole = load_step in store.steps_in(folder) and not store.read_progress(path).model_only
    return path if whole else None
