"""Several hosts on one Linux machine: each a network and UTS namespace, on one bridge; links that can be cut.

    with Nodes(2) as nodes:  # the hosts n1 at 10.77.0.1 and n2 at 10.77.0.2; this machine is 10.77.0.254
        process = nodes.popen(1, ["hostname"])
        nodes.cut(1)

Processes, users and files are this machine's. Needs root, iproute2, iptables and util-linux.
"""

import errno
import fcntl
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

__all__ = ["Nodes", "available"]

HOSTS = Path("/etc/hosts")
NAMESPACES = Path("/run/netns")
WAIT_S = 900  # for another process that uses nodes of the same prefix
# Tried in its own namespaces, which end with it. A file system like that of /run/netns needs a mount.
TRIAL = """
set -e
ip link add name br type bridge
ip link add name a type veth peer name b
iptables -A INPUT -s 10.77.0.1 -j DROP
mount -t tmpfs none /mnt
"""
# `ip netns exec` would mount another /sys, in which slurmd finds no cgroups.
IN_UTS = 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"'


def available() -> str:
    """Why nodes cannot be made here; empty if they can."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "no network namespaces: not Linux"
    if os.geteuid() != 0:
        return "not root"
    if missing := [tool for tool in ("ip", "iptables", "nsenter", "unshare", "mount") if not shutil.which(tool)]:
        return f"not installed: {', '.join(missing)}"
    if not os.access(HOSTS, os.W_OK):
        return f"{HOSTS} cannot be written"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", TRIAL], capture_output=True, text=True, check=False
    )
    return "" if tried.returncode == 0 else f"namespaces cannot be made: {tried.stderr.strip()}"


class Nodes:
    """Hosts `PREFIX1` .. `PREFIXn`, numbered from 1, at SUBNET.1 .. SUBNET.n; a context manager.

    Only one process at a time uses the nodes of a prefix; others wait. What a killed process left behind, its processes
    included, is removed first.

    prefix: small letters. subnet: the first three numbers of the addresses; by default 10.77.0 for the prefix n and
    another for (almost) every other. RuntimeError if it is in use.
    """

    def __init__(self, count: int, prefix: str = "n", subnet: str | None = None) -> None:
        if not re.fullmatch("[a-z]{1,8}", prefix):
            raise ValueError(f"the prefix is {prefix!r}; 1 to 8 small letters, so that no two give the same name")
        if not 1 <= count < 250:
            raise ValueError(f"{count} nodes; 1 to 249 fit into a subnet")
        number = 0 if prefix == "n" else zlib.crc32(prefix.encode()) % 255 + 1
        self.count, self.prefix, self.subnet = count, prefix, subnet or f"10.77.{number}"
        self._bridge = f"{prefix}-bridge"
        self._lock: IO[str] | None = None

    @property
    def controller(self) -> str:
        """The address of this machine on the bridge."""
        return f"{self.subnet}.254"

    def name(self, i: int) -> str:
        """The host name of node i; it is known on all nodes and on this machine."""
        return f"{self.prefix}{self._checked(i)}"

    def address(self, i: int) -> str:
        return f"{self.subnet}.{self._checked(i)}"

    def __enter__(self) -> "Nodes":
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # --- up and down

    def up(self) -> None:
        """Create all nodes. RuntimeError if that fails; then nothing is left of them."""
        self._take_lock()
        try:
            self._clear()
            self._make()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Kill all processes in the nodes and remove the nodes. Does nothing if they are not up."""
        if self._lock is None:
            return
        try:
            self._clear()
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # forked children have the file open too
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = (Path(tempfile.gettempdir()) / f"dtron-nodes-{self.prefix}.lock").open("w")
        end = time.monotonic() + WAIT_S
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > end:
                self._lock = None
                raise RuntimeError(f"another process has used nodes of the prefix {self.prefix} for {WAIT_S} s")
            time.sleep(0.1)

    def _make(self) -> None:
        if f" {self.subnet}." in _run("ip", "-4", "-o", "addr"):
            raise RuntimeError(f"the subnet {self.subnet} of the nodes {self.prefix}1.. is in use; choose another")
        _run("ip", "link", "add", "name", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.controller}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        _run("iptables", "-I", *self._forwarding())
        for i in range(1, self.count + 1):
            name, link = self.name(i), self._link(i)
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", "name", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "-n", name, "link", "set", "eth0", "addrgenmode", "none")  # IPv4 only
            _run("ip", "-n", name, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            _run("ip", "link", "set", link, "master", self._bridge, "up")
        _change_hosts(self._mark, [f"{self.address(i)} {self.name(i)}" for i in range(1, self.count + 1)])

    def _clear(self) -> None:
        """Remove everything with this prefix, whichever process created it."""
        found = [path.name for path in NAMESPACES.glob("*") if re.fullmatch(rf"{self.prefix}\d+", path.name)]
        for name in found:
            _kill(functools.partial(_pids_in, name))
        names = re.findall(r"^\d+: ([\w-]+)", _run("ip", "-o", "link"), re.MULTILINE)
        for link in names:
            if re.fullmatch(rf"{self.prefix}(\d+-link|-bridge)", link):
                _run("ip", "link", "del", link)
        for name in found:
            _run("ip", "netns", "del", name)
        with suppress(RuntimeError):  # the rule is not there
            _run("iptables", "-D", *self._forwarding())
        _change_hosts(self._mark, [])

    def _forwarding(self) -> list[str]:
        """The rule that lets nodes reach each other on a machine that filters bridged packets, as Docker has it do."""
        return ["FORWARD", "-i", self._bridge, "-o", self._bridge, "-j", "ACCEPT"]

    @property
    def _mark(self) -> str:
        return f"# nodes {self.prefix} of tests/cluster/nodes.py"

    def _link(self, i: int) -> str:
        return f"{self.name(i)}-link"

    def _checked(self, i: int) -> int:
        if not 1 <= i <= self.count:
            raise ValueError(f"node {i}: there are 1 to {self.count}")
        return i

    # --- processes

    def popen(self, i: int, command: Sequence[str | Path], **kwargs: Any) -> "subprocess.Popen[Any]":
        """Start a process in node i, with the node's host name. Its pid is the command's; kwargs: of Popen."""
        enter = ["nsenter", f"--net={NAMESPACES / self.name(i)}", "unshare", "--uts", "sh", "-c", IN_UTS, self.name(i)]
        return subprocess.Popen([*enter, *map(str, command)], **kwargs)

    def pids(self, i: int) -> set[int]:
        """All living processes in node i."""
        return _pids_in(self.name(i))

    def kill(self, i: int) -> None:
        """Simulate a power loss: SIGKILL to all processes of the node. Returns when none is left."""
        _kill(functools.partial(self.pids, i))

    # --- the network

    def cut(self, i: int) -> None:
        """Take down the link of node i, at the switch's end: the node itself may still see its link as up."""
        _run("ip", "link", "set", self._link(i), "down")

    def drop(self, i: int, j: int) -> None:
        """Packets between nodes i and j vanish, in both directions. Both still reach this machine and the others."""
        for chain, side in (("INPUT", "-s"), ("OUTPUT", "-d")):
            self._iptables(i, "-A", chain, side, self.address(j), "-j", "DROP")

    def heal(self, i: int) -> None:
        """Undo all cut(i) and drop(i, ...)."""
        _run("ip", "link", "set", self._link(i), "up")
        self._iptables(i, "-F")

    def _iptables(self, i: int, *arguments: str) -> None:
        _run("nsenter", f"--net={NAMESPACES / self.name(i)}", "iptables", *arguments)


def _run(*command: str) -> str:
    """Its output. RuntimeError with its stderr if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _pids_in(name: str) -> set[int]:
    """The processes in a network namespace. A zombie has none."""
    with suppress(FileNotFoundError):
        space = (NAMESPACES / name).stat()
        return {pid for pid in _all_pids() if _network_of(pid) == (space.st_dev, space.st_ino)}
    return set()


def _all_pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _network_of(pid: int) -> tuple[int, int] | None:
    try:
        space = Path(f"/proc/{pid}/ns/net").stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM):
            return None
        raise
    return space.st_dev, space.st_ino


def _kill(pids: Callable[[], set[int]], longest_s: float = 30) -> None:
    """Until none is left: some may be starting others."""
    end = time.monotonic() + longest_s
    while found := pids():
        if time.monotonic() > end:
            raise RuntimeError(f"processes {sorted(found)} do not end")
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _change_hosts(mark: str, lines: list[str]) -> None:
    """Replace the lines of /etc/hosts that end in `mark`. In place: in a container it is often a mount of its own."""
    with _locked(HOSTS) as file:
        old = file.read()
        kept = [line for line in old.splitlines(keepends=True) if not line.rstrip().endswith(mark)]
        if lines and kept and not kept[-1].endswith("\n"):
            kept[-1] += "\n"
        new = "".join(kept + [f"{line} {mark}\n" for line in lines])
        if new != old:
            file.seek(0)
            file.write(new)  # one write, then truncate: concurrent readers never find it empty
            file.flush()
            file.truncate()


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
