"""scripts/bench/gpu.py at toy size: every command is legal, one case in the short tests, all in the long."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtron.config import load
from dtron.parallel.incompatible import check_compatible
from dtron.train.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "gpu.py"


def gpu(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, cwd=ROOT)


def run_toy(folder: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    done = gpu("--toy", "--out", str(folder), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text()), done.stdout


def test_every_case_is_a_configuration_of_one_gpu() -> None:
    pytest.importorskip("torchao")
    lines = gpu("--list").stdout.splitlines()
    steps = [shlex.split(line.split("): ", 1)[1]) for line in lines if "step.py" in line]
    assert len(steps) >= 12
    for words in steps:
        at = words.index("--training.device")
        words = [word if word != "triton" else "torch" for word in words]  # which a CPU's torch does not bring
        setup = resolve(load(words[at:]), 1, "cuda")
        check_compatible(setup.config)
    names = [line.split(" (")[0] for line in lines]
    assert names[0] == "constants" and len(set(names)) == len(names)


def test_a_case_gives_a_row(tmp_path: Path) -> None:
    rows, said = run_toy(tmp_path / "out", "--only", "1.7B eager", "--seconds", "250")
    (row,) = rows
    assert row["result"]["dtron"]["tokens_per_s"] > 0 and row["result"]["device"].startswith("CPU")
    assert "1.7B eager: " in said and "first loss 6.2" in said
    again = gpu("--toy", "--out", str(tmp_path / "out"), "--only", "1.7B eager")
    assert again.returncode == 2 and "is not empty" in again.stderr  # no result is overwritten


def test_what_has_no_time_left_is_left_out_and_no_case_is_a_mistake(tmp_path: Path) -> None:
    done = gpu("--toy", "--out", str(tmp_path / "out"), "--seconds", "1")
    assert done.returncode == 0 and done.stdout.count("left out") == len(gpu("--list").stdout.splitlines())
    assert "there are: constants" in gpu("--only", "no such").stderr
    assert "--toy" in gpu("--out", str(tmp_path / "other")).stderr


@pytest.mark.long
def test_all_cases(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    rows, _ = run_toy(tmp_path / "out", "--seconds", "3000")
    assert [row["case"] for row in rows if "error" in row] == []
    losses = {row["result"]["dtron"]["first_loss"] for row in rows if row.get("result", {}).get("dtron")}
    assert max(losses) - min(losses) < 0.02 * min(losses)
