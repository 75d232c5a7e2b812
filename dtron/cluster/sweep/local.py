"""The points of a sweep on this machine: one torchrun after the other."""

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

STOP_S = 45.0  # torchrun gives its ranks 30 s to end
LEFT_S = 30.0  # for what a torchrun left behind
TAIL_BYTES = 65536


def arguments(folder: Path, attempt: int) -> list[str]:
    """The command line of dtron.train for an attempt at the point in `folder`."""
    where = ["--job.dump_folder", str(folder), "--job.control_folder", str(folder / f"control-{attempt}")]
    return ["--job.config_file", str(folder / "config.toml"), *where]


class LocalRunner:
    """Starts torchrun with so many ranks; what all of them print goes to log-N.txt in the point's folder."""

    at_once, goes_on = 1, False

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def start(self, point: Point, folder: Path, attempt: int) -> "LocalJob":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self._ranks)]
        command = [*launcher, "-m", "dtron.train", *arguments(folder.absolute(), attempt)]
        ours = str(Path(dtron.__file__).resolve().parents[1])  # the ranks take the dtron that checked the point
        path = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH", "")]))
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path}
        return LocalJob(command, environment, _log(folder, attempt), folder / f"control-{attempt}")

    def find(self, folder: Path, attempt: int, kept: dict[str, Any]) -> Job | None:
        """None: a torchrun that outlived its sweep is nobody's child. UserError while it goes on."""
        if "job_id" in kept:
            raise UserError(f"{folder.name} is job {kept['job_id']} of Slurm: add --slurm to this command")
        if _in_use(_log(folder, attempt)):
            raise UserError(
                f"{folder.name} still runs, started by a sweep that was killed: wait for its end, or end it by "
                f"touch {folder / f'control-{attempt}' / 'STOP'}; then give this command again"
            )
        return None


class LocalJob:
    """A torchrun and its ranks. Whoever of them is still there holds the lock of the log, which all inherit."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, control: Path) -> None:
        self.control, self.kept, self._log = control, {}, log
        self._oom_kills, self._began_s = _oom_kills(), time.monotonic()
        with log.open("w") as file:
            _lock(file.fileno())
            # In a session of its own, Ctrl-C does not reach it: the sweep stops it, and knows why it ended.
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    kept: dict[str, Any]

    def running_s(self) -> float:
        return time.monotonic() - self._began_s

    def poll(self) -> End | None:
        code = self._process.poll()
        if code is None:
            return None
        self._wait_for_ranks()
        return how_it_ended(code, _tail(self._log), _oom_kills() > self._oom_kills)

    def stop(self) -> None:
        # torchrun passes SIGTERM on; its ranks are in sessions of their own.
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._wait_for_ranks()

    def _wait_for_ranks(self) -> None:
        """UserError if ranks stay: they would share the machine with the next point."""
        end = time.monotonic() + LEFT_S
        while _in_use(self._log):
            if time.monotonic() > end:
                raise UserError(f"ranks of the point in {self._log.parent} do not end; end them and start again")
            time.sleep(0.1)


def how_it_ended(code: int, log: str, oom_kills: bool) -> End:
    """From torchrun's exit code and the end of its log. oom_kills: the kernel has killed for memory meanwhile."""
    killed = re.search(r"Signal 9 \(SIGKILL\)", log) or code == -signal.SIGKILL
    if killed and oom_kills:
        return End("oom", "a rank was killed by the kernel: the machine's memory ran out")
    if killed:
        return End("lost", "a rank was killed (SIGKILL), which the run did not do itself")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"(error\b|\w*Error:)", line)] or lines[-1:]
    return End("", said[0] if said else f"torchrun ended with {code}, without a word") if code else End()


def _log(folder: Path, attempt: int) -> Path:
    return folder / f"log-{attempt}.txt"


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def _lock(file: int) -> bool:
    """Whether the lock could be had. flock's, unlike POSIX's, goes on in the children that inherit the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _in_use(log: Path) -> bool:
    if not log.exists():
        return False
    with log.open() as file:
        return not _lock(file.fileno())


def _oom_kills() -> int:
    """Processes that the kernel killed for memory since it started; 0 where it does not say (only Linux does)."""
    try:
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
