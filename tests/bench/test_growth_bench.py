"""scripts/bench/growth.py: its points are legal, its line is the right one, and it runs."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dtron.config import load
from dtron.train.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("toy", [False, True])
def test_every_point_is_legal(toy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    import growth  # type: ignore[import-not-found]

    options = argparse.Namespace(toy=toy, rounds=1, steps=1)
    for axis, values in (growth.TOY if toy else growth.AXES).items():
        for value in values:
            words = growth.command(axis, value, options)
            setup = resolve(load(words[words.index("--model.dim") :]), value if axis == "ranks" else 1)
            assert axis != "ranks" or setup.degrees.world == value
    at_zero, per_unit = growth.slope([{"ranks": 1, "cpu_s": 3.0}, {"ranks": 3, "cpu_s": 7.0}], "ranks")
    assert (at_zero, per_unit) == (pytest.approx(1.0), pytest.approx(2.0))


@pytest.mark.long
def test_all_axes_at_toy_size(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/bench/growth.py"), "--toy", "--steps", "1", "--rounds", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "growth.json").read_text())
    assert set(found) == {"ranks", "seq_len", "layers", "microbatches"} and (tmp_path / "growth.png").stat().st_size
    assert found["ranks"][1]["cpu_over_plain"] > 1 and all(len(rows) == 2 for rows in found.values())
