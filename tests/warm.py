"""Commands of Python that start warm: forked from a process that has imported torch and dtron, and nothing else.

A rank of train.py spends 6 CPU-seconds in imports, torchrun 3; a fork costs milliseconds. All else is as in a process
of its own: argv, environment, folder, output files, session, signals, exit code. torchrun is torch's own too, its
ranks forked instead of started.

What only a new interpreter has is not there: options of python, variables that torch reads while it is imported, and
/proc/PID/cmdline and environ. A rank's name (/proc/PID/comm) is "rank N".
"""

import atexit
import functools
import io
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Warm", "children", "name_of", "ranks_of", "run", "without_times"]

TICK_S = 0.01


class _Process:
    """What torchrun and these tests use of subprocess.Popen."""

    args: list[str]
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        raise NotImplementedError

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, when it has ended. subprocess.TimeoutExpired."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(TICK_S)
        return code

    def send_signal(self, signum: int) -> None:
        """Nothing is done if it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _Forked(_Process):
    """A child of this process."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: str, outputs: Sequence[int], session: bool):
        sys.stdout.flush()
        sys.stderr.flush()
        self.args = list(command)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of threads, of which the child needs none
            self.pid = os.fork()
        if self.pid == 0:
            _become(self.args, env, cwd, outputs, session)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _become(command: list[str], env: Mapping[str, str], cwd: str, outputs: Sequence[int], session: bool) -> NoReturn:
    """Be the process of `command`, [python, -u, (-m module | script), ...], after a fork; does not return."""
    code = 1
    try:
        if session:
            os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for file, descriptor in zip(outputs, (1, 2), strict=True):
            os.dup2(file, descriptor)
        os.closerange(3, 4096)  # else a socket of torchrun's would outlive it in its ranks
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        _name(f"rank {env['RANK']}" if "RANK" in env else "warm")
        sys.stdin = open(os.devnull)  # noqa: SIM115
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            file = io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), write_through=command[1] == "-u")
            setattr(sys, name, file)
            setattr(sys, f"__{name}__", file)
        sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
        warnings.resetwarnings()
        if env.get("PYTHONWARNINGS") == "ignore":
            warnings.simplefilter("ignore")
        rest = [word for word in command[1:2] if word != "-u"] + command[2:]
        # A fork leaves torch's thread pool to be made again. Autograd's threads, which start together at the first
        # backward, were seen to race for it and abort ("Invalid thread pool!", torch 2.13): make it here.
        threads = sys.modules["torch"]
        threads.set_num_threads(threads.get_num_threads())
        _fork_the_ranks_of_torchrun()
        code = _run(rest)
    except BaseException:
        traceback.print_exc()
    finally:
        for file in (sys.stdout, sys.stderr):
            file.flush()
        os._exit(code)


def _run(rest: list[str]) -> int:
    """The program as __main__; its exit code."""
    try:
        if rest[0] == "-m":
            sys.argv = ["-m", *rest[2:]]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".* found in sys.modules after import of package")
                runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = rest
            sys.path.insert(0, str(Path(rest[0]).resolve().parent))
            runpy.run_path(rest[0], run_name="__main__")
        atexit._run_exitfuncs()
        return 0
    except SystemExit as end:
        atexit._run_exitfuncs()
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _name(name: str) -> None:
    Path("/proc/self/comm").write_text(name)


def name_of(pid: int) -> str:
    """`rank N` for a rank of a warm torchrun, "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def children(parent: int) -> list[int]:
    """Its children's process ids."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.name))
        except (OSError, ProcessLookupError):
            continue  # it has just ended
    return found


def ranks_of(agent: int) -> list[int]:
    """Process ids of the ranks that a warm torchrun has started, in their order."""
    found = {name_of(pid): pid for pid in children(agent)}
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name)) if name.startswith("rank ")]


def _fork_the_ranks_of_torchrun() -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def popen(self: Any, args: tuple[str, ...], env: dict[str, str]) -> _Forked:
        outputs = [file.fileno() if file else n for n, file in ((1, self._stdout), (2, self._stderr))]
        return _Forked(args, env, os.getcwd(), outputs, session=True)

    SubprocessHandler._popen = popen  # type: ignore[method-assign, assignment]


# --- the warm process, and how it is spoken to


def _serve(requests: Connection) -> None:
    """Fork what is asked for, until nobody asks any more."""
    children: dict[int, _Forked] = {}
    while True:
        try:
            what, args = requests.recv()
        except EOFError:
            os._exit(0)
        if what == "poll":
            requests.send(children[args].poll())
            continue
        command, env, cwd, paths = args
        files = {path: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for path in paths}
        child = _Forked(command, env, cwd, [files[path] for path in paths], session=False)
        for file in files.values():
            os.close(file)
        children[child.pid] = child
        requests.send(child.pid)


@functools.cache
def _warm_process() -> Connection:
    """Started once for each process of tests."""
    ours, theirs = multiprocessing.Pipe()
    tests = Path(__file__).resolve().parent
    code = f"import sys; sys.path[:0] = {[str(tests.parent), str(tests)]}; import warm; warm._main({theirs.fileno()})"
    own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    subprocess.Popen([sys.executable, "-c", code], env=os.environ | own, pass_fds=[theirs.fileno()])
    theirs.close()
    return ours


def _main(descriptor: int) -> None:
    """Import what train.py imports on its way, but nothing that only some runs use."""
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.pipelining
    import torch.distributed.run
    import torch.distributed.tensor.parallel

    import dtron.train.evaluate
    import dtron.train.trainer  # noqa: F401

    torch.set_num_threads(1)
    _serve(Connection(descriptor))


class Warm(_Process):
    """A process as subprocess.Popen gives one, its output in files. command: [sys.executable, ...]."""

    def __init__(
        self, command: Sequence[str], cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path | None = None
    ) -> None:
        assert command[0] == sys.executable
        self.args = list(command)
        self.pid = self._ask("start", (self.args, dict(env), str(cwd), [str(stdout), str(stderr or stdout)]))

    @staticmethod
    def _ask(what: str, args: Any) -> Any:
        _warm_process().send((what, args))
        return _warm_process().recv()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ask("poll", self.pid)
        return self.returncode


def run(
    command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """subprocess.run(command, capture_output=True, text=True), warm."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = Warm(command, cwd, os.environ if env is None else env, out, err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def without_times(log: str) -> str:
    """Lines of the log without the time stamp that each begins with where nobody looks at a terminal."""
    return re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", log)
