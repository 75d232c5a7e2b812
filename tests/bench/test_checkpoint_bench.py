"""scripts/bench/checkpoint.py, on a tiny model."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "scripts" / "bench" / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines() if "scripts/bench/checkpoint.py " in line]


def bench(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, *launcher, "scripts/bench/checkpoint.py", *arguments]
    return warm.run(command, ROOT, env)


def lines_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("step", ["real", pytest.param("stand-in", marks=pytest.mark.long)])
def test_worlds_and_modes(tmp_path: Path, step: str) -> None:
    out = tmp_path / "out.json"
    options = ["--model", "tiny", "--ranks", "1", "2", "--saves", "2", "--step", step, "--folder", str(tmp_path)]
    lines = lines_of(bench(*options, "--out", str(out)))
    assert lines == [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["ranks"], line["mode"]) for line in lines] == [
        (1, "disabled"),
        (1, "async"),
        (2, "disabled"),
        (2, "async"),
    ]
    assert os.listdir(tmp_path) == ["out.json"], "the checkpoints are deleted"
    for line in lines:
        assert line["step"] == step and line["torch"] and len(line["stalls_s"]) == len(line["copies_s"]) == 3
        assert line["state_bytes"] < line["bytes"] < 1.2 * line["state_bytes"]
        assert line["bytes_a_rank"] == pytest.approx(line["bytes"] / line["ranks"], rel=0.1)
        assert min(line[key] for key in ("save_s", "stall_s", "copy_s", "step_s", "verify_s", "load_s")) > 0
        if line["mode"] == "disabled":
            assert line["stall_s"] >= line["save_s"] and line["beside"] == 0
            save_s = line["save_s"]
        else:
            assert line["stall_s"] < line["save_s"] and line["beside"] >= 2
            assert line["slowdown"] == pytest.approx(line["beside_s"] / line["step_s"], rel=1e-2)
            assert line["stall_over_sync"] == pytest.approx(line["stall_s"] / save_s, rel=1e-2)


def test_under_torchrun(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ["--model", "tiny", "--saves", "1", "--step", "stand-in", "--folder", str(tmp_path)]
    lines = lines_of(bench(*options, launcher=launcher))
    assert [(line["ranks"], line["mode"]) for line in lines] == [(2, "disabled"), (2, "async")]
    assert os.listdir(tmp_path) == []


def test_mistakes() -> None:
    done = bench("--saves", "0")
    assert done.returncode == 2 and "are 1 or more" in done.stderr


def test_options_of_the_readme_are_there() -> None:
    known = set(re.findall(r"--[a-z]+", bench("--help").stdout))
    assert len(COMMANDS) >= 3
    for command in COMMANDS:
        words = shlex.split(command)
        given = [word for word in words[words.index("scripts/bench/checkpoint.py") :] if word.startswith("--")]
        assert set(given) <= known, command
