"""Sweeps: which points there are, which are pruned, how each ends, which are resumed, and what is reported."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "frontdoor"))
from frontdoor import CONFIG, ROOT, environment  # noqa: E402
from slurm import Slurm  # noqa: E402
from slurm import available as slurm_available  # noqa: E402

from dtron.cluster import status  # noqa: E402
from dtron.cluster.runs import Outcome, read_outcome  # noqa: E402
from dtron.cluster.slurm import SlurmJob, SlurmOptions  # noqa: E402
from dtron.cluster.sweep import main  # noqa: E402
from dtron.cluster.sweep import runner as sweep_runner  # noqa: E402
from dtron.cluster.sweep import slurm as sweep_slurm  # noqa: E402
from dtron.cluster.sweep.file import read_sweep  # noqa: E402
from dtron.cluster.sweep.local import LocalRunner, classify_exit  # noqa: E402
from dtron.cluster.sweep.points import Point, check_machine, make_points  # noqa: E402
from dtron.cluster.sweep.results import advice, format_table, loss_notes, rank_points, write_csv  # noqa: E402
from dtron.cluster.sweep.runner import End, Record, Sweep, classify, read_record  # noqa: E402
from dtron.cluster.sweep.slurm import SlurmRunner, slurm_options  # noqa: E402
from dtron.config import replace  # noqa: E402
from dtron.errors import UserError  # noqa: E402
from dtron.train.folder import lock_run_folder  # noqa: E402

BASE = CONFIG.replace("local_batch_size = 8", "local_batch_size = 2")
HEAD = 'base = "base.toml"\nranks = 4\nsteps = 6\n'


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes SWEEP.toml next to its base and returns its path."""
    (tmp_path / "base.toml").write_text(BASE)

    def write(text: str) -> Path:
        (tmp_path / "sweep.toml").write_text(text)
        return tmp_path / "sweep.toml"

    return write


def points_of(path: Path) -> list[Point]:
    return make_points(read_sweep(path))


# --- SWEEP.toml


def test_all_layouts_within_the_limits(write: Any) -> None:
    points = points_of(write(HEAD + 'layouts = "all"\n[limits]\ncp = 1\ndp_replicate = 1\npp = 2\n'))
    degrees = {(p.degrees.pp, p.degrees.dp_shard, p.degrees.tp) for p in points}
    assert degrees == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)}
    every = points_of(write(HEAD + 'layouts = "all"\n'))
    assert len({p.degrees for p in every}) == 15  # 4 = 2 x 2 over five dimensions: 5 + 10
    assert {p.degrees.world for p in every} == {4}


def test_axes_make_a_product_and_points_are_added(write: Any) -> None:
    path = write(
        HEAD + "layouts = [{tp = 2}, {pp = 2, dp = 2}]\n[fixed]\ndebug.seed = 7\n[axes]\n"
        'training.local_batch_size = [2, 4]\n"activation_checkpoint.mode" = ["none", "full"]\n'
        "[[points]]\ndp_replicate = 4\ntraining.local_batch_size = 1\n"
    )
    points = points_of(path)
    found = [(str(p.degrees), p.config.training.local_batch_size, p.recompute) for p in points]
    assert found[:4] == [("dp_shard 2 x tp 2", local, mode) for local in (2, 4) for mode in ("none", "full")]
    assert found[4:8] == [("pp 2 x dp_shard 2", local, mode) for local in (2, 4) for mode in ("none", "full")]
    assert found[8:] == [("dp_replicate 4", 1, "selective 2")]
    assert {p.config.debug.seed for p in points} == {7}


def test_a_point_only_measures_steps(write: Any) -> None:
    (tmp := write(HEAD + "[axes]\ntp = [1]\n")).with_name("base.toml").write_text(
        BASE.replace("[validation]", "[checkpoint]\nenable = true\n[validation]\nenable = true")
    )
    c = points_of(tmp)[0].config
    assert (c.training.steps, c.metrics.log_freq) == (6, 1)
    assert not (c.checkpoint.enable or c.validation.enable or c.metrics.enable_tensorboard)
    assert c.lr_scheduler.total_steps == 20  # the base's own: the learning rates of the real run's beginning
    requested = points_of(write(HEAD + "[fixed]\ncheckpoint.enable = true\n[axes]\ntp = [1]\n"))[0].config
    assert requested.checkpoint.enable


def test_models_are_an_axis(write: Any, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('base = "base.toml"\n[model]\nn_layers = 2\n')
    points = points_of(write('ranks = 1\n[axes]\nbase = ["base.toml", "other.toml"]\n'))
    assert [p.config.model.n_layers for p in points] == [4, 2]
    assert points[0].parameters is not None and points[1].parameters is not None
    assert points[0].parameters > points[1].parameters and points[0].same_loss != points[1].same_loss


def test_points_are_identified_by_their_resolved_settings(write: Any) -> None:
    one = points_of(write(HEAD + "[axes]\ntp = [2]\n"))[0]
    # In another order, in full where the other left it out, with other points before it: the same point.
    path = write(HEAD + "layouts = [{dp = 4}, {tp = 2, dp = 2}]\n[fixed]\ntraining.local_batch_size = 2\n")
    assert points_of(path)[1].name == one.name
    assert points_of(write(HEAD + "[fixed]\ndebug.seed = 1\n[axes]\ntp = [2]\n"))[0].name != one.name
    assert points_of(write(HEAD.replace("6", "7") + "[axes]\ntp = [2]\n"))[0].name != one.name
    assert points_of(write(HEAD.replace("ranks = 4", "ranks = 8") + "[axes]\ntp = [2]\n"))[0].name != one.name
    twice = points_of(write(HEAD + "[axes]\ntp = [2]\n[[points]]\ntp = 2\ndp = 2\n"))
    assert [p.name for p in twice] == [one.name]


def test_points_that_cannot_run_are_pruned_with_the_reason(write: Any) -> None:
    path = write(HEAD + "[fixed]\ntraining.local_batch_size = 2\n[axes]\ntp = [1, 3, 4]\npp = [1, 4]\n")
    reasons = {(p.settings["parallelism.tensor_parallel_degree"], p.degrees.pp): p.pruned for p in points_of(path)}
    assert reasons[1, 1] == ""
    assert "does not divide the world size 4" in reasons[3, 1]
    assert "does not divide model.n_kv_heads 2" in reasons[4, 1]
    assert "needs at least 4 microbatches" in reasons[1, 4]


def test_a_gpu_sweep_can_be_listed_without_gpus(write: Any) -> None:
    text = (
        HEAD + '[fixed]\ntraining.device = "cuda"\n[axes]\ntraining.enable_cpu_offload = [true, false]\ncp = [1, 2]\n'
    )
    here = make_points(read_sweep(write(text)))
    assert all("finds no GPU here" in p.pruned for p in here)
    there = make_points(read_sweep(write(text)), "cuda")
    assert ["ring attention" in p.pruned for p in there] == [False, True, False, True]  # fp32 on CUDA


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "", "no points; add layouts"),
        ("ranks = 4\n[axes]\ntp = [1]\n", "base is missing"),
        ('base = "gone.toml"\nranks = 4\n[axes]\ntp = [1]\n', "there is no file"),
        ('base = "base.toml"\n[axes]\ntp = [1]\n', "either as ranks = N or as ranks_per_node = N"),
        ('base = "base.toml"\nranks = 0\n[axes]\ntp = [1]\n', "ranks = 0: expected an integer of at least 1"),
        ('base = "base.toml"\nranks = 3\nnodes = 2\n[axes]\ntp = [1]\n', "is not divisible by 2 nodes"),
        (HEAD + "stepz = 3\n[axes]\ntp = [1]\n", 'unknown key "stepz"; did you mean "steps"?'),
        (HEAD + "tp = 2\n", 'the key "tp" is at the top level; put it under [fixed]'),
        (HEAD + "[axes]\ntraining.seqlen = [1]\n", 'unknown key "training.seqlen"; did you mean "training.seq_len"?'),
        (HEAD + "[axes]\ntp = []\n", "the axis parallelism.tensor_parallel_degree has no values"),
        (HEAD + "[axes]\ntp = 2\n", "expected a list of values, such as [2]"),
        (HEAD + '[axes]\ntp = [1, "two"]\n', 'tensor_parallel_degree = "two" (a string): expected an integer'),
        (HEAD + "[axes]\nmetrics.save_for_all_ranks = [true]\n", "metrics are reduced over all ranks"),
        (HEAD + "[fixed]\ntp = 2\n[axes]\nparallelism.tensor_parallel_degree = [1]\n", "both as fixed and as an axis"),
        (HEAD + "[axes]\ntp = [1]\nparallelism.tensor_parallel_degree = [1]\n", "twice, once in its short form"),
        (HEAD + "[fixed]\ntp = 2\n[[points]]\ntp = 1\n", "both as fixed and in [[points]]"),
        (HEAD + "[axes]\ntraining.steps = [1]\n", "which a sweep sets itself: write steps = N at the top"),
        (HEAD + 'layouts = "some"\n', 'expected "all", or a list'),
        (HEAD + 'layouts = "all"\n[limits]\ndp = 1\ntp = 1\npp = 1\ncp = 1\ndp_replicate = 1\n', "raise a limit"),
        (
            HEAD + 'layouts = "all"\n[limits]\nep = 1\n',
            "limits has parallelism.expert_parallel_degree = 1; expected dp, dp_replicate, tp, cp, pp of",
        ),
        (HEAD + "[limits]\ntp = 1\n[axes]\ntp = [1]\n", "[limits] has no effect"),
        (HEAD + 'layouts = "all"\n[axes]\ntp = [1]\n', "is given, but layouts set every degree"),
        (HEAD + "[axes]\ntp = [3, 5]\n", "no point can run with 4 ranks"),
        (HEAD + "[axes\n", "not valid TOML"),
    ],
)
def test_a_mistake_is_one_message_before_anything_runs(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert main([str(write(text)), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ") and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_more_ranks_than_gpus(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    points = points_of(write(HEAD + "[axes]\ntp = [1]\n"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_machine(points, 4)  # device = "cpu"
    auto = replace(points[0].config, "training.device", "auto")
    points = [dataclasses.replace(points[0], config=auto), *points[1:]]
    with pytest.raises(UserError, match="4 ranks, each with its own GPU, and this machine has 2"):
        check_machine(points, 4)


def test_other_mistakes(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(write(HEAD + "[axes]\ntp = [1]\n")), tmp_path / "out"
    assert main([path, "--out", str(out), "--retry", "oom,odd"]) == 1
    assert "unknown state 'odd'" in capsys.readouterr().err
    assert main([str(tmp_path / "gone.toml"), "--out", str(out)]) == 1
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([path, "--out", str(tmp_path / "file")]) == 1
    assert "choose another with --out" in capsys.readouterr().err
    script = "import sys; from pathlib import Path; from dtron.train.folder import lock_run_folder\n"
    script += (
        "out = Path(sys.argv[1]); out.mkdir(); f = lock_run_folder(out); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        assert main([path, "--out", str(out)]) == 1
        assert other.stdin is not None
        other.stdin.close()
    assert "another sweep is running in" in capsys.readouterr().err
    lock_run_folder(out).close()


def test_dry_run_lists_the_points(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(HEAD + "[axes]\ntp = [1, 2, 3]\n")), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "3 points, 1 of them pruned; nothing was run" in printed and "does not divide the world size" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    points = make_points(read_sweep(path), "cuda")
    ran = [p for p in points if not p.pruned]
    assert len(ran) >= 4
    assert len({p.global_batch for p in ran}) == len({p.same_loss for p in ran}) == 1
    assert f"scripts/sweep.py configs/sweeps/{path.name}" in path.read_text()


# --- how points run and end


class FakeJob:
    """A job that writes `files` as its control files and has ended with `end`, or is still running if None."""

    def __init__(self, folder: Path, attempt: int, files: dict[str, Any], end: End | None) -> None:
        self.control, self.handle = folder / f"control-{attempt}", {"number": attempt}
        self.control.mkdir()
        self._end, self.stopped, self.seconds = end, False, 1.0
        run = folder / f"run-{attempt}"
        run.mkdir()
        beat = {"phase": "training", "step": 3, "deadline_s": 60.0, "run_folder": str(run), "unix_s": time.time()}
        for name, row in files.items():
            if name == "metrics":
                (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in row))
            else:
                (self.control / name).write_text(json.dumps(beat | row))

    def running_s(self) -> float:
        return self.seconds

    def poll(self) -> End | None:
        if self._end and self._end.state == "ctrl-c":
            raise KeyboardInterrupt
        return self._end

    def stop(self) -> None:
        self.stopped = True


class FakeRunner:
    """behaviours: by tensor-parallel degree, the files and end of a FakeJob."""

    at_once, outlives_sweep = 1, False

    def __init__(self, behaviours: dict[int, tuple[dict[str, Any], End | None]]) -> None:
        self.behaviours, self.started = behaviours, list[int]()
        self.jobs: list[FakeJob] = []
        self.found: FakeJob | None = None

    def start(self, point: Point, folder: Path, attempt: int) -> FakeJob:
        assert (folder / "config.toml").exists()
        self.started.append(point.degrees.tp)
        self.jobs.append(FakeJob(folder, attempt, *self.behaviours[point.degrees.tp]))
        return self.jobs[-1]

    def find(self, folder: Path, attempt: int, handle: dict[str, Any]) -> FakeJob | None:
        return self.found


def steps(tokens_per_s: float, loss: float = 3.0) -> list[dict[str, Any]]:
    """Six steps, the first of them the warm-up."""
    rows = [{"tokens_per_s": 1.0, "step_s": 900.0}]
    rows += [{"tokens_per_s": tokens_per_s * f, "step_s": 256 / tokens_per_s / f} for f in (1.01, 0.99, 1.0, 1.0, 1.0)]
    memory = {"attempt": 1, "loss": loss, "max_memory_bytes": 2**30}
    return [{"step": i, **memory, **row} for i, row in enumerate(rows, 1)]


DONE: tuple[dict[str, Any], End | None] = ({"HEARTBEAT": {}, "DONE": {}, "metrics": steps(100.0)}, End())
OOM: tuple[dict[str, Any], End | None] = (
    {"HEARTBEAT": {}, "FAILED": {"kind": "oom", "message": "out\nof memory"}},
    End(),
)
TP = HEAD + "[axes]\ntp = [1, 2, 4]\n[fixed]\nmodel.n_kv_heads = 4\n"


@pytest.fixture(autouse=True)
def no_polling_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_runner, "POLL_S", 0.0)


def test_points_run_once_and_failed_ones_with_retry(write: Any, tmp_path: Path) -> None:
    points, out = points_of(write(TP)), tmp_path / "out"
    first = FakeRunner({1: DONE, 2: OOM, 4: ({}, End("", "no reason"))})
    sweep = Sweep(points, out, first, limit_s=60)
    assert sweep.left == 3
    sweep.run()
    assert [sweep.records[p.name].state for p in points] == ["done", "oom", "failed"]
    assert [sweep.records[p.name].reason for p in points] == ["", "out of memory", "no reason"]
    record = read_record(out / "points" / points[0].name)
    assert (record.tokens_per_s, record.step_s, record.loss, record.max_memory_bytes) == (100.0, 2.56, 3.0, 2**30)
    assert record.step_s_p25 == pytest.approx(2.56) and record.step_s_p75 == pytest.approx(2.56)
    again = FakeRunner({})
    Sweep(points, out, again, limit_s=60).run()
    assert again.started == []
    retried = FakeRunner({2: DONE, 4: DONE})
    sweep = Sweep(points, out, retried, limit_s=60, retry=("oom",))
    sweep.run()
    assert retried.started == [2]
    record = sweep.records[points[1].name]
    assert (record.state, record.reason, record.attempt) == ("done", "", 2)


def test_interrupted_and_killed_points_run_again(write: Any, tmp_path: Path) -> None:
    points, out = points_of(write(TP)), tmp_path / "out"
    runner = FakeRunner({1: DONE, 2: ({"HEARTBEAT": {}}, End("ctrl-c"))})
    sweep = Sweep(points, out, runner, limit_s=60)
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    assert runner.jobs[1].stopped
    assert [sweep.records[p.name].state for p in points] == ["done", "interrupted", "waiting"]
    killed = Record("running", attempt=4)  # its sweep was killed before it recorded more
    (out / "points" / points[2].name).mkdir()
    killed.write(out / "points" / points[2].name)
    rest = FakeRunner({2: DONE, 4: DONE})
    sweep = Sweep(points, out, rest, limit_s=60)
    sweep.run()
    assert rest.started == [2, 4]
    assert [sweep.records[p.name].attempt for p in points] == [1, 2, 5]


def test_a_job_that_outlived_its_sweep_is_monitored(write: Any, tmp_path: Path) -> None:
    points, out = points_of(write(HEAD + "[axes]\ntp = [1]\n")), tmp_path / "out"
    folder = out / "points" / points[0].name
    folder.mkdir(parents=True)
    Record("running", attempt=1).write(folder)
    runner = FakeRunner({})
    runner.found = FakeJob(folder, 1, *DONE)
    sweep = Sweep(points, out, runner, limit_s=60)
    sweep.run()
    assert runner.started == [] and sweep.records[points[0].name].state == "done"


def test_a_changed_list_keeps_measured_points(write: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Sweep(points_of(write(TP)), out, FakeRunner({1: DONE, 2: DONE, 4: DONE}), limit_s=60).run()
    points = points_of(write(TP.replace("[1, 2, 4]", "[4, 2]") + "[[points]]\ndp_replicate = 2\n"))
    runner = FakeRunner({1: DONE})
    Sweep(points, out, runner, limit_s=60).run()
    assert runner.started == [1]
    assert len(list((out / "points").iterdir())) == 4  # the point that is no longer listed keeps its folder


def test_a_heartbeat_from_the_future_ends_too(write: Any, tmp_path: Path) -> None:
    """Of a machine whose clock is two days ahead."""
    ahead = {"HEARTBEAT": {"unix_s": time.time() + 2 * 86400, "deadline_s": 60.0}}
    points = points_of(write(TP))
    sweep = Sweep(points, tmp_path / "out", FakeRunner({1: (ahead, None)}), limit_s=10**6)
    sweep._start(points[0])
    (active,) = sweep._active
    outcome = read_outcome(active.job.control)
    assert sweep._overdue(active, outcome) is None
    active.beat_s -= 500  # so long it has not changed
    found = sweep._overdue(active, outcome)
    assert found is not None and re.match(r"no heartbeat for 50\d s", found.why)


def test_time_limits_and_missing_heartbeats_stop_a_point(write: Any, tmp_path: Path) -> None:
    points = points_of(write(TP))
    late = {"HEARTBEAT": {"unix_s": time.time() - 500, "deadline_s": 60.0}}
    failed = {"kind": "mistake", "message": "stopped by a signal after step 3, and nothing was saved"}
    runner = FakeRunner(
        {1: ({"HEARTBEAT": {}}, None), 2: (late, None), 4: ({"HEARTBEAT": {}, "FAILED": failed}, End())}
    )
    start, jobs = runner.start, runner.jobs

    def slow_start(point: Point, folder: Path, attempt: int) -> FakeJob:
        job = start(point, folder, attempt)
        job.seconds = 61.0 if point.degrees.tp == 1 else 1.0
        return job

    runner.start = slow_start  # type: ignore[method-assign]
    sweep = Sweep(points, tmp_path / "out", runner, limit_s=60)
    sweep.run()
    records = [sweep.records[p.name] for p in points]
    assert [record.state for record in records] == ["timeout", "hang", "interrupted"]
    assert records[0].reason == "not finished after limit_s = 60 s: training, step 3 of 6"
    assert re.match(r"no heartbeat for 50\d s: training, step 3 of 6", records[1].reason)
    assert [job.stopped for job in jobs] == [True, True, False]


@pytest.mark.parametrize(
    ("end", "outcome", "ended_by_us", "state"),
    [
        (End("timeout", "late"), Outcome("done"), True, "done"),  # it finished just before it was stopped
        (End("timeout", "late"), Outcome("failed", "stopped by a signal"), True, "timeout"),
        (End("oom", "killed"), Outcome("lost", "Connection closed"), False, "oom"),
        (End("lost", "killed"), Outcome("running"), False, "lost"),
        (End("", "x"), Outcome("lost", "Connection closed"), False, "lost"),
        (End("lost", "killed"), Outcome("nonfinite", "NaN"), False, "nonfinite"),
        (End(), Outcome("hang", "no rank"), False, "hang"),
        (End("", "x"), Outcome("none"), False, "failed"),
        (End(), Outcome("saved", step=3), False, "interrupted"),
    ],
)
def test_ends_are_classified(end: End, outcome: Outcome, ended_by_us: bool, state: str) -> None:
    assert classify(end, outcome, ended_by_us)[0] == state


def test_exits_of_torchrun_are_classified() -> None:
    killed = "  exitcode  : -9 (pid: 7)\n  traceback : Signal 9 (SIGKILL) received by PID 7\n"
    assert classify_exit(1, killed, oom_kills=True).state == "oom"
    assert classify_exit(1, killed, oom_kills=False).state == "lost"
    assert classify_exit(1, "x\nModuleNotFoundError: No module named 'y'\nRoot Cause\n", True) == End(
        "", "ModuleNotFoundError: No module named 'y'"
    )
    assert classify_exit(3, "", False).why == "torchrun exited with code 3 and no message"


# --- results


def measured(write: Any, text: str, records: list[Record]) -> Any:
    points = points_of(write(text))
    return rank_points(points, {p.name: record for p, record in zip(points, records, strict=True)})


def done(tokens_per_s: float, loss: float = 3.0, spread: float = 0.01, gib: int = 2) -> Record:
    step_s = 256 / tokens_per_s
    low, high = step_s * (1 - spread), step_s * (1 + spread)
    return Record("done", "", 1, 0.0, 9.0, 6, loss, tokens_per_s, None, step_s, low, high, gib * 2**30)


def test_the_best_is_first_and_recommended(write: Any, tmp_path: Path) -> None:
    rows = measured(write, TP, [done(100.0), done(150.0), Record("oom", "out of memory")])
    assert [row.point.degrees.tp for row in rows] == [2, 1, 4] and [row.best for row in rows] == [True, False, False]
    assert advice(rows) == [
        "take dp_shard 2 x tp 2: 150 tokens/s, 2.00 GiB per rank; 50% more than the next, dp_shard 4"
    ]
    table = format_table(rows).splitlines()
    assert table[1].split()[:3] == ["*", "2", "2"] and table[3].endswith("oom: out of memory")
    write_csv(tmp_path / "r.csv", rows)
    with (tmp_path / "r.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["tokens_per_s"] for line in lines] == ["150.0", "100.0", ""]
    assert [line["tokens_per_s_per_gpu"] for line in lines] == ["37.5", "25.0", ""]
    assert (lines[0]["tp"], lines[0]["dp_shard"], lines[0]["max_memory_gib"], lines[0]["best"]) == (
        "2",
        "2",
        "2.0",
        "True",
    )
    assert (lines[0]["global_batch_sequences"], lines[0]["local_batch_sequences"]) == ("8", "2")
    assert (lines[2]["state"], lines[2]["reason"]) == ("oom", "out of memory")
    batches = measured(
        write, HEAD + "[axes]\ntraining.local_batch_size = [1, 2]\ndebug.seed = [1, 2]\n", [done(1.0)] * 4
    )
    write_csv(tmp_path / "r.csv", batches)
    head, first = (tmp_path / "r.csv").read_text().splitlines()[:2]
    assert "training.local_batch_size" not in head, "it has a column already"
    assert head.endswith(",debug.seed") and first.endswith(",1")


def test_a_lead_within_the_spread_does_not_count(write: Any) -> None:
    rows = measured(write, TP, [done(100.0), done(101.0, spread=0.03, gib=3), done(60.0)])
    (line,) = advice(rows)
    assert "equally fast within the spread of the steps: 1 other(s), first dp_shard 4" in line
    assert line.endswith("least memory: dp_shard 4, 2.00 GiB")


def test_losses_that_must_agree_but_differ(write: Any) -> None:
    rows = measured(write, TP, [done(100.0, 3.0), done(150.0, 3.001), done(60.0, 3.0001)])
    assert not rows[0].best and rows[1].best  # the fastest is not recommended
    (note,) = loss_notes(rows)
    assert note.startswith("losses differ: dp_shard 2 x tp 2 ends at 3.00100 and the 2 other(s)")
    assert "3.0010!" in format_table(rows)
    seeds = measured(write, HEAD + "[axes]\ndebug.seed = [1, 2]\n", [done(100.0, 3.0), done(150.0, 4.0)])
    assert loss_notes(seeds) == []  # these need not agree


def test_each_model_has_a_best(write: Any) -> None:
    text = HEAD + "[axes]\nmodel.n_layers = [2, 4]\ntp = [1, 2]\n"
    rows = measured(write, text, [done(100.0), done(90.0), done(50.0), done(60.0)])
    assert [(row.point.config.model.n_layers, row.best) for row in rows] == [
        (2, True),
        (2, False),
        (4, True),
        (4, False),
    ]
    assert [line.split(":")[0] for line in advice(rows)] == [
        "take dp_shard 4, n_layers 2",
        "take dp_shard 2 x tp 2, n_layers 4",
    ]


def test_picture_shows_every_point(write: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from dtron.cluster.sweep.picture import draw

    records = [done(100.0), done(150.0, 3.1), Record("pruned", "tensor_parallel_degree 4 does not divide it")]
    draw(measured(write, TP, records), "the title", "6 steps", [tmp_path / "p.svg", tmp_path / "p.png"])
    text = " ".join(re.findall(r"<!-- (.*?) -->", (tmp_path / "p.svg").read_text()))
    for word in (
        "the title",
        "6 steps",
        "best",
        "pruned: tensor_parallel_degree 4",
        "memory per rank",
        "loss differs",
    ):
        assert word in text, word
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_without_matplotlib_the_csv_is_made(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write(HEAD + "[axes]\ntp = [1]\n"), tmp_path / "out"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(path), "--out", str(out)]) == 1
    assert "--no-picture for only the table and the CSV" in capsys.readouterr().err and not out.exists()
    Sweep(points_of(path), out, FakeRunner({1: DONE}), limit_s=60).run()
    assert main([str(path), "--out", str(out), "--no-picture"]) == 0
    assert "1 points: 0 pruned, 1 already ended, 0 to run" in capsys.readouterr().out
    assert (out / "results.csv").exists() and not (out / "results.svg").exists()


# --- Slurm


class FakeSlurm:
    """Stand-ins for sbatch, squeue and scancel. states: job -> Slurm's state."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: dict[str, str] = {}
        self.submitted: list[tuple[list[str], SlurmOptions]] = []
        monkeypatch.setattr(sweep_slurm, "submit", self.submit)
        monkeypatch.setattr(
            sweep_slurm, "queue_states", lambda: {job: (state, "None") for job, state in self.states.items()}
        )
        monkeypatch.setattr(sweep_slurm, "QUERY_S", 0.0)
        monkeypatch.setattr(sweep_slurm, "UNREPORTED_S", 0.0)
        monkeypatch.setattr(sweep_slurm, "STOP_S", 1.0)
        monkeypatch.setattr(status, "_accounted_state", lambda job_id: ("", ""))

    def submit(self, argv: list[str], options: SlurmOptions, log: Any) -> SlurmJob:
        self.submitted.append((argv, options))
        job = SlurmJob(Path(argv[argv.index("--job.dump_folder") + 1]) / "slurm" / "x", str(len(self.submitted)))
        job.control.mkdir(parents=True)
        (job.folder / "job.json").write_text(json.dumps({"job_id": job.job_id}))
        self.states[job.job_id] = "PENDING"
        return job

    def event(self, out: Path, job_id: str, event: str, detail: str = "") -> None:
        for path in out.glob("points/*/slurm/x/job.json"):
            if json.loads(path.read_text())["job_id"] == job_id:
                row = {"unix_s": time.time(), "attempt": 0, "event": event, "detail": detail}
                with path.with_name("events.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")


def test_jobs_outlive_the_sweep_and_are_found(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points, out, slurm = points_of(write(TP)), tmp_path / "out", FakeSlurm(monkeypatch)
    options = slurm_options({"partition": "low"}, nodes=2, ranks_per_node=2, limit_s=1800.0)
    assert (options.time, options.requeue, options.preflight, options.partition) == ("0:45:00", False, False, "low")
    seen: list[str] = []

    def interrupt(point: Point, record: Record) -> None:
        seen.append(record.state)
        if len(seen) == 4:
            raise KeyboardInterrupt
        slurm.states["1"] = "RUNNING"
        slurm.event(out, "1", "started", "2 nodes")

    with pytest.raises(KeyboardInterrupt):
        Sweep(points, out, SlurmRunner(options, at_once=2), 1800.0, on_update=interrupt).run()
    assert seen == ["queued", "queued", "running", "queued"]
    assert [options.name for _, options in slurm.submitted] == [p.name for p in points[:2]]
    with pytest.raises(UserError, match="is job 1 of Slurm: add --slurm"):
        Sweep(points, out, LocalRunner(4), 1800.0)
    # Meanwhile one finishes and one is preempted; the third ends while the sweep runs.
    job = out / "points" / points[0].name / "slurm" / "x"
    (job / "control" / "DONE").write_text(json.dumps({"step": 6, "unix_s": 1.0}))
    slurm.states.pop("1")
    slurm.event(out, "2", "ended", "preempted, stop requested at step 3")
    slurm.states["2"] = "FAILED"
    sweep = Sweep(
        points,
        out,
        SlurmRunner(options, at_once=2),
        1800.0,
        on_update=lambda p, r: slurm.states.update({"3": "OUT_OF_MEMORY"}),
    )
    assert sweep.left == 3
    sweep.run()
    assert [sweep.records[p.name].state for p in points] == ["done", "interrupted", "oom"]
    assert len(slurm.submitted) == 3


def test_a_time_limit_of_slurm_is_a_timeout(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points, out, slurm = points_of(write(HEAD + "[axes]\ntp = [1]\n")), tmp_path / "out", FakeSlurm(monkeypatch)

    def limit(point: Point, record: Record) -> None:
        if record.state == "queued":
            slurm.event(out, "1", "ended", "the time limit, stop requested at step 3")
            slurm.states.pop("1", None)

    sweep = Sweep(points, out, SlurmRunner(slurm_options({}, 1, 4, 60.0), 1), 60.0, on_update=limit)
    sweep.run()
    record = sweep.records[points[0].name]
    assert (record.state, record.reason) == ("timeout", "Slurm's: the time limit, stop requested at step 3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "2"], "--nodes has no effect without --slurm"),
        (["--cpu"], "--cpu has no effect without --slurm"),
        (["--partition", "x"], "--partition has no effect without --slurm"),
        (["--slurm", "--at-once", "0"], "--at-once 0: expected 1 or more"),
        (["--slurm", "--nodes", "3"], "is not divisible by 3 nodes"),
        (["--slurm"], "training.device is cpu, but the jobs request GPUs: add --cpu"),
    ],
)
def test_mistakes_in_slurm_options(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    path = write(HEAD + '[axes]\ntp = [1]\n[fixed]\ntraining.device = "cpu"\n')
    assert main([str(path), "--out", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err
    nodes = write(HEAD + "nodes = 2\n[axes]\ntp = [1]\n")
    assert main([str(nodes), "--out", str(tmp_path / "out")]) == 1
    assert "a local sweep has one machine; set nodes = 1, or add --slurm" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.skipif(bool(slurm_available()), reason=slurm_available())
def test_a_real_slurm_runs_the_points(write: Any, tmp_path: Path) -> None:
    text = 'base = "base.toml"\nranks_per_node = 1\nsteps = 30\n[axes]\ntp = [1, 2]\n[[points]]\n'
    path = write(text + 'training.dataset = "failing"\ntraining.dataset_path = "raise 0 2"\n')
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), str(path), "--out", str(tmp_path / "out"), "--slurm"]
    command += ["--nodes", "2", "--cpu", "--interface", "eth0", "--at-once", "2"]
    with Slurm(4) as slurm:
        env = slurm.environment | environment()
        first = subprocess.Popen(command, env=env, cwd=tmp_path, start_new_session=True)
        slurm.wait(lambda: list(tmp_path.glob("out/points/*/slurm/*/control/HEARTBEAT")), 200, "a point runs")
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 130
        assert slurm.run("squeue", "-h").strip(), "the jobs continue"
        second = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=500)
    assert second.returncode == 0, second.stdout + second.stderr
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["state"], row["attempts"]) for row in rows] == [("done", "1"), ("done", "1"), ("failed", "1")]
    assert rows[2]["reason"] == "ArithmeticError: the disk is on fire"
    assert "losses differ" not in second.stdout


# --- torchrun


def test_a_point_that_still_runs_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "log-1.txt").touch()
    script = (
        "import sys, fcntl; f = open(sys.argv[1]); fcntl.flock(f, 2); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "log-1.txt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="is still running, started by a sweep that was killed"):
            LocalRunner(1).find(tmp_path, 1, {})
        assert other.stdin is not None
        other.stdin.close()
    assert LocalRunner(1).find(tmp_path, 1, {}) is None


@pytest.mark.long
def test_a_real_sweep_interrupted_and_resumed(write: Any, tmp_path: Path) -> None:
    text = 'base = "base.toml"\nranks = 1\nsteps = 30\n[[points]]\ntp = 1\n[[points]]\ntp = 2\n[[points]]\n'
    text += 'training.dataset = "failing"\ntraining.dataset_path = "raise 0 2"\n'
    path = write(text)
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), str(path), "--out", str(tmp_path / "out")]
    log = (tmp_path / "log").open("w+")
    first = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), cwd=tmp_path)
    beat = tmp_path / "out"
    while not list(beat.glob("points/*/control-1/HEARTBEAT")) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)  # unlike SIGINT it is not ignored in the background
    assert first.wait(200) == 130, (tmp_path / "log").read_text()
    second = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=400)
    assert second.returncode == 0, second.stdout + second.stderr
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = {row["state"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["done", "failed", "pruned"]
    assert rows["done"]["attempts"] == "2" and rows["done"]["last_step"] == "30"
    assert float(rows["done"]["tokens_per_s"]) > 0 and float(rows["done"]["loss_nats_per_token"]) > 0
    assert rows["failed"]["reason"] == "ArithmeticError: the disk is on fire"
    assert "does not divide the world size 1" in rows["pruned"]["reason"]
    assert "take one rank, dataset uneven, dataset_path none: " in second.stdout
    assert os.path.exists(tmp_path / "out" / "results.png")


def test_the_base_of_a_sweep_in_the_home_folder_and_beside_a_linked_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "links").mkdir()
    (tmp_path / "b.toml").write_text("[training]\nseq_len = 64\n")
    (tmp_path / "links/s.toml").symlink_to("../s.toml")
    for base in ("~/b.toml", "b.toml"):
        (tmp_path / "s.toml").write_text(f"base = '{base}'\nranks = 1\n[axes]\noptimizer.lr = [1]\n")
        assert read_sweep(tmp_path / "links/s.toml").fixed["base"] == str(tmp_path / "b.toml")
