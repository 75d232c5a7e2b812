"""A run beside its prediction, from torchrun to the last lines that rank 0 prints."""

import json
import re
from pathlib import Path

import pytest
from frontdoor import torchrun
from plan.test_hardware_file import preflight

pytestmark = pytest.mark.long  # the planner is asked twice, in processes of its own: 15 CPU-seconds


def test_a_run_ends_with_its_prediction(tmp_path: Path) -> None:
    """On two CPU ranks, by a file of preflight; the speed that is measured is that of the run's own metrics."""
    (tmp_path / "preflight.json").write_text(json.dumps(preflight("cpu", "float32", {})))
    keys = "--training.steps 3 --training.local_batch_size 4 --metrics.plan_hardware preflight.json"
    run = torchrun(tmp_path, 2, *keys.split())
    assert run.code == 0, run.everything()
    lines = [line.split("plan: ", 1)[1] for line in run.out[0].splitlines() if "plan: " in line]
    rows = [row for row in run.rows() if row.get("tokens_per_s_per_gpu")]  # another is of the validation
    speeds = [row["tokens_per_s_per_gpu"] for row in rows[1:]]  # the first step warms up
    said = re.fullmatch(r"tokens/s per rank: predicted ([\d,]+), measured ([\d,]+) \([+-]\d+%\)", lines[0])
    assert said and int(said[1].replace(",", "")) > 0, lines
    assert int(said[2].replace(",", "")) == pytest.approx(sum(speeds) / 2, abs=1) and len(speeds) == 2
    most = max(row["max_memory_bytes"] for row in rows) / 2**30
    memory = re.fullmatch(r"peak memory: predicted (\S+) GiB of tensors, measured (\S+) of the process", lines[1])
    assert memory and 0 <= float(memory[1]) < float(memory[2]) == pytest.approx(most, abs=0.01), lines
    assert len(lines) == 2 and "plan: " not in run.out[1]
