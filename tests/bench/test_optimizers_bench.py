"""scripts/bench/optimizers.py on a model of a second."""

import importlib.util
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "optimizers.py"


def test_every_optimizer_has_its_seconds_and_bytes() -> None:
    spec = importlib.util.spec_from_file_location("bench_optimizers", PATH)
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    tiny = ["--training.device", "cpu", "--model.dim", "32", "--model.n_layers", "1", "--model.vocab_size", "512"]
    rows = bench.measure(tiny, 1, False)["optimizers"]
    assert [row["state_bytes_per_parameter"] for row in rows.values()][:2] == [8, 4]
    assert 4 < rows["Muon"]["state_bytes_per_parameter"] < 8
    assert all(row["cpu_s"] > 0 and row["cpu_over_adamw"] > 0 for row in rows.values())
