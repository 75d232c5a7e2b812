"""Runs the points of a sweep on this machine, one torchrun after another."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dtron
from dtron.cluster.sweep.points import Point
from dtron.cluster.sweep.runner import End, Job
from dtron.errors import UserError

__all__ = ["LocalJob", "LocalRunner", "arguments"]

STOP_S = 45.0  # torchrun gives its ranks 30 s to exit
RANKS_EXIT_S = 30.0  # for ranks that outlive their torchrun
TAIL_BYTES = 65536


def arguments(folder: Path, attempt: int) -> list[str]:
    """The command line of dtron.train for an attempt at the point in `folder`."""
    where = ["--job.dump_folder", str(folder), "--job.control_folder", str(folder / f"control-{attempt}")]
    return ["--job.config_file", str(folder / "config.toml"), *where]


class LocalRunner:
    """Starts torchrun with `ranks` ranks; their output goes to log-N.txt in the point's folder, N being the attempt."""

    at_once, outlives_sweep = 1, False

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def start(self, point: Point, folder: Path, attempt: int) -> "LocalJob":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self._ranks)]
        command = [*launcher, "-m", "dtron.train", *arguments(folder.absolute(), attempt)]
        root = str(Path(dtron.__file__).resolve().parents[1])  # the ranks import the dtron that checked the point
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path}
        return LocalJob(command, environment, _log(folder, attempt), folder / f"control-{attempt}")

    def find(self, folder: Path, attempt: int, handle: dict[str, Any]) -> Job | None:
        """None: a torchrun that outlived its sweep is not our child. UserError while it runs."""
        if "job_id" in handle:
            raise UserError(f"{folder.name} is job {handle['job_id']} of Slurm: add --slurm to this command")
        if _is_locked(_log(folder, attempt)):
            raise UserError(
                f"{folder.name} is still running, started by a sweep that was killed: wait until it ends, or stop it "
                f"with touch {folder / f'control-{attempt}' / 'STOP'}; then run this command again"
            )
        return None


class LocalJob:
    """A torchrun and its ranks. All inherit the lock of the log, so it is held while any of them runs."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, control: Path) -> None:
        self.control, self._log = control, log
        self.handle: dict[str, Any] = {}
        self._oom_kills, self._began_s = _oom_kills(), time.monotonic()
        with log.open("w") as file:
            _lock(file.fileno())
            # In its own session Ctrl-C does not reach it: the sweep stops it, and knows why it ended.
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def running_s(self) -> float:
        return time.monotonic() - self._began_s

    def poll(self) -> End | None:
        code = self._process.poll()
        if code is None:
            return None
        self._wait_for_ranks()
        return classify_exit(code, _tail(self._log), _oom_kills() > self._oom_kills)

    def stop(self) -> None:
        # torchrun forwards SIGTERM; its ranks are in sessions of their own.
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._wait_for_ranks()

    def _wait_for_ranks(self) -> None:
        """UserError if ranks keep running: they would share the machine with the next point."""
        end = time.monotonic() + RANKS_EXIT_S
        while _is_locked(self._log):
            if time.monotonic() > end:
                raise UserError(
                    f"ranks of the point in {self._log.parent} do not exit; kill them and run this command again"
                )
            time.sleep(0.1)


def classify_exit(code: int, log: str, oom_kills: bool) -> End:
    """From torchrun's exit code and the end of its log. oom_kills: the kernel's OOM killer acted meanwhile."""
    killed = re.search(r"Signal 9 \(SIGKILL\)", log) or code == -signal.SIGKILL
    if killed and oom_kills:
        return End("oom", "a rank was killed by the kernel's OOM killer: the machine ran out of memory")
    if killed:
        return End("lost", "a rank was killed (SIGKILL) from outside the run")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error\b|\w*Error:)", line)] or lines[-1:]
    return End("", errors[0] if errors else f"torchrun exited with code {code} and no message") if code else End()


def _log(folder: Path, attempt: int) -> Path:
    return folder / f"log-{attempt}.txt"


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def _lock(file: int) -> bool:
    """Whether the lock was acquired. A flock lock, unlike a POSIX one, is kept by children that inherit the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # the file system has no locks
    return True


def _is_locked(log: Path) -> bool:
    if not log.exists():
        return False
    with log.open() as file:
        return not _lock(file.fileno())


def _oom_kills() -> int:
    """Processes killed by the kernel's OOM killer since boot; 0 where unknown (only Linux reports it)."""
    try:
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
