"""Where a run writes: resumed where the same run left checkpoints, fresh otherwise, and nothing is overwritten."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from dtron.checkpoint.store import Progress
from dtron.config import Config, load
from dtron.errors import UserError
from dtron.train.folder import choose_run_folder, run_identity
from dtron.train.setup import resolve

BASE = "--training.device cpu --checkpoint.enable"


def config_of(folder: Path, arguments: str = "") -> Config:
    return load([*BASE.split(), "--job.dump_folder", str(folder / "outputs"), *arguments.split()])


def choose(folder: Path, arguments: str = "") -> tuple[str, str | None, int]:
    """(name of the run folder, step resumed from, attempt)."""
    config = config_of(folder, arguments)
    run, checkpoint, attempt = choose_run_folder(config, resolve(config, 1).model_config)
    assert run.is_dir() and run.parent == folder / "outputs"
    return run.name, checkpoint.name if checkpoint else None, attempt


def save(folder: Path, run: str, step: int, attempt: int = 1, model_only: bool = False) -> None:
    """What a run leaves: the configuration of its attempt and a whole checkpoint."""
    (folder / "outputs" / run / ("config.toml" if attempt == 1 else f"config-attempt-{attempt}.toml")).touch()
    path = folder / "outputs" / run / "checkpoint" / f"step-{step}"
    path.mkdir(parents=True)
    (path / "dtron.json").write_text(json.dumps(asdict(Progress(step=step)) | {"model_only": model_only}))


def identity(arguments: str) -> str:
    config = load([*BASE.split(), *arguments.split()])
    return run_identity(config, resolve(config, 8).model_config)


SAME = [
    "--tp 2",
    "--pp 2 --cp 2",
    "--dp-replicate 2",
    "--training.local_batch_size 2",
    "--training.global_batch_size 64",
    "--training.steps 7",
    "--metrics.log_freq 1",
    "--validation.enable",
    "--activation_checkpoint.mode full",
    "--compile.enable",
    "--training.mixed_precision_param float32",
    "--job.description other",
    "--model.name llama3 --model.flavor debugmodel",
]
OTHER = [
    "--training.attention_mask document",
    '--training.mixture [{"dataset":"elsewhere"}]',
    '--training.mixture [{"dataset":"elsewhere","weight":2.0}]',
    "--training.dataset elsewhere",
    "--training.dataset elsewhere --training.text_column body",
    "--training.dataset owner/name --training.dataset_subset b",
    "--training.dataset owner/name --training.dataset_split test",
    "--optimizer.lr 1e-3",
    "--optimizer.weight_decay_exclude *norm*",
    "--lr_scheduler.warmup_steps 1",
    "--training.max_norm 0.5",
    "--training.seq_len 1024",
    "--model.n_layers 4",
    "--model.name llama2",
    "--model.rope_theta 1000.0",
    "--debug.seed 1",
    "--checkpoint.initial_load_path elsewhere",
]


@pytest.mark.parametrize("arguments", SAME)
def test_identity_ignores(arguments: str) -> None:
    assert identity(arguments) == identity("")


def test_identity_tells_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "dtron.json").write_text("{}")
    found = [identity(arguments) for arguments in ["", *OTHER]]
    assert len(set(found)) == len(found), found


def test_without_checkpoint_every_run_is_fresh(tmp_path: Path) -> None:
    name, checkpoint, attempt = choose(tmp_path)
    assert (checkpoint, attempt) == (None, 1) and name.startswith("llama3-debugmodel-")
    assert choose(tmp_path) == (f"{name}-2", None, 1)
    assert choose(tmp_path) == (f"{name}-3", None, 1)


def test_rerun_resumes(tmp_path: Path) -> None:
    name, _, _ = choose(tmp_path)
    save(tmp_path, name, 10)
    save(tmp_path, name, 20)
    assert choose(tmp_path) == (name, "step-20", 2)
    assert choose(tmp_path, "--training.steps 30 --training.local_batch_size 4") == (name, "step-20", 2)
    (tmp_path / "outputs" / name / "config-attempt-2.toml").touch()
    assert choose(tmp_path) == (name, "step-20", 3)
    assert choose(tmp_path, "--optimizer.lr 1") != (name, "step-20", 3)
    assert choose(tmp_path, "--checkpoint.no_enable") == (f"{name}-2", None, 1)


def test_newest_run_with_checkpoints_resumes(tmp_path: Path) -> None:
    first, second, third = (choose(tmp_path)[0] for _ in range(3))
    save(tmp_path, first, 30)
    save(tmp_path, second, 10)
    for age, name in enumerate((third, second, first)):
        os.utime(tmp_path / "outputs" / name, (10**9 - age, 10**9 - age))
    assert choose(tmp_path) == (second, "step-10", 2)


def test_what_cannot_be_resumed_from_is_passed_over(tmp_path: Path) -> None:
    name, _, _ = choose(tmp_path)
    save(tmp_path, name, 10)
    save(tmp_path, name, 20, model_only=True)  # the end of a run, for export
    (tmp_path / "outputs" / name / "checkpoint" / "step-40.partial").mkdir()  # cut short by a kill
    assert choose(tmp_path) == (name, "step-10", 2)


def test_load_step(tmp_path: Path) -> None:
    name, _, _ = choose(tmp_path)
    save(tmp_path, name, 10)
    save(tmp_path, name, 20)
    save(tmp_path, name, 30, model_only=True)
    assert choose(tmp_path, "--checkpoint.load_step 10") == (name, "step-10", 2)
    for step in (15, 30):
        with pytest.raises(UserError, match=f"checkpoint of step {step} .*set checkpoint.load_step"):
            choose(tmp_path, f"--checkpoint.load_step {step}")
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [name]


def test_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    name, _, _ = choose(tmp_path)
    (tmp_path / "outputs" / f"{name}-2").write_text("mine")
    assert choose(tmp_path) == (f"{name}-3", None, 1)
    assert (tmp_path / "outputs" / f"{name}-2").read_text() == "mine"
