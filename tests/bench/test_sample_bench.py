"""scripts/bench/sample.py, run on a model of seconds."""

import json
import sys
from pathlib import Path

import warm

ROOT = Path(__file__).resolve().parents[2]


def test_both_write_the_same_tokens() -> None:
    few = ["--flavor", "debugmodel", "--prompt", "16", "--new", "8", "--rounds", "1"]
    command = [sys.executable, "scripts/bench/sample.py", *few]
    done = warm.run(command, ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["same_tokens"] and min(result["tokens_per_s"].values()) > 0
    rates = result["tokens_per_s"]
    assert abs(result["dtron_over_transformers"] - rates["dtron"] / rates["transformers"]) < 1e-9  # of one round
