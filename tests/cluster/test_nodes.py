"""The hosts of tests/cluster are isolated like real ones, can be cut off, and leave nothing behind."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nodes as nodes_module
import pytest
from nodes import HOSTS, Nodes, available

pytestmark = pytest.mark.skipif(bool(available()), reason=available())

# A reachable machine refuses a connection to a port without a listener; an unreachable one does not answer.
ASK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=0.5)
except ConnectionRefusedError:
    print("reached")
except OSError:
    print("lost")
"""


def answer(nodes: Nodes, i: int, command: list[str]) -> str:
    process = nodes.popen(i, command, stdout=subprocess.PIPE, text=True)
    return process.communicate(timeout=60)[0].strip()


def reaches(nodes: Nodes, i: int, j: int) -> bool:
    return answer(nodes, i, [sys.executable, "-ISc", ASK, nodes.name(j)]) == "reached"


def traces(prefix: str) -> list[str]:
    """Everything on this machine with the prefix of nodes."""
    commands = ("ip -br link", "ip netns", "ip -br addr", "iptables -S")
    text = HOSTS.read_text() + "".join(subprocess.getoutput(command) + "\n" for command in commands)
    return [line for line in text.splitlines() if prefix in line]


def own_hosts() -> list[str]:
    """The lines of /etc/hosts that were there before any nodes."""
    return [line for line in HOSTS.read_text().splitlines() if "# nodes " not in line]


@pytest.fixture(scope="module")
def three() -> Iterator[Nodes]:
    with Nodes(3, prefix="nt") as nodes:
        yield nodes


def test_each_has_a_name_and_an_address(three: Nodes) -> None:
    assert [three.name(i) for i in (1, 2, 3)] == ["nt1", "nt2", "nt3"]
    assert answer(three, 2, ["hostname"]) == "nt2" != socket.gethostname()
    assert f" {three.address(2)}/24 " in answer(three, 2, ["ip", "-4", "addr", "show", "eth0"])
    assert socket.gethostbyname("nt3") == three.address(3), "known on this machine too"
    assert reaches(three, 1, 2) and reaches(three, 3, 1)
    assert (Nodes(2).name(1), Nodes(2).address(2), Nodes(2).controller) == ("n1", "10.77.0.2", "10.77.0.254")


def test_links(three: Nodes) -> None:
    three.cut(2)
    assert not reaches(three, 1, 2) and not reaches(three, 2, 1) and reaches(three, 1, 3)
    three.heal(2)
    assert reaches(three, 1, 2)
    three.drop(1, 2)
    assert not reaches(three, 1, 2) and not reaches(three, 2, 1)
    rules = answer(three, 1, ["iptables", "-S"])
    assert f"-s {three.address(2)}/32 -j DROP" in rules and f"-d {three.address(2)}/32 -j DROP" in rules, "both ways"
    assert reaches(three, 1, 3) and reaches(three, 3, 2)
    assert answer(three, 1, [sys.executable, "-ISc", ASK, three.controller]) == "reached"
    three.heal(1)
    assert reaches(three, 2, 1)


def test_kill_ends_a_node_and_no_other(three: Nodes) -> None:
    """Daemons too, which no longer have a parent in the node."""
    script = "sleep 1000 & setsid sleep 1000 & sleep 1000"
    dead, alive = (three.popen(i, ["sh", "-c", script]) for i in (1, 2))
    while len(three.pids(1)) < 4 or len(three.pids(2)) < 4:
        time.sleep(0.01)
    assert dead.pid in three.pids(1), "the pid is the command's"
    three.kill(1)
    # Which of them dies first decides whether its parent is still there to report it.
    assert three.pids(1) == set() and dead.wait(10) in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert alive.poll() is None and len(three.pids(2)) == 4
    three.kill(2)


def test_nothing_is_left() -> None:
    before = own_hosts()
    with pytest.raises(ZeroDivisionError), Nodes(2, prefix="ntl") as nodes:
        sleeper = nodes.popen(1, ["sleep", "1000"])
        assert len(traces("ntl")) == 2 * 4 + 3, "two lines in hosts, two namespaces, ..., a bridge, its rule"
        raise ZeroDivisionError
    assert sleeper.wait(10) == -signal.SIGKILL
    assert traces("ntl") == [] and own_hosts() == before != []


def test_a_subnet_in_use_is_an_error(three: Nodes) -> None:
    with pytest.raises(RuntimeError, match=f"the subnet {three.subnet} of the nodes nto1.. is in use"):
        Nodes(1, prefix="nto", subnet=three.subnet).up()
    assert traces("nto") == []


LEAVE = """
import sys
from nodes import Nodes
with Nodes(3, prefix="ntk") as nodes:
    nodes.popen(3, ["sleep", "1000"])
    print(nodes.popen(1, ["sleep", "1000"]).pid, flush=True)
    input()
"""


def test_leftovers_of_a_killed_run_are_removed() -> None:
    """While it runs, another process waits for it."""
    folder = Path(nodes_module.__file__).parent
    with subprocess.Popen([sys.executable, "-c", LEAVE], cwd=folder, stdin=-1, stdout=-1, text=True) as run:
        assert run.stdout is not None
        sleeper = int(run.stdout.readline())
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="another process has used nodes"):
            patch.setattr(nodes_module, "WAIT_S", 0.3)
            Nodes(1, prefix="ntk").up()
        run.kill()
    space = Path(f"/proc/{sleeper}/ns/net")  # which a process has until it ends
    assert space.exists() and any("ntk3" in line for line in traces("ntk"))
    with Nodes(1, prefix="ntk") as nodes:
        assert nodes.pids(1) == set() and not space.exists()
        assert not any("ntk3" in line for line in traces("ntk"))
    assert traces("ntk") == []
