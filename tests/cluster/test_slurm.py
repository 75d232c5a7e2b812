"""A real Slurm interrupts a job in many ways; the job resumes by itself, with the losses of an uninterrupted run."""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm import Slurm, available

sys.path.append(str(Path(__file__).resolve().parents[1] / "frontdoor"))
from frontdoor import CONFIG, ROOT, torchrun  # noqa: E402

from dtron.observe.metrics import read_metrics  # noqa: E402

pytestmark = pytest.mark.skipif(bool(available()), reason=available())

TINY = (
    CONFIG.replace('"frontdoor_parts"', '"cluster_parts"')
    .replace('dataset = "uneven"', 'dataset = "slow"')
    .replace("lr = 3e-3", "lr = 1e-3\neps = 1e-4  # see tests/parity/single.py")
    + """
[checkpoint]
enable = true
interval = 20
[comm]
train_timeout_seconds = 20
"""
)
LAYOUTS = {
    2: ("--dp", "2", "--training.local_batch_size", "4"),
    4: ("--dp", "2", "--tp", "2", "--training.local_batch_size", "4"),
}
DONE_S = 300
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests/cluster")])


def cluster(nodes: int, **options: Any) -> Slurm:
    made = Slurm(nodes, **options)
    made.environment |= {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return made


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with cluster(4) as made:
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """Rows of an uninterrupted run of `steps` steps on one rank."""

    @functools.cache
    def rows(steps: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("alone")
        own = "--checkpoint.no_enable", "--training.dataset_path", "0", "--training.steps", str(steps)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", PATHS)
            run = torchrun(folder, 1, *own, config=TINY)
        assert run.code == 0, run.everything()
        return read_metrics(next(folder.glob("outputs/*/metrics.jsonl")))

    return rows


class Job:
    """A tiny training on `nodes` nodes, one rank each, submitted as by a user."""

    def __init__(
        self, slurm: Slurm, folder: Path, nodes: int, *arguments: str, pause_ms: int = 20, preflight: bool = False
    ) -> None:
        self.slurm, self.cwd, self.nodes = slurm, folder, nodes
        (folder / "tiny.toml").write_text(TINY)
        own = ["--nodes", str(nodes), "--ranks-per-node", "1", "--cpu", "--interface", "eth0"]
        own += [] if preflight else ["--no-preflight"]
        own += [*LAYOUTS[nodes], "--training.dataset_path", str(pause_ms)]
        output = slurm.run(sys.executable, ROOT / "scripts/slurm/submit.py", "tiny.toml", *own, *arguments, cwd=folder)
        self.id, where = output.splitlines()[-2].removeprefix("job ").split(" in ")
        self.folder = Path(where)

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def details(self, event: str) -> list[str]:
        return [row["detail"] for row in self.events() if row["event"] == event]

    def rows(self) -> list[dict[str, Any]]:
        """Every row of every attempt, as written."""
        lines = [line for path in self.cwd.glob("outputs/*/metrics.jsonl") for line in path.read_text().splitlines()]
        return [row for row in map(json.loads, lines) if "loss" in row]

    def status(self) -> str:
        return self.slurm.run(sys.executable, ROOT / "scripts/slurm/status.py", "outputs", cwd=self.cwd)

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        """Until a step is done in an attempt of the run; attempts that did a step count from 1."""
        self.wait(lambda: any(r["step"] >= step and r["attempt"] >= attempt for r in self.rows()), f"step {step}")

    def wait_until_done(self) -> None:
        self.wait((self.folder / "control" / "DONE").exists, "the run is done")
        self.wait(lambda: self.slurm.job(self.id)["JobState"] == "COMPLETED", "the job is completed")

    def wait_for_restart_of_slurm(self, restarts: int) -> None:
        """Until Slurm has requeued it `restarts` times."""
        self.wait(lambda: int(self.slurm.job(self.id)["Restarts"]) >= restarts, f"{restarts} restarts")

    def hosts(self) -> list[int]:
        """Numbers of its nodes."""
        names = self.slurm.run("scontrol", "show", "hostnames", self.slurm.job(self.id)["NodeList"]).split()
        return [int(name.lstrip(self.slurm.nodes.prefix)) for name in names]

    def wait(self, until: Callable[[], Any], what: str) -> None:
        try:
            self.slurm.wait(until, DONE_S, what)
        except TimeoutError as error:
            logs = [f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("logs/*"))]
            raise AssertionError("\n".join([str(error), str(self.events()), *logs])) from None

    def check(self, expected: list[dict[str, Any]]) -> None:
        """Checks that all steps are done, with the losses and norms of the uninterrupted run."""
        (path,) = self.cwd.glob("outputs/*/metrics.jsonl")
        rows = [row for row in read_metrics(path) if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, len(expected) + 1))
        for row, want in zip(rows, expected, strict=True):
            for key in ("loss", "grad_norm"):
                assert row[key] == pytest.approx(want[key], rel=1e-4), (row["step"], key)

    def replayed(self) -> list[int]:
        """Number of steps that each later attempt repeated."""
        rows = self.rows()
        attempts = sorted({row["attempt"] for row in rows})
        of = {attempt: [row["step"] for row in rows if row["attempt"] == attempt] for attempt in attempts}
        return [max(of[a]) + 1 - min(of[b]) for a, b in zip(attempts, attempts[1:], strict=False)]


def urgent(slurm: Slurm, folder: Path, nodes: int, seconds: int) -> str:
    """Submit a job that preempts others."""
    (folder / "urgent.sh").write_text(f"#!/bin/sh\nsleep {seconds}\n")
    own = ["--parsable", "--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "urgent.sh"]
    return slurm.run("sbatch", *own, cwd=folder).strip()


def test_a_preempted_job_resumes(slurm: Slurm, tmp_path: Path, alone: Any) -> None:
    slurm.environment["HF_TOKEN"] = secret = "a-token-that-" + "nobody-is-to-see"  # in two parts: not in this file
    job = Job(slurm, tmp_path, 2, "--training.steps", "80")
    job.wait_for_step(10)
    urgent(slurm, tmp_path, 3, 1)
    job.wait_until_done()
    job.check(alone(80))
    assert job.replayed() == [0], "it was saved on preemption"
    assert [why.split(",")[0] for why in job.details("requeued")] == ["preempted"]
    assert "done   80/80" in job.status()
    check_records(job, secret)


def check_records(job: Job, secret: str) -> None:
    """What ran is recorded, without secrets."""
    assert (job.folder / "code/dtron/models/llama.py").read_text() == (ROOT / "dtron/models/llama.py").read_text()
    about = json.loads((job.folder / "environment.json").read_text())
    assert about["host"] in [job.slurm.nodes.name(i) for i in range(1, 5)]
    assert about["dtron"].startswith(str(job.folder / "code")), "the copy is what ran"
    commit = job.slurm.run("git", "rev-parse", "HEAD", cwd=ROOT).strip()
    assert json.loads((job.folder / "git.json").read_text())["commit"] == commit
    names = {path.name for path in job.folder.glob("logs/*")}
    assert {"batch.log", *(f"{attempt}-train-{job.slurm.nodes.name(1)}.log" for attempt in (0, 1))} <= names
    written = [path for path in job.cwd.rglob("*") if path.is_file()]
    assert len(written) > 100 and not [path for path in written if secret.encode() in path.read_bytes()]


@pytest.mark.long
def test_twice_preempted_and_a_node_lost(tmp_path: Path, alone: Any) -> None:
    """On four nodes, dp 2 x tp 2; without intervention the job ends like an uninterrupted one."""
    with cluster(4, requeue_s=75, prefix="t") as slurm:
        job = twice_preempted_and_a_node_lost(slurm, tmp_path)
        assert int(slurm.job(job.id)["Restarts"]) == 3, job.events()
    job.check(alone(300))
    first, second, third = job.replayed()
    assert (first, second) == (0, 0) and 0 < third <= 20, "a lost node costs what was not saved"


def twice_preempted_and_a_node_lost(slurm: Slurm, tmp_path: Path) -> Job:
    job = Job(slurm, tmp_path, 4, "--training.steps", "300")
    job.wait_for_step(30)
    urgent(slurm, tmp_path, 2, 1)
    job.wait_for_step(60, attempt=2)
    urgent(slurm, tmp_path, 4, 1)
    job.wait_for_step(110, attempt=3)
    slurm.nodes.kill(3)  # slurmd too
    job.wait_for_restart_of_slurm(3)
    slurm.start_node(3)
    job.wait_until_done()
    return job


@pytest.mark.long
def test_preflight_runs_before_the_training(slurm: Slurm, tmp_path: Path) -> None:
    """In folders with spaces in their names."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    job = Job(slurm, folder, 2, preflight=True)
    job.wait_until_done()
    figures = json.loads((job.folder / "logs/0-preflight.json").read_text())
    names = [slurm.nodes.name(i) for i in job.hosts()]
    assert figures["exit_code"] == 0 and all(name in json.dumps(figures) for name in names)
    assert "dp_shard" in (job.folder / f"logs/0-preflight-{names[0]}.log").read_text()


@pytest.mark.long
def test_templates_submitted_by_hand(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.replace("local_batch_size = 8", "local_batch_size = 4"))
    own = {"CONFIG": "tiny.toml", "PYTHON": sys.executable, "RANKS_PER_NODE": "1", "CODE": str(ROOT), "PREFLIGHT": "0"}
    exported = "--export=ALL," + ",".join(f"{name}={value}" for name, value in own.items())
    templates = [ROOT / "scripts/slurm" / name for name in ("train.sbatch", "preflight.sbatch")]
    ids = [slurm.run("sbatch", "--parsable", "--nodes=2", exported, path, cwd=tmp_path).strip() for path in templates]
    for job_id in ids:
        slurm.wait(lambda job_id=job_id: slurm.job(job_id)["JobState"] in ("COMPLETED", "FAILED"), DONE_S, "it ends")
        log = "".join(path.read_text() for path in tmp_path.glob(f"*-{job_id}.log"))
        assert slurm.job(job_id)["JobState"] == "COMPLETED", log
    assert (tmp_path / f"outputs/slurm/dtron-{ids[0]}/control/DONE").exists()
    assert (tmp_path / f"preflight-{ids[1]}.json").exists()


@pytest.mark.long
def test_a_job_resumes_after_the_time_limit(slurm: Slurm, tmp_path: Path, alone: Any) -> None:
    job = Job(slurm, tmp_path, 2, "--time", "2", "--save-s", "60", "--training.steps", "500", pause_ms=50)
    job.wait_until_done()
    job.check(alone(500))
    assert set(job.replayed()) == {0} and len(job.details("requeued")) >= 1
    assert all(why.startswith("the time limit") for why in job.details("requeued"))


@pytest.mark.long
def test_a_run_that_does_not_save_in_time_resumes_from_the_previous_checkpoint(
    slurm: Slurm, tmp_path: Path, alone: Any
) -> None:
    """A rank is stopped when the time limit approaches: the batch script does not wait for it too long."""
    limits = ["--time", "2", "--save-s", "60", "--comm.train_timeout_seconds", "600"]
    job = Job(slurm, tmp_path, 2, *limits, "--training.steps", "150", "--checkpoint.interval", "5", pause_ms=50)
    job.wait_for_step(10)
    for pid in slurm.nodes.pids(2):
        if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGSTOP)
    job.wait_until_done()
    job.check(alone(150))
    assert len(job.details("late")) == 1 and not job.details("hang"), job.events()
    assert job.replayed()[0] <= 5, "none, if Slurm wakes the rank up when it ends the job"


@pytest.mark.long
def test_scancel_saves_and_the_same_submission_resumes(slurm: Slurm, tmp_path: Path, alone: Any) -> None:
    job = Job(slurm, tmp_path, 2, "--training.steps", "150")
    job.wait_for_step(25)
    slurm.run("scancel", job.id)
    slurm.wait(lambda: slurm.job(job.id)["JobState"] == "CANCELLED", 60, "the job is gone")
    assert (job.folder / "control/SAVED").exists(), job.events()
    assert "cancelled" in job.status() and not job.details("requeued")
    again = Job(slurm, tmp_path, 2, "--training.steps", "150")
    again.wait_until_done()
    again.check(alone(150))
    assert again.replayed() == [0]


@pytest.mark.long
def test_requeued_by_a_user(slurm: Slurm, tmp_path: Path, alone: Any) -> None:
    job = Job(slurm, tmp_path, 2, "--training.steps", "150")
    job.wait_for_step(25)
    slurm.run("scontrol", "requeue", job.id)
    job.wait_until_done()
    job.check(alone(150))
    assert job.replayed() == [0]


@pytest.mark.long
def test_stopped_by_a_user(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, 2, "--training.steps", "5000")
    job.wait_for_step(5)
    (job.folder / "control" / "STOP").touch()
    job.wait(lambda: slurm.job(job.id)["JobState"] == "COMPLETED", "the job has ended")
    assert len(job.details("started")) == 1 and "stopped" in job.status()
    waiting = Job(slurm, tmp_path, 2, "--sbatch=--begin=now+10")
    (waiting.folder / "control").mkdir()
    (waiting.folder / "control" / "STOP").touch()
    waiting.wait(lambda: waiting.details("stopped"), "stopped when its turn comes")
    assert not waiting.details("started")


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modules", "nothing/1"], "module load nothing/1 failed"),
        (["--python", "/no/python", "--retries", "0"], "/no/python with dtron does not run"),
        (["--prolog", "prolog.sh"], "PROLOG"),
    ],
)
def test_a_missing_environment_ends_the_job(slurm: Slurm, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "prolog.sh").write_text('echo "$THIS_IS_NOT_SET"\nfalse\n')
    job = Job(slurm, tmp_path, 2, *arguments)
    job.wait(lambda: slurm.job(job.id)["JobState"] == "FAILED", "failed")
    assert message in job.details("failed")[0] and "  failed  " in job.status()


@pytest.mark.long
def test_in_a_container(slurm: Slurm, tmp_path: Path, alone: Any) -> None:
    """One whose Python does not exist outside; the job is requeued and resumes."""
    (tmp_path / "a box").mkdir()
    box = tmp_path / "a box" / "run"
    box.write_text(
        '#!/bin/sh\nexec unshare --mount sh -c "mount --bind $1 /mnt && shift && exec \\"\\$@\\"" box "$@"\n'
    )
    box.chmod(0o755)
    assert not Path("/mnt/bin/python").exists()
    own = "--container", f"'{box}' {sys.prefix}", "--python", "/mnt/bin/python", "--training.steps", "60"
    job = Job(slurm, tmp_path, 2, *own, preflight=True)
    job.wait_for_step(10)
    slurm.run("scontrol", "requeue", job.id)
    job.wait_until_done()
    job.check(alone(60))
    assert json.loads((job.folder / "environment.json").read_text())["executable"] == "/mnt/bin/python"


@pytest.mark.long
def test_ranks_signalled_by_an_unknown_sender(slurm: Slurm, tmp_path: Path, alone: Any) -> None:
    job = Job(slurm, tmp_path, 2, "--training.steps", "150")
    job.wait_for_step(25)
    for pid in slurm.nodes.pids(job.hosts()[1]):
        if b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
    job.wait_until_done()
    job.check(alone(150))
    assert job.replayed() == [0] and job.details("requeued")[0].startswith("a signal")


@pytest.mark.long
def test_nodes_cut_from_each_other(slurm: Slurm, tmp_path: Path, alone: Any) -> None:
    """But not from the controller, which notices nothing."""
    job = Job(slurm, tmp_path, 2, "--training.steps", "150")
    job.wait_for_step(25)
    one, two = job.hosts()
    slurm.nodes.drop(one, two)
    job.wait(lambda: job.details("requeued"), "requeued")
    slurm.nodes.heal(one)
    job.wait_until_done()
    job.check(alone(150))
    assert 0 < max(job.replayed()) <= 20


@pytest.mark.long
def test_a_node_cut_off_from_everything(slurm: Slurm, tmp_path: Path, alone: Any) -> None:
    job = Job(slurm, tmp_path, 2, "--training.steps", "150")
    job.wait_for_step(25)
    two = job.hosts()[1]
    slurm.nodes.cut(two)
    job.wait(lambda: int(slurm.job(job.id)["Restarts"]) > 0, "requeued")
    job.wait_until_done()  # on other nodes
    slurm.nodes.heal(two)
    job.check(alone(150))


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "state", "message", "starts"),
    [
        (["--training.dataset", "failing", "--training.dataset_path", "refuse 1 1"], "failed", "copy it there", 1),
        (["--training.dataset", "failing", "--training.dataset_path", "kill 1 5"], "lost", "", 2),
        (["--training.loss", "nan_on_rank_1"], "nonfinite", "step", 1),
    ],
    ids=["mistake", "crash", "nan"],
)
def test_permanent_failures_are_not_retried_forever(
    slurm: Slurm, tmp_path: Path, arguments: list[str], state: str, message: str, starts: int
) -> None:
    job = Job(slurm, tmp_path, 2, "--retries", "1", *arguments)
    job.wait(lambda: slurm.job(job.id)["JobState"] == "FAILED", "failed")
    assert len(job.details("started")) == starts, job.events()
    shown = job.status()
    assert f"  {state}  " in shown and message in shown, shown


@pytest.mark.long
def test_a_queued_job_and_one_cancelled_before_it_starts(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, 2, "--sbatch=--begin=now+1hour")
    assert "queued" in job.status() and "BeginTime" in job.status()
    slurm.run("scancel", job.id)
    assert "cancelled" in job.status()


@pytest.mark.long
def test_preemption_with_the_signal_of_the_job(tmp_path: Path, alone: Any) -> None:
    with cluster(2, signals_preempted=True, prefix="u") as other:
        job = Job(other, tmp_path, 2, "--training.steps", "150")
        job.wait_for_step(25)
        urgent(other, tmp_path, 2, 1)
        job.wait_until_done()
    job.check(alone(150))
    assert job.replayed() == [0] and "preempted" in job.details("stopping")[0]
