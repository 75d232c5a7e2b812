"""scripts/bench/moe.py, run on a model of seconds."""

import json
import subprocess
import sys
from pathlib import Path

import warm

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--job.config_file", "configs/debug.toml", "--training.device", "cpu", "--training.seq_len", "32"]
SHORT = ["--bench.rounds", "1", "--bench.steps", "1", "--bench.warmup", "1"]


def bench(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return warm.run([sys.executable, *launcher, "scripts/bench/moe.py", *SHORT, *arguments], ROOT)


def test_routers_and_numbers_of_experts_on_two_ranks() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    variants = ["--bench.routers", "softmax,sigmoid", "--bench.experts", "2,4"]
    done = bench(*variants, *TINY, "--model.name", "mixtral", "--ep", "2", launcher=launcher)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ranks"] == 2 and "ep 2" in result["layout"]
    assert [(row["router"], row["experts"]) for row in result["training"]] == [
        ("softmax", 2), ("softmax", 4), ("sigmoid", 2), ("sigmoid", 4)
    ]  # fmt: skip
    few, many = result["training"][:2]
    for row in result["training"]:
        assert 0 < row["dispatch_share"] < 1 and row["tokens_per_s"] > 0 and row["mfu"] is None
    dim, size = result["dim"], result["expert_dim"]
    layers, rest = divmod(many["parameters"] - few["parameters"], 2 * (3 * dim * size + dim))
    assert rest == 0 and many["active_parameters"] - few["active_parameters"] == layers * 2 * dim  # the router's rows
    tokens = result["products"][0]["rows"] // 2
    for row, number in zip(result["products"], (2, 4), strict=True):
        assert row["experts"] == number and row["rows"] == 2 * tokens and row["loop_over_grouped"] > 0
        assert abs(row["loop_over_grouped"] - row["loop_s"] / row["grouped_s"]) < 1e-9  # of one round


def test_mistakes_are_told_in_one_line() -> None:
    for arguments, message in (
        ([], "no experts"),
        (["--model.name", "mixtral", "--bench.routers", "tanh"], "expected softmax, sigmoid"),
        (["--model.name", "mixtral", "--bench.experts", "8,many"], "numbers of experts"),
    ):
        done = bench(*TINY, *arguments)
        assert done.returncode == 1 and done.stdout == ""
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ") and message in line


def test_loop_and_grouped_product_agree() -> None:
    import torch

    from dtron.models.moe import swiglu_of_experts

    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    try:
        import moe  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 5])
    inputs = (torch.randn(8, 16), counts, torch.randn(3, 8, 16), torch.randn(3, 8, 16), torch.randn(3, 16, 8))
    torch.testing.assert_close(moe.loop_of_experts(*inputs), swiglu_of_experts(*inputs))
