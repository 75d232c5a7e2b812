"""Rendering and submitting jobs with a stand-in for sbatch; tests/cluster/test_slurm.py uses a real Slurm."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dtron.cluster.slurm import SlurmOptions, prepare, render, time_limit_s
from dtron.cluster.status import job_status, table
from dtron.config import load
from dtron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "configs/debug.toml")
SECRET = "hf_" + "abcdefGHIJKL0123456789xyz"
SBATCH = '#!/bin/sh\n[ -n "$REFUSE" ] && { echo "$REFUSE" >&2; exit 1; }\ncp "$2" submitted; echo "77;cluster"\n'


@dataclass
class Done:
    """A finished submit.py."""

    code: int
    out: str
    err: str


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Done]:
    """scripts/slurm/submit.py in `tmp_path`, where bin/sbatch is the stand-in."""
    spec = importlib.util.spec_from_file_location("submit", ROOT / "scripts/slurm/submit.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **variables: str) -> Done:
        for name, value in ({"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | variables).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["submit.py", *arguments])
        return Done(script.main(), *capsys.readouterr())

    return run


def headers(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len({line.partition("=")[0] for line in lines}) == len(lines), "each once"
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def setting(script: str, name: str) -> str:
    """A setting of the script, as bash reads it."""
    done = subprocess.run(
        ["bash", "-c", f'eval "$(grep \'^{name}=\' | head -1)"; printf %s "${name}"'],
        input=script,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_options_are_in_the_script(tmp_path: Path) -> None:
    options = SlurmOptions(
        nodes=4, ranks_per_node=2, name="mine", time="2-0", partition="gpu", account="a b", save_s=120, retries=7,
        sbatch=["mem=0", "--exclusive"], python="/p y/python", container="apptainer exec --nv 'my image.sif'",
        interface="ib0",
    )  # fmt: skip
    script = render(tmp_path / "a job", options)
    lines = headers(script)
    assert (lines["nodes"], lines["gpus-per-node"], lines["time"], lines["partition"]) == (
        "4",
        "2",
        "2-0",
        "gpu",
    )
    assert (lines["account"], lines["output"]) == ('"a b"', f'"{tmp_path}/a job/logs/batch.log"')
    assert (lines["signal"], lines["mem"], lines["exclusive"]) == (
        "B:USR1@120",
        "0",
        "",
    ) and "requeue" in lines
    assert "qos" not in lines, "options not given are left to the cluster"
    for name, value in {"PYTHON": "/p y/python", "JOB": f"{tmp_path}/a job", "SAVE_S": "120", "RETRIES": "7"}.items():
        assert setting(script, name) == value
    assert setting(script, "CONTAINER") == "apptainer exec --nv 'my image.sif'"
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_job_on_cpus_that_does_not_requeue(tmp_path: Path) -> None:
    script = render(tmp_path, SlurmOptions(gpus=False, requeue=False))
    assert (
        "gpus-per-node" not in headers(script) and "no-requeue" in headers(script) and "requeue" not in headers(script)
    )
    assert setting(script, "REQUEUE") == "0"


def test_no_secret_in_a_script(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the batch script would contain a Hugging Face token"):
        render(tmp_path, SlurmOptions(srun_args="--export=HF_TOKEN=hf_" + "abcdefGHIJKL0123456789xyz"))


def test_a_dry_run_only_prints(tmp_path: Path, submit: Any) -> None:
    done = submit(DEBUG, "--nodes", "3", "--checkpoint.enable", "--dry-run")
    assert done.code == 0, done.err
    assert headers(done.out)["nodes"] == "3" and {path.name for path in tmp_path.iterdir()} == {"bin"}
    assert subprocess.run(["bash", "-n"], input=done.out, text=True).returncode == 0


def plan_of(done: Done) -> list[str]:
    assert done.code == 0 and headers(done.out), done.err
    return [line.removeprefix("# plan: ") for line in done.out.splitlines() if line.startswith("# plan: ")]


def test_a_dry_run_says_what_the_run_needs_and_costs(tmp_path: Path, submit: Any) -> None:
    run = [DEBUG, "--checkpoint.enable", "--dry-run", "--training.steps", "1000"]
    fits, speed, cost = plan_of(submit(*run, "--hardware", "h200", "--tp", "2"))
    assert fits.startswith("fits on 8 x h200: needs ") and "tokens/s per GPU" in speed
    step_s, hours = float(speed.split()[1]), float(cost.split()[1])
    assert hours == pytest.approx(step_s * 1000 * 8 / 3600, abs=0.1) and "1,000 steps" in cost
    (tmp_path / "small.json").write_text(json.dumps({"name": "h100", "memory_bytes": 5e8}))
    assert plan_of(submit(*run, "--hardware", "small.json"))[0].startswith("does not fit on 8 x h100")


def test_a_dry_run_goes_on_without_a_plan(submit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [DEBUG, "--checkpoint.enable", "--dry-run"]
    (line,) = plan_of(submit(*run, "--cpu"))
    assert line == "none: it is for runs on GPUs, and this one is on CPUs"
    (line,) = plan_of(submit(*run, "--hardware", "h1000"))
    assert line.startswith("none: --hardware h1000 is unknown; did you mean h100")
    monkeypatch.setattr("dtron.plan.single.Sizes", None)  # as of a model that the planner does not know
    (line,) = plan_of(submit(*run))
    assert line.startswith("none: AttributeError: ")


def test_a_job_folder_has_all_that_the_job_runs(tmp_path: Path, submit: Any) -> None:
    own = ["--cpu", "--ranks-per-node", "2", "--checkpoint.enable", "--tp", "2", "--training.steps", "7"]
    done = submit(DEBUG, "--nodes", "2", "--name", "mine", *own)
    assert done.code == 0, done.err
    (folder,) = tmp_path.glob("outputs/slurm/mine-*")
    assert f"job 77 in {folder}" in done.out
    config = load(["--job.config_file", str(folder / "config.toml")])
    assert (config.training.steps, config.parallelism.tensor_parallel_degree, config.training.device) == (7, 2, "auto")
    assert (tmp_path / "submitted").read_text() == (folder / "job.sbatch").read_text()
    assert (folder / "code/train.py").exists() and (folder / "code/dtron/models/llama.py").exists()
    about = json.loads((folder / "job.json").read_text())
    assert (about["job_id"], about["nodes"], about["steps"]) == ("77", 2, 7)
    assert submit(DEBUG, "--nodes", "2", "--name", "mine", *own).code == 0
    assert len([*tmp_path.glob("outputs/slurm/*/job.sbatch")]) == 2, "a job of the same second has its own folder"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DEBUG], "checkpoint.enable = true"),
        (["nowhere.toml"], "there is no file nowhere.toml"),
        ([DEBUG, "--checkpoint.enable", "--tp", "3"], "does not divide the world size 16"),
        ([DEBUG, "--checkpoint.enable", "--trianing.steps", "3"], "trianing.steps"),
        ([DEBUG, "--checkpoint.enable", "--time", "soon"], "--time 'soon'"),
        ([DEBUG, "--checkpoint.enable", "--time", "5"], "--save-s"),
        ([DEBUG, "--checkpoint.enable", "--nodes", "0"], "--nodes is 0"),
        ([DEBUG, "--checkpoint.enable", "--name", "../x"], "--name"),
        ([DEBUG, "--checkpoint.enable", "--training.device", "cpu"], "training.device is cpu"),
        ([DEBUG, "--checkpoint.enable", "--prolog", "nowhere.sh"], "there is no file nowhere.sh"),
        ([DEBUG, "--checkpoint.enable", "--retries", "-1"], "--retries is -1"),
        ([DEBUG, "--checkpoint.enable", "--container", "box 'a b"], "--container box 'a b: No closing quotation"),
        ([DEBUG, "--checkpoint.enable", "--job.control_folder", "x"], "job.control_folder is set by the job"),
        ([DEBUG, "--checkpoint.enable", "--job.dump_folder", "a%j"], "contains %"),
        ([DEBUG, "--checkpoint.enable", "--job.description", SECRET], "contains a Hugging Face token"),
        ([DEBUG, "--checkpoint.enable", "--container", "env MY_KEY=" + "abcd1234567890"], "a variable with a secret"),
    ],
)
def test_mistakes_are_reported_before_anything_is_submitted(
    tmp_path: Path, submit: Any, arguments: list[str], message: str
) -> None:
    done = submit("--nodes", "2", *arguments)
    assert done.code == 1 and message in done.err, done.err
    assert done.err.count("\n") == 1 and SECRET not in done.err and not [*tmp_path.glob("outputs/slurm/*")]


def test_an_error_of_sbatch_is_reported(tmp_path: Path, submit: Any) -> None:
    done = submit(DEBUG, "--nodes", "2", "--checkpoint.enable", REFUSE="invalid partition specified: x")
    assert done.code == 1 and "invalid partition specified: x" in done.err and "Traceback" not in done.err
    assert not [*tmp_path.glob("outputs/slurm/*")], "there is no job"


def test_without_slurm(tmp_path: Path, submit: Any) -> None:
    done = submit(DEBUG, "--nodes", "2", "--checkpoint.enable", PATH=f"{tmp_path}/nothing")
    assert done.code == 1 and "sbatch is not installed here" in done.err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("1-2:3", 93780), ("1-2:3:4", 93784)],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds


def test_a_resolved_job_may_run_on_another_machine(tmp_path: Path) -> None:
    """A login node has no GPU: the check is for the machines that the job will have."""
    bad = [
        "--job.config_file",
        DEBUG,
        "--checkpoint.enable",
        "--cp",
        "2",
        "--training.mixed_precision_param",
        "float32",
    ]
    with pytest.raises(UserError, match="fp32 compute on CUDA"):
        prepare(bad, SlurmOptions(nodes=1))
    prepare(bad, SlurmOptions(nodes=1, gpus=False))


# --- status


def job(folder: Path, *events: tuple[str, str], **control: dict) -> Path:
    (folder / "control").mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"job_id": "5", "steps": 100}))
    rows = [{"unix_s": i, "attempt": i, "event": e, "detail": d} for i, (e, d) in enumerate(events)]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, row in control.items():
        (folder / "control" / name).write_text(json.dumps(row))
    return folder


BEAT = {"phase": "training", "step": 7, "unix_s": 1.0}
OOM = {"kind": "oom", "message": "CUDA out of memory", "unix_s": 2.0}


@pytest.mark.parametrize(
    ("slurm", "events", "control", "state", "why"),
    [
        (("PENDING", "Priority"), [], {}, "queued", "waiting: Priority"),
        (("RUNNING", "None"), [("started", "")], {}, "running", "starting"),
        (("RUNNING", "None"), [("started", "")], {"HEARTBEAT": BEAT}, "running", "training"),
        (("RUNNING", "None"), [("stopping", "preempted, 60 s left")], {"HEARTBEAT": BEAT}, "stopping", "60 s left"),
        (("PENDING", "BeginTime"), [("requeued", "preempted, at step 7")], {}, "preempted", "waiting: BeginTime"),
        (("PENDING", "BeginTime"), [("requeued", "the time limit, at step 7")], {}, "queued", "the time limit"),
        (("COMPLETED", "None"), [("done", "")], {"DONE": {"step": 100, "unix_s": 3.0}}, "done", ""),
        (("FAILED", "None"), [("failed", "oom")], {"FAILED": OOM}, "oom", "CUDA out of memory"),
        (("TIMEOUT", "None"), [("started", "")], {"HEARTBEAT": BEAT}, "timeout", ""),
        (("CANCELLED", "None"), [], {}, "cancelled", ""),
        (
            ("CANCELLED", "None"),
            [("taken", "by Slurm")],
            {"SAVED": {"step": 9, "unix_s": 3.0}},
            "cancelled",
            "at step 9",
        ),
        (("PENDING", "PartitionNodeLimit"), [], {}, "queued", "which will not change"),
        (
            ("RUNNING", "None"),
            [("requeued", "x"), ("started", "")],
            {"HEARTBEAT": BEAT | {"unix_s": 0.5}},
            "running",
            "starting",
        ),
        (("OUT_OF_MEMORY", "None"), [("started", "")], {}, "oom", ""),
        (("PREEMPTED", "None"), [("started", "")], {}, "preempted", ""),
        (None, [("failed", "hang, failure 4 from step 20")], {}, "hang", "failure 4"),
        (None, [("stopped", "by a user")], {}, "stopped", "by a user"),
        (None, [("started", "")], {"HEARTBEAT": BEAT}, "ended", "no reason recorded"),
        (("FAILED", "None"), [], {}, "failed", "logs/batch.log"),
    ],
)
def test_job_states(
    tmp_path: Path, slurm: tuple[str, str] | None, events: list, control: dict, state: str, why: str
) -> None:
    queue = {"5": slurm} if slurm else {}
    seen = job_status(job(tmp_path / "j", *events, **control), queue)
    assert seen.state == state and why in seen.why
    assert state in table([seen])
