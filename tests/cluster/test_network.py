"""dtron on several hosts with torchrun alone, while hosts, links and ranks fail.

The commands are those of docs/multinode.md. Every finished run must have the losses of an undisturbed run of one rank.
"""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import Nodes, available

sys.path.append(str(Path(__file__).resolve().parents[1] / "frontdoor"))
from frontdoor import CONFIG, ROOT, environment, torchrun  # noqa: E402

from dtron.observe.metrics import read_metrics  # noqa: E402

pytestmark = pytest.mark.skipif(bool(available()), reason=available())

PAGE = ROOT / "docs" / "multinode.md"
# This epsilon keeps Adam from amplifying the rounding differences between layouts; see tests/parity/single.py.
TINY = (
    CONFIG.replace("lr = 3e-3", "lr = 1e-3\neps = 1e-4")
    + """
[checkpoint]
enable = true
interval = 10
[comm]
init_timeout_seconds = 60
train_timeout_seconds = 6
"""
)
QUICK = 60  # steps


def commands(section: str) -> list[str]:
    """The torchrun commands of a section of the page."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if "torchrun " in line]


class Job:
    """A command of the page on the first `count` nodes, for a tiny model: `per_node` ranks each, `steps` steps."""

    def __init__(self, nodes: Nodes, folder: Path, steps: int, count: int = 2, per_node: int = 1) -> None:
        self.nodes, self.folder, self.steps, self._count, self._per_node = nodes, folder, steps, count, per_node
        self.torchruns: dict[int, subprocess.Popen[bytes]] = {}
        (folder / "x.toml").write_text(TINY)

    def start(self, i: int, command: str, options: str = "", arguments: str = "") -> None:
        """On node i; options: more of torchrun, arguments: more of train.py."""
        words = shlex.split(command)
        at = words.index("torchrun")
        variables = dict(word.split("=", 1) for word in words[:at])
        count, at_most = words.index("--nnodes") + 1, "1:" if "1:2" in words else ""
        words[count] = f"{at_most}{self._count}"
        words[words.index("--nproc-per-node") + 1] = str(self._per_node)
        words[words.index("configs/llama3-8b.toml")] = str(self.folder / "x.toml")
        words[words.index("--training.global_batch_size") + 1] = "8"
        program = words.index("train.py")
        words[program : program + 1] = [*shlex.split(options), str(ROOT / "train.py")]
        local = 8 // (self._count * self._per_node)
        ends = f"--training.steps {self.steps} --training.local_batch_size {local} {arguments}".split()
        log = (self.folder / f"log{i}").open("ab")
        command_line = [sys.executable, "-m", "torch.distributed.run", *words[at + 1 :], *ends]
        variables |= {"GLOO_SOCKET_IFNAME": "eth0"}
        self.torchruns[i] = self.nodes.popen(
            i, command_line, cwd=self.folder, env=environment() | variables, stdout=log, stderr=log
        )
        log.close()

    def start_all(self, command: str, options: str = "", arguments: str = "") -> None:
        for i in range(1, self._count + 1):
            self.start(i, command, options, arguments)

    def ends(self, *which: int, within_s: float = 240) -> list[int]:
        """Exit codes of the torchruns of these nodes, or of all."""
        end = time.monotonic() + within_s
        try:
            return [self.torchruns[i].wait(end - time.monotonic()) for i in which or self.torchruns]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running; {self}") from None

    def reach(self, step: int, within_s: float = 200) -> None:
        """Wait until this step is done."""
        self.wait(lambda: any(row.get("step", 0) >= step for row in self.rows()), within_s)

    def wait(self, until: Callable[[], Any], within_s: float = 200) -> None:
        end = time.monotonic() + within_s
        while not until():
            running = [i for i, process in self.torchruns.items() if process.poll() is None]
            assert running and time.monotonic() < end, f"condition not reached; {self}"
            time.sleep(0.02)

    def rows(self) -> list[dict[str, Any]]:
        """Every row with a loss, of every attempt."""
        lines = [
            line for file in self.folder.glob("outputs/*/metrics.jsonl") for line in file.open() if line[-1:] == "\n"
        ]
        return [row for row in map(json.loads, lines) if "loss" in row]

    def attempts(self) -> list[tuple[int, int]]:
        """First and last step of each attempt that did one."""
        steps: dict[int, list[int]] = {}
        for row in self.rows():
            steps.setdefault(row["attempt"], []).append(row["step"])
        return [(min(done), max(done)) for _, done in sorted(steps.items())]

    def log(self, i: int) -> str:
        path = self.folder / f"log{i}"
        return path.read_text() if path.exists() else ""

    def rank(self, i: int) -> int:
        """The process id of the first rank on node i."""
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
        found = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
        agent = self.torchruns[i].pid
        return min(int(pid) for pid, parent, args in found if int(parent) == agent and "train.py" in args)

    def __str__(self) -> str:
        return "\n".join(f"node {i}:\n{self.log(i)[-6000:]}" for i in sorted(self.torchruns))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """The rows of an undisturbed run of `steps` steps on one rank."""

    @functools.cache
    def rows(steps: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("undisturbed")
        run = torchrun(folder, 1, "--training.steps", str(steps), config=TINY)
        assert run.code == 0, run.everything()
        return read_metrics(next(folder.glob("outputs/*/metrics.jsonl")))

    return rows


@pytest.fixture
def check(undisturbed: Callable[[int], list[dict[str, Any]]]) -> Callable[[Job], None]:
    """Checks that a job did every step, with the losses of the undisturbed run."""

    def whole(job: Job) -> None:
        (path,) = job.folder.glob("outputs/*/metrics.jsonl")
        rows = read_metrics(path)
        expected = undisturbed(job.steps)
        assert [row["step"] for row in rows] == [row["step"] for row in expected], str(job)
        for row, want in zip(rows, expected, strict=True):
            for name in ("loss", "grad_norm"):
                assert row[name] == pytest.approx(want[name], rel=1e-4), (row["step"], name)

    return whole


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """The page's hosts: node1, node2 and so on."""
    with Nodes(4, prefix="node") as made:
        yield made


@pytest.fixture
def job_of(nodes: Nodes, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Job, on nodes that are whole."""
    yield lambda steps, **kwargs: Job(nodes, tmp_path, steps, **kwargs)
    for i in range(1, nodes.count + 1):
        nodes.kill(i)
        nodes.heal(i)


(SAME,) = commands("Start")
STATIC = commands("Without a rendezvous")
(ELASTIC,) = commands("Fewer or more machines")
WITH_OWN_STORE = f"{ELASTIC.partition(' ')[0]} {SAME}"
LONG = 300  # steps

# --- the shortest


@pytest.mark.long
def test_a_short_link_outage_and_a_killed_rank(job_of: Callable[..., Job], check: Callable[[Job], None]) -> None:
    """A link that is down for less than the timeouts costs nothing; a rank that dies is restarted.

    Each torchrun counts its own restarts: that of node1, whose rank only lost contact, counts none.
    """
    job = job_of(QUICK)
    job.start_all(SAME)
    job.reach(15)
    job.nodes.cut(2)
    time.sleep(0.5)
    n_rows = len(job.rows())
    time.sleep(2)
    assert len(job.rows()) == n_rows < QUICK, "no step is done while it is down"
    job.nodes.heal(2)
    job.reach(n_rows + 10)
    assert len(job.attempts()) == 1
    os.kill(job.rank(2), signal.SIGKILL)
    assert job.ends() == [0, 0], str(job)
    assert len(job.attempts()) == 2
    check(job)


def test_the_page_lists_all_tests_of_this_file() -> None:
    ours = {name for name in globals() if name.startswith("test_")} - {"test_the_page_lists_all_tests_of_this_file"}
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert named == ours


# --- in `make test-long`: without faults


@pytest.mark.long
@pytest.mark.parametrize(("count", "per_node"), [(4, 1), (2, 2)])
def test_nodes_train_as_one_rank_does(
    count: int, per_node: int, job_of: Callable[..., Job], check: Callable[[Job], None]
) -> None:
    job = job_of(QUICK, count=count, per_node=per_node)
    job.start_all(SAME)
    assert job.ends() == [0] * count, str(job)
    assert f"on {count * per_node} x cpu" in job.log(1) + job.log(2)
    check(job)


@pytest.mark.long
@pytest.mark.parametrize("i", [1, 2])
def test_a_killed_rank_restarts_without_a_rendezvous(
    i: int, job_of: Callable[..., Job], check: Callable[[Job], None]
) -> None:
    job = job_of(QUICK)
    for node, command in enumerate(STATIC, start=1):
        job.start(node, command)
    job.reach(20)
    os.kill(job.rank(i), signal.SIGKILL)
    assert job.ends() == [0, 0], str(job)
    assert len(job.attempts()) == 2
    check(job)


@pytest.mark.long
@pytest.mark.parametrize("how", ["one rank", "every torchrun", "one torchrun"])
def test_stopping(how: str, job_of: Callable[..., Job], check: Callable[[Job], None]) -> None:
    job = job_of(LONG)
    job.start_all(SAME)
    job.reach(20)
    if how == "one rank":
        os.kill(job.rank(2), signal.SIGTERM)
        assert job.ends(within_s=60) == [0, 0], "no restart"
    else:
        for i in (2, 1) if how == "every torchrun" else (2,):
            job.torchruns[i].send_signal(signal.SIGTERM)
        assert job.ends(2, within_s=60) == [1]
        if how == "every torchrun":
            assert job.ends(1, within_s=60) in ([0], [1]), "whether its ranks had ended when it heard"
        else:
            time.sleep(10)
            assert job.torchruns[1].poll() is None and job.nodes.pids(1) == {job.torchruns[1].pid}, "it waits alone"
            job.nodes.kill(1)
    (saved,) = job.folder.glob("outputs/*/SAVED")
    assert json.loads(saved.read_text())["step"] == job.attempts()[0][1]
    job.start_all(SAME)
    assert job.ends() == [0, 0], str(job)
    assert len(job.attempts()) == 2
    check(job)


# --- links


def in_a_step(job: Job) -> None:
    """No save is near: there is one in ten steps."""
    job.reach(next(step for step in range(23, LONG, 10) if step > len(job.rows())))


def in_a_save(job: Job) -> None:
    job.reach(19)
    job.wait(lambda: any(job.folder.glob("outputs/*/checkpoint/step-*.partial-*")))


WHEN = [in_a_step, in_a_save]  # saves have a timeout of their own, of hours


@pytest.mark.long
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("i", [1, 2])
def test_a_link_that_is_down_for_longer_than_the_timeout(
    i: int, when: Callable[[Job], None], job_of: Callable[..., Job], check: Callable[[Job], None]
) -> None:
    """node1, where the rendezvous is, or the other."""
    job = job_of(LONG)
    job.start_all(SAME)
    when(job)
    job.nodes.cut(i)
    job.wait(lambda: "the run hangs after step" in job.log(1), 40)
    time.sleep(15)
    job.nodes.heal(i)
    assert job.ends() == [0, 0], str(job)
    assert len(job.attempts()) == 2
    check(job)


@pytest.mark.long
@pytest.mark.parametrize("when", WHEN)
def test_a_link_that_stays_down(
    when: Callable[[Job], None], job_of: Callable[..., Job], check: Callable[[Job], None]
) -> None:
    """The side with the rendezvous reports which rank it waits for; ranks on the other side exit and report it."""
    job = job_of(LONG)
    set_retries(job.nodes, 2, 6)
    job.start_all(SAME, "--max-restarts 0")
    when(job)
    job.nodes.cut(2)
    assert job.ends(1, within_s=60) == [1]
    waited_s = re.search(
        r"the run hangs after step \d+: rank 0 has waited ([\d.]+) s for rank 1; comm.train", job.log(1)
    )
    assert waited_s is not None, str(job)
    assert float(waited_s[1]) < (6 if when is in_a_step else 18), "the limit, or three times the limit"
    assert "rank 1 did not answer within 1.5 s: stopped, gone, cut off, or in code" in job.log(1)
    alone = "error: rank 1 (lost contact with the others, nor can|cannot reach) the rendezvous store"
    # In a save they wait for the kernel, as torchrun does, which then ends its rank.
    job.wait(lambda: re.search(alone, job.log(2)) or when is in_a_save and job.torchruns[2].poll() is not None, 100)
    job.wait(lambda: job.nodes.pids(2) <= {job.torchruns[2].pid}, 60)
    job.nodes.kill(2)
    job.nodes.heal(2)
    set_retries(job.nodes, 2, 15)
    job.start_all(SAME)
    assert job.ends() == [0, 0], str(job)
    check(job)


def set_retries(nodes: Nodes, i: int, count: int) -> None:
    """How often node i retransmits before the kernel gives up a connection: 15 times take 15 min."""
    with nodes.popen(i, ["sh", "-c", f"echo {count} >/proc/sys/net/ipv4/tcp_retries2"]) as process:
        assert process.wait(10) == 0


@pytest.mark.long
def test_two_nodes_that_cannot_reach_each_other(job_of: Callable[..., Job]) -> None:
    """Both reach the rendezvous, on a third."""
    job = job_of(LONG, count=4)
    job.start_all(SAME, "--max-restarts 0")
    in_a_step(job)
    job.nodes.drop(2, 3)
    assert job.ends(within_s=60) == [1] * 4, str(job)
    logs = "".join(map(job.log, job.torchruns))
    assert len(re.findall("error: the run hangs after step", logs)) == 1
    expected = "others have finished what ranks? [0123, -]+ still wait in: look at the network of these|"
    expected += "every rank waits in the same collective: look at the network between them"
    assert re.search(expected, logs), logs


# --- nodes


@pytest.mark.long
def test_a_lost_node_of_a_fixed_number(job_of: Callable[..., Job], check: Callable[[Job], None]) -> None:
    """The others wait for it for join_timeout, and exit; the same command resumes the run."""
    job = job_of(LONG)
    job.start_all(SAME, "--rdzv-conf join_timeout=30")
    job.reach(20)
    job.nodes.kill(2)
    began = time.monotonic()
    assert job.ends(1) == [1], str(job)
    assert 30 < time.monotonic() - began < 60 and "RendezvousTimeoutError" in job.log(1)
    job.start_all(SAME)
    assert job.ends() == [0, 0], str(job)
    assert len(job.attempts()) == 2
    check(job)


@pytest.mark.long
def test_a_lost_node_that_returns(job_of: Callable[..., Job], check: Callable[[Job], None]) -> None:
    """While the others of a fixed number wait for it."""
    job = job_of(LONG)
    job.start_all(WITH_OWN_STORE)
    job.reach(20)
    job.nodes.kill(2)
    time.sleep(20)
    job.start(2, WITH_OWN_STORE)
    assert job.ends() == [0, 0], str(job)
    assert len(job.attempts()) == 2
    check(job)


@pytest.mark.long
def test_the_node_of_the_rendezvous_is_lost(job_of: Callable[..., Job], check: Callable[[Job], None]) -> None:
    """All exit soon, regardless of --nnodes and --max-restarts."""
    job = job_of(LONG)
    job.start_all(ELASTIC)
    job.reach(20)
    job.nodes.kill(1)
    assert job.ends(2, within_s=60) == [1] and "RendezvousConnectionError" in job.log(2)
    job.wait(lambda: not job.nodes.pids(2), 30)
    job.start_all(ELASTIC)
    assert job.ends() == [0, 0], str(job)
    check(job)


@pytest.mark.long
def test_training_continues_on_fewer_nodes_and_admits_a_new_one(
    job_of: Callable[..., Job], check: Callable[[Job], None]
) -> None:
    job = job_of(3 * LONG)
    job.start_all(ELASTIC)
    job.reach(20)
    job.nodes.kill(2)
    before = job.attempts()[0][1]
    job.reach(before + 20)
    assert "dtron 0.1.0" in job.log(1) and ": one rank, on 1 x cpu" in job.log(1)
    job.start(2, ELASTIC)
    assert job.ends() == [0, 0], str(job)
    first, second, third = job.attempts()
    assert first[1] - 10 <= second[0] <= first[1] + 1, "at most the steps since a checkpoint are done again"
    assert third[0] == second[1] + 1, "none is: the ranks are stopped, and save"
    check(job)


@pytest.mark.long
def test_elastic_needs_a_torch_variable(job_of: Callable[..., Job]) -> None:
    """Without the variable torch admits no new node; if this test fails, docs/multinode.md no longer needs it."""
    job = job_of(10 * LONG)
    without = ELASTIC.partition(" ")[2]
    assert without.startswith("torchrun ")
    job.start_all(without)
    job.reach(20)
    job.nodes.kill(2)
    job.reach(job.attempts()[0][1] + 20)
    job.start(2, without)
    assert job.ends() == [1, 1], str(job)
    assert re.search(r"DistStoreError: wait timeout after 60000ms, keys: .*/MASTER_ADDR", job.log(2))
