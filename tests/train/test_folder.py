"""Where a run writes: resumed where the same run left checkpoints, fresh otherwise, and nothing is overwritten."""

import dataclasses
import functools
import json
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from dtron.checkpoint.files import Manifest, Progress
from dtron.checkpoint.load import resumable_steps
from dtron.checkpoint.storage import StoragePath
from dtron.config import Config, load, to_toml
from dtron.errors import UserError
from dtron.ranks.control import Control
from dtron.train.folder import (
    RunFolder,
    check_writable,
    checkpoint_folder,
    choose_run_folder,
    lock_run_folder,
    remove_unused,
)
from dtron.train.identity import run_identity
from dtron.train.resolve import resolve

BASE = "--training.device cpu --checkpoint.enable"
TOKENIZER = "--model.hf_assets_path tokenizer"  # text has to have one


def config_of(folder: Path, arguments: str = "") -> Config:
    return load([*BASE.split(), "--job.dump_folder", str(folder / "outputs"), *arguments.split()])


def choose(folder: Path, arguments: str = "") -> tuple[str, str | None, int]:
    """(name of the run folder, newest step it could be resumed from, attempt)."""
    config = config_of(folder, arguments)
    run = choose_run_folder(config, resolve(config, 1).model_config)
    assert run.path.is_dir() and run.path.parent == folder / "outputs"
    steps = resumable_steps(checkpoint_folder(config.checkpoint, run.path)) if config.checkpoint.enable else []
    assert run.resumes == bool(steps)
    return run.path.name, f"step-{steps[0]}" if steps else None, run.attempt


def save(folder: Path, run: str, step: int, attempt: int = 1, model_only: bool = False) -> None:
    """What a run leaves: the configuration of its attempt and a whole checkpoint."""
    (folder / "outputs" / run / ("config.toml" if attempt == 1 else f"config-attempt-{attempt}.toml")).touch()
    path = folder / "outputs" / run / "checkpoint" / f"step-{step}"
    path.mkdir(parents=True)
    (path / "dtron.json").write_bytes(Manifest(Progress(step=step, model_only=model_only), {}).to_json())


def identity(arguments: str) -> str:
    config = load([*BASE.split(), *TOKENIZER.split(), *arguments.split()])
    return run_identity(config, resolve(config, 8).model_config)


SAME = [
    "--tp 2",
    "--pp 2 --cp 2",
    "--dp-replicate 2",
    "--training.local_batch_size 2",
    "--training.global_batch_size 64",
    "--training.steps 7",
    "--lr_scheduler.total_steps 10000",
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
    "--checkpoint.initial_load_path elsewhere --checkpoint.no_initial_load_model_only",
    "--checkpoint.initial_load_path elsewhere --checkpoint.exclude_from_loading lm_head.*",
]


@pytest.mark.parametrize("arguments", SAME)
def test_identity_ignores(arguments: str) -> None:
    assert identity(arguments) == identity("")


def test_identity_tells_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "dtron.json").write_bytes(Manifest(Progress(), {}).to_json())
    found = [identity(arguments) for arguments in ["", *OTHER]]
    assert len(set(found)) == len(found), found


def left_by(folder: Path, run: str, arguments: str = "") -> None:
    """What a run leaves that was killed before its first checkpoint."""
    (folder / "outputs" / run / "config.toml").write_text(to_toml(config_of(folder, arguments)))
    (folder / "outputs" / run / "metrics.jsonl").touch()


def test_without_checkpoints_every_run_is_fresh(tmp_path: Path) -> None:
    off = "--checkpoint.no_enable"
    name, checkpoint, attempt = choose(tmp_path, off)
    assert (checkpoint, attempt) == (None, 1) and name.startswith("llama3-debugmodel-")
    left_by(tmp_path, name, off)
    assert choose(tmp_path, off) == (f"{name}-2", None, 1)
    assert choose(tmp_path, off) == (f"{name}-3", None, 1)


LLAMA = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "intermediate_size": 768,
}  # fmt: skip


def config_json(file: Path) -> Path:
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(LLAMA))
    return file


@pytest.mark.parametrize(
    ("file", "given", "title"),
    [
        ("models/Falcon3-7B/config.json", "models/Falcon3-7B", "Falcon3-7B"),
        ("models/Falcon3-7B/config.json", "models/Falcon3-7B/config.json", "Falcon3-7B"),
        ("a model, mine/config.json", "a model, mine", "a-model-mine"),
        ("models--tii--Falcon3-7B/snapshots/0a1b/config.json", "models--tii--Falcon3-7B/snapshots/0a1b", "Falcon3-7B"),
        ("sizes/falcon3.json", "sizes/falcon3.json", "falcon3"),
        ("run/checkpoint/step-500/config.json", "run/checkpoint/step-500", "llama"),
        ("x/hf/config.json", "x/hf/", "llama"),
    ],
)  # fmt: skip
def test_a_run_with_a_config_json_is_named_by_its_model(file: str, given: str, title: str, tmp_path: Path) -> None:
    config_json(tmp_path / file)
    arguments = ["--job.dump_folder", str(tmp_path / "out"), "--model.hf_config_path", f"{tmp_path}/{given}"]
    config = load([*BASE.split(), *arguments])
    model_config = resolve(config, 1).model_config
    name = choose_run_folder(config, model_config).path.name
    assert name == f"{title}-{run_identity(config, model_config)}"


def test_a_run_of_a_config_json_is_found_under_an_older_name_and_after_a_move(tmp_path: Path) -> None:
    folder = config_json(tmp_path / "models" / "Falcon3-7B" / "config.json").parent
    arguments = f"--model.hf_config_path {folder}"
    name, _, _ = choose(tmp_path, arguments)
    save(tmp_path, name, 10)
    assert choose(tmp_path, arguments) == (name, "step-10", 2)
    for older in (name.replace("Falcon3-7B", "llama3-debugmodel"), "llama3-debugmodel-0a1b2c3d"):
        (tmp_path / "outputs" / name).rename(tmp_path / "outputs" / older)
        (tmp_path / "outputs" / older / "config.toml").write_text(to_toml(config_of(tmp_path, arguments)))
        assert choose(tmp_path, arguments) == (older, "step-10", 2)
        assert choose(tmp_path, f"{arguments} --debug.seed 1")[1] is None
        (tmp_path / "outputs" / older).rename(tmp_path / "outputs" / name)
    moved = folder.rename(folder.with_name("my-falcon"))
    assert choose(tmp_path, f"--model.hf_config_path {moved}") == (name, "step-10", 2)


def test_a_field_that_a_later_version_adds_makes_no_run_another_one() -> None:
    config = load(BASE.split())
    fields = [("dim", int), ("scaling", Any, None)]
    before = dataclasses.make_dataclass("Sizes", fields)(64)
    after = dataclasses.make_dataclass("Sizes", [*fields, ("windows", tuple, ())])
    assert run_identity(config, before) == run_identity(config, after(64))
    assert len({run_identity(config, size) for size in (before, after(65), after(64, 1), after(64, None, (4,)))}) == 4


def test_a_run_that_saved_nothing_yet_begins_again_in_its_folder(tmp_path: Path) -> None:
    name, _, _ = choose(tmp_path)
    assert choose(tmp_path) == (name, None, 1), "it failed before it wrote anything"
    left_by(tmp_path, name)
    assert choose(tmp_path) == (name, None, 2)
    left_by(tmp_path, name, "--checkpoint.no_enable")  # of a run that was never to save: not this one's
    assert choose(tmp_path) == (f"{name}-2", None, 1)
    (tmp_path / "outputs" / f"{name}-2" / "mine").touch()
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
    first, second, third = (choose(tmp_path, "--checkpoint.no_enable")[0] for _ in range(3))
    save(tmp_path, first, 30)
    save(tmp_path, second, 10)
    for age, name in enumerate((third, second, first)):
        os.utime(tmp_path / "outputs" / name, (10**9 - age, 10**9 - age))
    assert choose(tmp_path) == (second, "step-10", 2)


def test_what_cannot_be_resumed_from_is_passed_over(tmp_path: Path) -> None:
    name, _, _ = choose(tmp_path)
    save(tmp_path, name, 10)
    save(tmp_path, name, 20, model_only=True)  # the end of a run, for export
    (tmp_path / "outputs" / name / "checkpoint" / "step-40.partial-1").mkdir()  # cut short by a kill
    assert choose(tmp_path) == (name, "step-10", 2)


def test_load_step(tmp_path: Path) -> None:
    name, _, _ = choose(tmp_path)
    save(tmp_path, name, 10)
    save(tmp_path, name, 20)
    save(tmp_path, name, 30, model_only=True)
    assert choose(tmp_path, "--checkpoint.load_step 10") == (name, "step-20", 2)
    with pytest.raises(UserError, match="checkpoint of step 10 .*set checkpoint.load_step"):
        choose(tmp_path, "--checkpoint.load_step 10 --debug.seed 1")
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [name]


def test_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    name, _, _ = choose(tmp_path, "--checkpoint.no_enable")
    (tmp_path / "outputs" / f"{name}-2").write_text("mine")
    assert choose(tmp_path, "--checkpoint.no_enable") == (f"{name}-3", None, 1)
    assert (tmp_path / "outputs" / f"{name}-2").read_text() == "mine"


def begun(folder: Path, arguments: str = "") -> str:
    """What the user is told when a run is chosen; it leaves its configuration and a checkpoint."""
    config = config_of(folder, arguments)
    run = choose_run_folder(config, resolve(config, 1).model_config)
    if not run.resumes:
        save(folder, run.path.name, 10)
        (run.path / "config.toml").write_text(to_toml(config))
    return run.message


def test_a_changed_run_is_told_by_the_changed_key(tmp_path: Path) -> None:
    assert begun(tmp_path) == begun(tmp_path) == ""  # the first run, and its resume
    assert "differs in debug.seed (1 here, 0 there)" in begun(tmp_path, "--debug.seed 1")
    told = begun(tmp_path, "--debug.seed 1 --model.vocab_size 512")
    assert "differs in model.vocab_size (512 here, None there)" in told and "debug.seed" not in told
    assert "training.dataset ('owner/name' here, 'stdlib' there)" in begun(
        tmp_path, f"--training.dataset owner/name {TOKENIZER}"
    )
    told = begun(tmp_path, "--checkpoint.no_enable")
    assert "is of an earlier run, which is not resumed (checkpoint.enable is false)" in told and "differs" not in told


@pytest.mark.parametrize("again", ["data/mine/", "./data/mine", "data/../data//mine", "{}/data/mine", "link"])
def test_a_path_written_otherwise_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data/mine", "other/mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to("data/mine")
    again = again.format(tmp_path)
    assert begun(tmp_path, f"--training.dataset data/mine {TOKENIZER}") == ""
    for arguments in (f"--training.dataset {again} {TOKENIZER}", f"--training.dataset data/mine {TOKENIZER}"):
        assert choose(tmp_path, arguments)[1:] == ("step-10", 2)
    assert begun(tmp_path, f'--training.mixture [{{"dataset":"data/mine"}},{{"dataset":"{again}/a.txt"}}] {TOKENIZER}')
    assert (
        choose(tmp_path, f'--training.mixture [{{"dataset":"link/"}},{{"dataset":"data/mine/a.txt"}}] {TOKENIZER}')[1]
        == "step-10"
    )
    told = begun(tmp_path, f"--training.dataset other/mine {TOKENIZER}")
    assert "differs in training.dataset ('other/mine' here, 'data/mine' there)" in told
    assert choose(tmp_path, f"--training.dataset {again} {TOKENIZER}")[1] == "step-10"


def test_a_project_that_is_moved_keeps_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "before" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "before")
    assert begun(tmp_path / "before", f"--training.dataset data {TOKENIZER}") == ""
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path / "after")
    assert choose(tmp_path / "after", f"--training.dataset data {TOKENIZER}")[1] == "step-10"
    assert choose(tmp_path / "after", f"--training.dataset {tmp_path}/after/data {TOKENIZER}")[1] == "step-10"


# --- continuing a run with other hyperparameters


def continued(folder: Path, run: str, arguments: str) -> RunFolder:
    config = config_of(folder, f"--checkpoint.resume_run {folder}/outputs/{run} {arguments}")
    return choose_run_folder(config, resolve(config, 1).model_config)


def test_hyperparameters_change_where_the_run_is_named(tmp_path: Path) -> None:
    begun(tmp_path)
    name, _, _ = choose(tmp_path)
    told = begun(tmp_path, "--optimizer.lr 1e-5")
    named = f"checkpoint.resume_run = {tmp_path}/outputs/{name}"
    assert told.endswith(f"; {named} would continue that one with these values")
    assert "resume_run" not in begun(tmp_path, "--optimizer.lr 1e-5 --debug.seed 1")
    lower = (
        "--optimizer.lr 2e-5 --optimizer.beta2 0.9 --optimizer.weight_decay 0.2 --training.max_norm 0.5 "
        "--lr_scheduler.warmup_steps 7 --lr_scheduler.decay_type cosine"
    )
    run = continued(tmp_path, name, lower)
    assert (run.path.name, run.resumes, run.attempt) == (name, True, 2)
    said = "optimizer.lr (2e-05 here, 0.0008 there), optimizer.beta2 (0.9 here, 0.95 there), "
    assert run.message.startswith(f"changed since the last attempt: {said}") and "cosine" in run.message
    # From there on the run is the one with the lower rate, also unnamed; and the first command is another one.
    (run.path / "config-attempt-2.toml").write_text(to_toml(config_of(tmp_path, lower)))
    assert choose(tmp_path, lower) == (name, "step-10", 3)
    assert begun(tmp_path).startswith("a run of its own, not a resume of ")
    assert choose(tmp_path)[0] == f"{name}-2" and choose(tmp_path, lower)[0] == name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--debug.seed 1", "is of another training: debug.seed (1 here, 0 there); "),
        ("--optimizer.name SGD --optimizer.lr 1", "is of another training: optimizer.name ('SGD' here, 'AdamW' there)"),
        ("--model.n_layers 4", "model.n_layers (4 here, None there)"),
        ("--training.seq_len 64", "training.seq_len (64 here, 2048 there)"),
        ("--checkpoint.resume_run nowhere", "nowhere is no run folder: it has no config.toml"),
        ("--checkpoint.resume_run {}/empty", "has no checkpoint to continue from"),
        ("--checkpoint.no_enable", "checkpoint.resume_run has no effect without checkpoint.enable = true"),
    ],
)
def test_what_no_run_is_continued_with(tmp_path: Path, arguments: str, says: str) -> None:
    begun(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.toml").touch()
    with pytest.raises(UserError, match=re.escape(says)):
        continued(tmp_path, choose(tmp_path)[0], arguments.format(tmp_path))


# --- a start that is refused


def refused(folder: Path, error: Exception, *foreign: str) -> RunFolder:
    """A start that makes a run folder, writes what it writes there, and fails."""
    config = config_of(folder, "--checkpoint.folder some/checkpoints")
    run = choose_run_folder(config, resolve(config, 1).model_config)
    lock = lock_run_folder(run.path)
    control = Control(0)
    control.start_run(run.path, undo=functools.partial(remove_unused, run.made, config.checkpoint))
    check_writable(checkpoint_folder(config.checkpoint, run.path), 0)
    control.heartbeat("loading", 1.0)
    for name in foreign:
        (run.path / name).write_text("content")
    control.failed(error)
    lock.close()
    return run


def test_a_refused_start_leaves_nothing(tmp_path: Path) -> None:
    run = refused(tmp_path, UserError("the tokenizer is too large"))
    assert run.path.parent == tmp_path / "outputs" and list(tmp_path.iterdir()) == []
    (tmp_path / "outputs").mkdir()
    refused(tmp_path, UserError("again"))
    refused(tmp_path, UserError("of its first batch"), "config.toml")
    assert list(tmp_path.iterdir()) == [tmp_path / "outputs"] and list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "foreign"),
    [
        (RuntimeError("a fault"), []),
        (UserError("at step 7"), ["config.toml", "metrics.jsonl"]),
        (UserError("at start"), ["mine.txt"]),
    ],
)
def test_a_run_folder_with_anything_else_in_it_stays(tmp_path: Path, error: Exception, foreign: list[str]) -> None:
    run = refused(tmp_path, error, *foreign)
    assert str(error) in (run.path / "FAILED").read_text() and all((run.path / name).exists() for name in foreign)


def _held(folder: str, answers: Any) -> None:
    try:
        lock_run_folder(Path(folder))
        answers.put("held")
    except UserError as error:
        answers.put(str(error))


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()

    def try_to_hold() -> str:
        process = context.Process(target=_held, args=(str(tmp_path), answers))
        process.start()
        process.join()
        return answers.get(timeout=10)

    file = lock_run_folder(tmp_path)
    said = try_to_hold()
    assert f"is in use by process {os.getpid()} on " in said and "another job.dump_folder" in said
    file.close()
    assert try_to_hold() == "held"
    lock_run_folder(tmp_path)  # the process that held it has ended


def _check_as_nobody(folder: str, answers: Any) -> None:
    os.setgid(65534)
    os.setuid(65534)
    try:
        check_writable(StoragePath.at(folder), 0)
        answers.put("")
    except UserError as error:
        answers.put(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_folder_without_write_permission(tmp_path: Path, mode: int) -> None:
    for part in (tmp_path, *tmp_path.parents):
        if part.stat().st_mode & 0o055 != 0o055:
            part.chmod(0o755)
    (tmp_path / "run").mkdir(mode=0o777)
    (tmp_path / "run").chmod(mode)
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    process = context.Process(target=_check_as_nobody, args=(str(tmp_path / "run"), answers))
    process.start()
    said = answers.get(timeout=10)
    process.join()
    if mode == 0o777:
        assert said == "" and list((tmp_path / "run").iterdir()) == []
    else:
        assert "no checkpoint can be written to" in said and "Permission denied" in said


def test_something_that_is_no_folder_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="no checkpoint can be written to"):
        check_writable(StoragePath.at(tmp_path / "file" / "checkpoint"), 0)
    assert (tmp_path / "file").read_text() == "mine"


def test_checkpoints_behind_a_url_get_a_folder_a_run(tmp_path: Path) -> None:
    config = config_of(tmp_path, "--checkpoint.folder memory://bucket/runs")
    assert checkpoint_folder(config.checkpoint, tmp_path / "llama3-x").url == "memory://bucket/runs/llama3-x"
    assert checkpoint_folder(config_of(tmp_path).checkpoint, tmp_path / "x") == StoragePath.at(
        tmp_path / "x" / "checkpoint"
    )


def rows_of_a_save(folder: Path, run: str) -> None:
    """What the metrics of a run say that has saved."""
    row = {"step": 20, "checkpoint_stall_s": 0.1, "checkpoint_save_s": 0.5}
    (folder / "outputs" / run / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"step": 21}) + "\n")


@pytest.mark.parametrize("how", ["deleted", "another disk", "the whole folder is elsewhere"])
def test_a_run_whose_checkpoints_are_gone_asks_before_it_starts_over(tmp_path: Path, how: str) -> None:
    name, _, _ = choose(tmp_path)
    left_by(tmp_path, name)
    save(tmp_path, name, 20)
    rows_of_a_save(tmp_path, name)
    assert choose(tmp_path) == (name, "step-20", 2)
    arguments = f"--checkpoint.folder file://{tmp_path}/disk" if how == "another disk" else ""
    if how == "deleted":
        shutil.rmtree(tmp_path / "outputs" / name / "checkpoint" / "step-20")
    elif not arguments:
        (tmp_path / "outputs" / name / "checkpoint").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"has saved checkpoints, the last one of step 20, .* checkpoint.allow_restart"):
        choose(tmp_path, arguments)
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [name], "no other folder is begun"
    config = config_of(tmp_path, f"{arguments} --checkpoint.allow_restart")
    said = choose_run_folder(config, resolve(config, 1).model_config).message
    assert said.startswith("beginning again at step 1, as checkpoint.allow_restart allows: ") and "of step 20" in said
    again = choose(tmp_path, f"{arguments} --checkpoint.allow_restart")
    assert again[1:] == (None, 1 if arguments else 2), "the old folder is kept for what it may still hold"
    assert choose(tmp_path, "--debug.seed 1")[1:] == (None, 1), "another run is not concerned"


def test_a_folder_from_the_future_is_not_the_newest(tmp_path: Path) -> None:
    first, second = (choose(tmp_path, "--checkpoint.no_enable")[0] for _ in range(2))
    for name, age_s in ((first, -2 * 86400), (second, 60)):
        save(tmp_path, name, 10)
        os.utime(tmp_path / "outputs" / name, (time.time() - age_s,) * 2)
    assert choose(tmp_path)[0] == second
