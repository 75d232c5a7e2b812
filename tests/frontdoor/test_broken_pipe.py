"""A reader of our output that has seen enough, such as `head`, is no error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from frontdoor import ROOT, environment


def run_without_reader(*command: str, unbuffered: bool = False) -> tuple[int, str]:
    """Exit code and stderr of a command whose standard output is a pipe that nobody reads any more."""
    variables = environment() | {"PYTHONUNBUFFERED": "1" if unbuffered else ""}
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=variables, stdout=write_end, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write_end)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "train.py --help",
        "-m dtron --help",
        "-m dtron prepare --help",
        "scripts/slurm/submit.py --help",
        "scripts/slurm/status.py --help",
    ],
)
@pytest.mark.parametrize("unbuffered", [False, True])
def test_help_may_be_cut_off(command: str, unbuffered: bool) -> None:
    assert run_without_reader(*command.split(), unbuffered=unbuffered) == (0, "")


def test_what_a_command_prints_may_be_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to tokenize\n" * 50)
    out = str(tmp_path / "out")
    prepare = ["-m", "dtron", "prepare", str(tmp_path / "a.txt"), "--tokenizer", "bpe:280", "--out", out]
    done = subprocess.run([sys.executable, *prepare], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run_without_reader("-m", "dtron", "prepare", "--show", out) == (0, "")
