"""A real Slurm on one Linux machine: a controller here, and a slurmd in each of several hosts (nodes.py).

    python tests/cluster/slurm.py 4 -- bash      # a shell in which sbatch, squeue, ... reach a cluster of four nodes
    python tests/cluster/slurm.py --check        # prints what is missing for one, if anything

Two partitions over the same nodes: `low`, whose jobs are requeued when `high` wants them, and `high`. Processes, users
and files are this machine's. Needs root and the Debian packages slurmctld, slurmd, slurm-client, munge, iptables and
iproute2.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
import nodes as hosts  # noqa: E402
from nodes import Nodes  # noqa: E402

__all__ = ["Slurm", "available"]

NODE_TIMEOUT_S = 20  # without an answer, until a node counts as lost
UP_S = 60
CONF = """
ClusterName=test
SlurmctldHost={controller_name}({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={cred_s}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={port}
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout={node_timeout_s}
InactiveLimit=0
MinJobAge=600
KillWait=15
MessageTimeout=60
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
{parameters}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=24:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=high Nodes=ALL MaxTime=24:00:00 PriorityTier=10 PreemptMode=OFF
"""


def available() -> str:
    """Why no cluster can be made here; empty if one can."""
    tools = ("slurmctld", "slurmd", "sbatch", "squeue", "munged")
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        return f"not installed: {', '.join(missing)}"
    return hosts.available()


class Slurm:
    """A context manager. `nodes`: its hosts, to cut and to kill. `environment`: in which Slurm's commands reach it.

    requeue_s: seconds after which a requeued job may start again. Slurm's default is 120, for a reason: within a
    minute it may order a node that was lost, and is back, to end the lost attempt, which ends the running one.
    grace_s: seconds until a preempted job is killed. signals_preempted: send it the signal of --signal then, as on
    clusters with preempt_send_user_signal; else SIGTERM.
    """

    def __init__(
        self, count: int, *, requeue_s: int = 5, grace_s: int = 60, signals_preempted: bool = False, prefix: str = "s"
    ) -> None:
        self.nodes = Nodes(count, prefix)
        self.folder = Path(tempfile.mkdtemp(prefix="dtron-slurm-"))
        self._requeue_s, self._grace_s, self._signals_preempted = requeue_s, grace_s, signals_preempted
        self._daemons: dict[str, subprocess.Popen[Any]] = {}
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "Slurm":
        self.nodes.up()
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", ["slurmctld", "-D", "-c"])
            for i in range(1, self.nodes.count + 1):
                self.start_node(i)
            self.wait(lambda: self.node_states() == ["idle"] * self.nodes.count, UP_S, "all nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.nodes.down()  # and with them all slurmd and jobs
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- daemons

    def _configure(self) -> None:
        names = [self.nodes.name(i) for i in range(1, self.nodes.count + 1)]
        lines = [
            f"NodeName={name} NodeAddr={self.nodes.address(i)} CPUs=8 RealMemory=16000 Gres=gpu:8 State=UNKNOWN"
            for i, name in enumerate(names, 1)
        ]
        text = CONF.format(
            controller_name=os.uname().nodename,
            controller=self.nodes.controller,
            folder=self.folder,
            cred_s=self._requeue_s,
            node_timeout_s=NODE_TIMEOUT_S,
            grace_s=self._grace_s,
            port=_free_port(),
            parameters="SlurmctldParameters=preempt_send_user_signal" if self._signals_preempted else "",
            nodes="\n".join(lines),
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        for number in range(8):  # what a node of 8 GPUs has, made of /dev/null
            os.mknod(self.folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        files = [f"--{what}-file={self.folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        self._start("munged", ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files])
        self.wait((self.folder / "munge.socket").exists, 10, "munged is up")

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.out").open("wb") as out:
            whole = ["setpriv", "--pdeathsig", "KILL", *command]  # none is left when this process is killed
            self._daemons[name] = subprocess.Popen(whole, env=self.environment, stdout=out, stderr=out)

    def start_node(self, i: int) -> None:
        """Start the slurmd of node i, also one that was killed."""
        name = self.nodes.name(i)
        (self.folder / f"spool.{name}").mkdir(exist_ok=True)
        with (self.folder / f"slurmd.{name}.out").open("ab") as out:
            command = ["slurmd", "-D", "-N", name]
            self._daemons[name] = self.nodes.popen(i, command, env=self.environment, stdout=out, stderr=out)

    # --- commands of a user

    def run(self, *command: str | Path, check: bool = True, **kwargs: Any) -> str:
        """The output of a command. RuntimeError with all its output if it fails."""
        done = subprocess.run(
            [*map(str, command)], env=self.environment, capture_output=True, text=True, timeout=120, **kwargs
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
        return done.stdout

    def node_states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%t", check=False).split()

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        text = self.run("scontrol", "-o", "show", "job", job_id)
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", text))

    def wait(self, until: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """The value of `until` once it is true. TimeoutError, with the state of the cluster, if it never is."""
        end = time.monotonic() + timeout_s
        while not (value := until()):
            if time.monotonic() > end:
                raise TimeoutError(f"{timeout_s} s, still waiting for: {what}\n{self._state()}")
            time.sleep(0.25)
        return value

    def _state(self) -> str:
        log = (self.folder / "slurmctld.log").read_text(errors="replace").splitlines()[-30:]
        jobs = self.run("squeue", "-o", "%i %T %r %N", check=False)
        return "\n".join([f"nodes: {self.node_states()}", jobs, *log])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def main() -> int:
    if reason := available():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    if sys.argv[1:] == ["--check"]:
        return 0
    count, _, *command = sys.argv[1:]
    with Slurm(int(count)) as slurm:
        return subprocess.run(command, env=slurm.environment).returncode


if __name__ == "__main__":
    sys.exit(main())
