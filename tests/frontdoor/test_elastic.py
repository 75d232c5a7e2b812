"""A run that is stopped, resumed or damaged, as its user sees it: through torchrun and train.py."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from frontdoor import CONFIG, ROOT, Run, torchrun
from warm import Warm, children, ranks_of

from dtron.__main__ import main
from dtron.checkpoint.files import find_damage, read_manifest
from dtron.checkpoint.storage import StoragePath
from dtron.models.hf import to_hf_config
from dtron.models.llama import LlamaConfig
from dtron.models.rope import Llama3Scaling
from dtron.observe.metrics import read_metrics

SAVING = CONFIG + "[checkpoint]\nenable = true\ninterval = 4\n[debug]\ndeterministic = true\n"
ENDLESS = SAVING.replace("steps = 20", "steps = 100000").replace("interval = 4", "interval = 100000")
TWO = ("--training.local_batch_size", "4")


def later(value: Any) -> Any:
    """A case that `make test-long` tries: it differs from its neighbour by little, and costs as much."""
    return pytest.param(value, marks=pytest.mark.long)


NUMBERS = ("loss", "grad_norm", "lr", "tokens")


def curve(folder: Path) -> list[list[Any]]:
    """Loss, gradient norm, learning rate and tokens of every step of the only run."""
    (path,) = folder.glob("outputs/*/metrics.jsonl")
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [[row[name] for name in NUMBERS] for row in rows]


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(f"outputs/*/{pattern}")
    return path


def good(run: Run) -> Run:
    assert run.code == 0, run.everything()
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """The run on two ranks that nothing ever happened to."""
    folder = tmp_path_factory.mktemp("whole")
    good(torchrun(folder, 2, *TWO, config=SAVING))
    return curve(folder)


# --- resuming


@pytest.mark.long
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_resume_on_the_same_layout_is_bit_for_bit(tmp_path: Path, whole: list[list[Any]], mode: str) -> None:
    """From a fresh process; the schedule has its length, so that the first part is the whole run's.

    `test_goodput_goes_on_over_restarts` sees the same of fewer steps.
    """
    arguments = (*TWO, "--lr_scheduler.total_steps", "20", "--checkpoint.async_mode", mode)
    good(torchrun(tmp_path, 2, *arguments, "--training.steps", "10", config=SAVING))
    run = good(torchrun(tmp_path, 2, *arguments, config=SAVING))
    assert "resuming from" in run.out[0] and "checkpoint/step-10\n" in run.out[0]
    assert curve(tmp_path) == whole


FEW = [(10, 1, ""), (20, 2, "--pp 2")]
MORE = [(6, 1, ""), (12, 2, "--tp 2"), (20, 4, "--pp 2 --dp 2 --training.local_batch_size 4")]


@pytest.mark.parametrize("parts", [FEW, later(MORE)], ids=["two parts", "three parts"])
def test_resume_on_other_layouts(tmp_path: Path, whole: list[list[Any]], parts: list[tuple[int, int, str]]) -> None:
    """The same with more layouts, without torchrun, is in tests/train/test_elastic_data.py."""
    arguments = ("--lr_scheduler.total_steps", "20", "--training.global_batch_size", "8")
    for steps, ranks, layout in parts:
        good(torchrun(tmp_path, ranks, *arguments, "--training.steps", str(steps), *layout.split(), config=SAVING))
    assert curve(tmp_path) == [pytest.approx(row, rel=1e-4) for row in whole]


@pytest.mark.long
def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    """Random numbers of a step do not depend on how often the run was stopped before it."""
    config = SAVING.replace('dataset = "uneven"\nseq', 'dataset = "uneven"\nloss = "dropping"\nseq')
    assert config != SAVING
    arguments = (*TWO, "--lr_scheduler.total_steps", "6")
    curves = []
    for name, parts in (("whole", ["6"]), ("parts", ["2", "6"])):
        (tmp_path / name).mkdir()
        for steps in parts:
            good(torchrun(tmp_path / name, 2, *arguments, "--training.steps", steps, config=config))
        curves.append(curve(tmp_path / name))
    assert curves[0] == curves[1]


@pytest.mark.parametrize("how", [later("truncated"), "flipped", later("missing"), later("no manifest")])
def test_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, whole: list[list[Any]], how: str) -> None:
    arguments = (*TWO, "--lr_scheduler.total_steps", "20")
    good(torchrun(tmp_path, 2, *arguments, "--training.steps", "8", config=SAVING))
    newest = only(tmp_path, "checkpoint/step-8")
    file = newest / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    else:
        (file if how == "missing" else newest / "dtron.json").unlink()
    run = good(torchrun(tmp_path, 2, *arguments, config=SAVING))
    name = "dtron.json" if how == "no manifest" else "__1_0.distcp"
    assert "step-8 is " in run.out[0] and name in run.out[0] and "going back to the checkpoint before it" in run.out[0]
    assert "checkpoint/step-4\n" in run.out[0] and newest.with_name("step-8.damaged").is_dir()
    assert curve(tmp_path) == whole
    assert find_damage(StoragePath.at(newest), read_manifest(StoragePath.at(newest)).files.items()) == []


@pytest.mark.long
def test_nothing_starts_from_scratch_where_all_is_damaged(tmp_path: Path) -> None:
    good(torchrun(tmp_path, 1, "--training.steps", "2", config=SAVING))
    only(tmp_path, "checkpoint/step-2/dtron.json").write_text("{")
    run = torchrun(tmp_path, 1, "--training.steps", "4", config=SAVING)
    assert run.code != 0 and "nothing starts from scratch on its own" in run.err[0]
    assert run.err[0].count("error:") == 1 and "Traceback" not in run.err[0]


# --- signals


def after_steps(folder: Path, action: Callable[[Warm], None]) -> Callable[..., None]:
    def meanwhile(agent: Warm) -> None:
        end = time.monotonic() + 150
        while sum(path.read_bytes().count(b"\n") for path in folder.glob("outputs/*/metrics.jsonl")) < 3:
            assert time.monotonic() < end and agent.poll() is None
            time.sleep(0.05)
        action(agent)

    return meanwhile


def stopped(folder: Path, action: Callable[[Warm], None], *arguments: str) -> Run:
    run = torchrun(folder, 2, *TWO, *arguments, config=ENDLESS, meanwhile=after_steps(folder, action))
    assert "Traceback" not in "".join(run.err), run.everything()
    return run


def check_saved(folder: Path) -> int:
    """The step of the marker, whose checkpoint is the only one, whole, and the last that was done."""
    marker = json.loads(only(folder, "SAVED").read_text())
    checkpoint = only(folder, "checkpoint/step-*")
    assert (
        marker["checkpoint"].endswith(f"checkpoint/step-{marker['step']}") and checkpoint.name in marker["checkpoint"]
    )
    assert find_damage(StoragePath.at(checkpoint), read_manifest(StoragePath.at(checkpoint)).files.items()) == []
    assert len(curve(folder)) == marker["step"]
    return marker["step"]


@pytest.mark.parametrize("name", ["SIGUSR1", later("SIGTERM"), later("SIGINT")])
def test_a_signal_on_one_rank_saves_on_all(tmp_path: Path, name: str) -> None:
    """Delivered twice, as torchrun does with SIGUSR1."""

    def send(agent: Warm) -> None:
        for _ in range(2):
            os.kill(ranks_of(agent.pid)[1], getattr(signal, name))
            time.sleep(0.01)

    run = good(stopped(tmp_path, send, "--checkpoint.async_mode", "async"))
    step = check_saved(tmp_path)
    assert run.err == ["", ""] and f"stop requested by a signal: saving after step {step}" in run.out[0]
    assert f"stopped by a signal after step {step}, which is saved" in run.out[0]
    goes_on = good(torchrun(tmp_path, 1, "--training.steps", str(step + 2), config=ENDLESS))
    assert f"checkpoint/step-{step}\n" in goes_on.out[0]
    assert not list(tmp_path.glob("outputs/*/SAVED")), "the marker is of the attempt that it ended"


def test_a_file_stops_a_run_and_others_tell_how_it_went(tmp_path: Path) -> None:
    """What a batch script does: it makes STOP and reads the rest."""
    control = tmp_path / "control"
    own = ("--job.control_folder", str(control))
    run = good(stopped(tmp_path, lambda agent: (control / "STOP").touch(), *own))
    saved, beat = (json.loads((control / name).read_text()) for name in ("SAVED", "HEARTBEAT"))
    assert "stopped by the file STOP" in run.out[0] and saved["checkpoint"].endswith(f"step-{saved['step']}")
    assert saved["by"] == "the file STOP"
    assert beat["run_folder"] == str(only(tmp_path, "metrics.jsonl").parent) and beat["phase"] == "finishing"
    assert {path.name for path in control.iterdir()} == {"SAVED", "HEARTBEAT"}
    good(torchrun(tmp_path, 1, "--training.steps", str(saved["step"] + 1), *own, config=ENDLESS))
    assert {path.name for path in control.iterdir()} == {"DONE", "HEARTBEAT"}
    torchrun(tmp_path, 1, "--tp", "3", *own, config=ENDLESS)
    failed = json.loads((control / "FAILED").read_text())
    assert failed["kind"] == "mistake" and "world size" in failed["message"]


@pytest.mark.parametrize("name", ["SIGTERM", later("SIGINT")])
def test_a_signal_to_torchrun_saves(tmp_path: Path, name: str) -> None:
    """And to everything below it, as Slurm signals every process of a step."""
    began = time.monotonic()

    def send(agent: Warm) -> None:
        ranks = ranks_of(agent.pid)
        loaders = [pid for rank in ranks for pid in children(rank)]
        assert len(loaders) >= 2
        for pid in (*loaders, *ranks, agent.pid):
            os.kill(pid, getattr(signal, name))

    run = stopped(tmp_path, send, "--training.dataloader.num_workers", "1")
    check_saved(tmp_path)
    assert time.monotonic() - began < 120
    assert "which is saved" in run.out[0], run.everything()


@pytest.mark.long
def test_loader_workers_that_are_signalled_too_do_not_break_the_save(tmp_path: Path) -> None:
    """The same without torchrun, which so ends well."""

    def send(agent: Warm) -> None:
        ranks = ranks_of(agent.pid)
        loaders = [pid for rank in ranks for pid in children(rank)]
        assert len(loaders) >= 2
        for pid in (*loaders, *ranks):
            os.kill(pid, signal.SIGTERM)

    good(stopped(tmp_path, send, "--training.dataloader.num_workers", "1"))
    check_saved(tmp_path)


def test_a_killed_data_worker_saves_and_is_named(tmp_path: Path) -> None:
    """As the system does when memory is short: one message, from rank 0, and the same command resumes."""
    killed: list[int] = []

    def kill(agent: Warm) -> None:
        killed.append(children(ranks_of(agent.pid)[1])[0])
        os.kill(killed[0], signal.SIGKILL)

    run = stopped(tmp_path, kill, "--training.dataloader.num_workers", "1")
    assert run.code != 0 and run.err[1] == "" and run.err[0].count("\n") == 1, run.everything()
    checkpoint = only(tmp_path, "checkpoint/step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    told = (
        f"error: rank 1: its data worker process {killed[0]} (exit code -9) was killed, which the system does when mem"
    )
    assert told in run.err[0] and f"; step {step} is saved, and the same command resumes" in run.err[0]
    assert len(curve(tmp_path)) == step and not list(tmp_path.glob("outputs/*/SAVED"))
    failed = json.loads(only(tmp_path, "FAILED").read_text())
    assert failed["kind"] == "lost" and failed["message"] in run.err[0]


def test_a_signal_without_checkpoints_is_no_success(tmp_path: Path) -> None:
    run = stopped(tmp_path, lambda agent: os.kill(ranks_of(agent.pid)[0], signal.SIGTERM), "--checkpoint.no_enable")
    assert run.code != 0 and not list(tmp_path.glob("outputs/*/SAVED"))
    assert "and nothing was saved: checkpoint.enable is false" in run.err[0]


# --- saves that fail


def test_a_last_save_that_fails_is_no_success(tmp_path: Path) -> None:
    config = SAVING.replace('"frontdoor_parts"', '"frontdoor_parts", "frontdoor_full_disk"')
    run = torchrun(tmp_path, 2, *TWO, "--training.steps", "10", config=config)
    assert run.code != 0
    told = "warning: the checkpoint of step 8 could not be saved (rank 1: OSError: [Errno 28] No space left on device)"
    assert told in run.out[0], run.everything()
    assert "error: the checkpoint of step 10 could not be saved: rank 1: OSError: [Errno 28] No space" in run.err[0]
    assert [path.name for path in only(tmp_path, "checkpoint").iterdir()] == ["step-4"]
    rows = [json.loads(line) for line in only(tmp_path, "metrics.jsonl").read_text().splitlines()]
    assert [row["failed_saves"] for row in rows if "failed_saves" in row] == [1, 2]
    assert max(row["step"] for row in rows) == 10, "the training went on"


def test_goodput_goes_on_over_restarts(tmp_path: Path, whole: list[list[Any]]) -> None:
    """And the training bit for bit, from a fresh process."""
    arguments = (*TWO, "--lr_scheduler.total_steps", "20", "--checkpoint.async_mode", "async")
    for steps in ("6", "9"):
        good(run := torchrun(tmp_path, 2, *arguments, "--training.steps", steps, config=SAVING))
    assert "resuming from" in run.out[0] and "checkpoint/step-6\n" in run.out[0]
    assert curve(tmp_path) == whole[:9]
    rows = [json.loads(line) for line in only(tmp_path, "metrics.jsonl").read_text().splitlines()]
    accounts = [row for row in rows if "goodput" in row]
    first, last = (next(r for r in reversed(accounts) if r["attempt"] == attempt) for attempt in (1, 2))
    assert last["spent_s/down"] > 0 and last["spent_s/startup"] > first["spent_s/startup"] > 0
    a_step = last["spent_s/steps"] / 9
    assert last["spent_s/steps"] > first["spent_s/steps"] > 0 and last["spent_s/replayed"] < a_step / 2
    parts = sum(value for key, value in last.items() if key.startswith("spent_s/"))
    assert parts == pytest.approx(last["unix_s"] - accounts[0]["unix_s"] + sum(
        value for key, value in accounts[0].items() if key.startswith("spent_s/")
    ), rel=1e-3)  # fmt: skip
    # What is between two measurements: on a machine with much else to do a fiftieth of all was seen.
    assert all(abs(row["spent_s/other"]) < max(0.2, parts / 25) for row in accounts)
    assert "goodput" in run.out[0] and "start-up" in run.out[0]
    assert [row["step"] for row in rows if "checkpoint_stall_s" in row] == [4, 6, 8, 9]


# --- beginning from other weights

TORCHTITAN = ROOT / "tests/hf/torchtitan/step-5"
TITAN = f"""
[model]
name = "llama3.1"
n_layers = 2
dim = 64
n_heads = 4
n_kv_heads = 2
ffn_dim = 256
vocab_size = 2048
[training]
device = "cpu"
dataset = "uneven"
seq_len = 64
local_batch_size = 2
steps = 1
mixed_precision_param = "float32"
[metrics]
log_freq = 1
enable_tensorboard = false
[job]
cache_folder = "{ROOT / ".cache"}"
custom_import = ["frontdoor_parts"]
[checkpoint]
initial_load_path = "{TORCHTITAN}"
"""


def convert_from_torchtitan(folder: Path) -> Path:
    config = LlamaConfig(2048, 64, 2, 4, 2, 256, rope_theta=500000.0, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    command = f"convert {TORCHTITAN} {folder / 'converted'} --config {folder / 'config.json'}"
    assert main(command.split()) == 0
    return folder / "converted"


def test_weights_of_torchtitan(tmp_path: Path) -> None:
    """What each layout makes of them is in tests/hf/test_torchtitan.py."""
    run = torchrun(tmp_path, 1, config=TITAN)
    assert run.code == 1 and "Traceback" not in run.err[0], run.everything()
    assert run.err[0].count("error") == 1 and f"dtron convert {TORCHTITAN} NEW_FOLDER --config " in run.err[0]
    converted = convert_from_torchtitan(tmp_path)
    both = ("--checkpoint.no_initial_load_model_only", "--checkpoint.initial_load_path", str(converted))
    run = good(torchrun(tmp_path, 1, *both, config=TITAN))
    assert f"weights from {converted}" in run.out[0]


@pytest.mark.long
def test_weights_of_torchtitan_of_another_model(tmp_path: Path) -> None:
    path = ("--checkpoint.initial_load_path", str(convert_from_torchtitan(tmp_path)))
    run = torchrun(tmp_path, 1, "--model.n_layers", "1", *path, config=TITAN)
    assert run.code != 0
    assert "n_layers" in run.err[0] and "Traceback" not in run.err[0], run.everything()


@pytest.mark.long
def test_weights_of_another_run_in_part(tmp_path: Path) -> None:
    """As in tests/train/test_begin.py."""
    (tmp_path / "other").mkdir()
    good(torchrun(tmp_path / "other", 1, "--training.steps", "4", config=SAVING))
    path = only(tmp_path / "other", "checkpoint/step-4")
    start = ("--checkpoint.initial_load_path", str(path), "--model.vocab_size", "72", "--training.steps", "1")
    run = torchrun(tmp_path, 1, *start, config=SAVING)
    assert run.code != 0 and "Traceback" not in run.err[0]
    assert "model.embed_tokens.weight is [64, 32] there and [72, 32] in this model" in run.err[0]
    excluded = ("--checkpoint.exclude_from_loading", "embed_tokens.*", "lm_head.*")
    run = good(torchrun(tmp_path, 1, *start, *excluded, config=SAVING))
    assert f"weights from {path}" in run.out[0]
    run = torchrun(tmp_path, 1, *start, "--checkpoint.exclude_from_loading", "head.*", config=SAVING)
    assert run.code != 0 and "'head.*' fits no parameter" in run.err[0]
