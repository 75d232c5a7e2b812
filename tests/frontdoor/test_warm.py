"""A warm process is what a new one would be, to the program in it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from warm import Warm

SCRIPT = """
import json, os, sys
print(json.dumps({"argv": sys.argv, "folder": os.getcwd(), "name": __name__, "environment": dict(os.environ),
                  "path": sys.path[:2], "stdin": sys.stdin.read()}))
print("told", file=sys.stderr)
{end}
"""


def cold(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('a word')", 1),
        ("raise ValueError('a word')", 1),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
def test_it_is_what_a_new_process_is(tmp_path: Path, end: str, code: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("{end}", end))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}/a", "LC_CTYPE": "C.UTF-8", "MINE": "1"}
    seen = {}
    for name, start in (("warm", warm.run), ("cold", cold)):
        done = start([sys.executable, "-u", "script.py", "--x", "-u"], tmp_path, env)
        assert done.returncode == code and done.stderr.startswith("told\n"), name
        assert ("a word" in done.stderr) == ("a word" in end)
        seen[name] = json.loads(done.stdout)
    assert seen["warm"] == seen["cold"]


def test_torchrun_ends_its_ranks(tmp_path: Path) -> None:
    # One write for a line: print, unbuffered, writes the end of the line apart, and two ranks' lines become one.
    (tmp_path / "sleep.py").write_text("import os, time; os.write(1, b'%d\\n' % os.getpid()); time.sleep(1000)")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sleep.py"]
    process = Warm(command, tmp_path, dict(os.environ), tmp_path / "out", tmp_path / "err")
    end = time.monotonic() + 60
    while (tmp_path / "out").read_text().count("\n") < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    ranks = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    assert sorted(warm.name_of(pid) for pid in ranks) == ["rank 0", "rank 1"]
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1 and "SignalException" in (tmp_path / "err").read_text()
    assert [warm.name_of(pid) for pid in ranks] == ["", ""]
