"""scripts/bench/loss.py at toy size."""

import json
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long  # two compilations by inductor
def test_every_way_is_measured_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "loss.json"
    bench = [sys.executable, str(ROOT / "scripts/bench/loss.py"), "--toy", "--chunks", "2048", "--vocab", "32000"]
    done = warm.run([*bench, "--out", str(out)], ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text()) and result["toy"]
    assert {*result["figures"]} >= {"whole", "whole compiled", "chunks of 64", "chunks of 64 compiled"}
    for row in result["figures"].values():
        assert row["ms"] > 0 and row["error_loss"] < 1e-4 and max(row["error_hidden"], row["error_weight"]) < 5e-3
