"""scripts/bench/step.py, run as its README says, on a tiny configuration."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from dtron import compat
from dtron.config import load
from dtron.errors import UserError
from dtron.train.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "scripts" / "bench" / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines() if re.search(r"bench/\w+\.py .*config_file configs/", line)]
BENCH_OPTIONS = ("rounds", "steps", "warmup", "out", "only", "profile", "routers", "experts")
SHORT = ["--bench.rounds", "2", "--bench.steps", "1", "--bench.warmup", "1"]
TINY = ["--job.config_file", "configs/debug.toml", "--training.device", "cpu", "--training.seq_len", "32"]


def bench(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, *launcher, "scripts/bench/step.py", *arguments]
    return warm.run(command, ROOT, env)


def test_one_rank_beside_the_plain_loop(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    batch = ["--training.local_batch_size", "2", "--training.global_batch_size", "4", "--compile.enable"]
    done = bench(*SHORT, "--bench.out", str(out), *TINY, *batch, "--compile.backend", "aot_eager")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # nothing else is on stdout
    assert result == json.loads(out.read_text())
    for name in ("dtron", "plain"):
        figures = result[name]
        assert len(figures["step_s"]) == 2 and figures["error"] is None and figures["mfu"] is None
        step_s = sum(figures["step_s"]) / 2  # the median of two
        assert figures["tokens_per_s"] == pytest.approx(4 * 32 / step_s)
        assert 50e6 < figures["max_memory_bytes"] < 4e9
    # The same weights, the same tokens, the same loss: the two do the same work.
    assert result["dtron"]["first_loss"] == pytest.approx(result["plain"]["first_loss"], rel=1e-5)
    ratios = [plain / ours for plain, ours in zip(result["plain"]["step_s"], result["dtron"]["step_s"], strict=True)]
    assert result["speed_over_plain"] == pytest.approx(sum(ratios) / 2)
    cpu = [
        ours / plain for plain, ours in zip(result["plain"]["step_cpu_s"], result["dtron"]["step_cpu_s"], strict=True)
    ]
    assert result["cpu_over_plain"] == pytest.approx(sum(cpu) / 2)
    speed = result["dtron"]["tokens_per_s"] * result["flops_per_token"]
    assert result["dtron"]["share_of_matmul_rate"] == pytest.approx(speed / result["matmul_flops_per_s"])
    assert result["ranks"] == 1 and result["sequences_per_step"] == 4 and result["torch"] and "CPU" in result["device"]


def test_two_ranks_beside_a_plain_loop_of_the_same_batch() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    keys = "--dp", "2", "--training.global_batch_size", "4", "--bench.profile"
    done = bench(*SHORT, *TINY, *keys, launcher=launcher)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["ranks"], result["layout"]) == (2, "dp_shard 2")
    assert len(result["dtron"]["step_s"]) == len(result["plain"]["step_s"]) == 2
    assert result["dtron"]["first_loss"] == pytest.approx(result["plain"]["first_loss"], rel=1e-5)
    assert result["cpu_over_plain"] > 0.5  # of both ranks together
    watched, alone = (result[name]["watched"] for name in ("dtron", "plain"))
    assert watched["threads_ms"]["messages"] > alone["threads_ms"]["messages"]
    assert sum(watched["kinds_ms"].values()) == pytest.approx(watched["threads_ms"]["computing"])
    assert watched["kinds_ms"]["matmul"] > 0 and watched["kinds_ms"]["copies"] > alone["kinds_ms"].get("copies", 0)
    assert result["dtron"]["tokens_per_s_per_gpu"] == result["dtron"]["tokens_per_s"] / 2


def test_one_of_the_two_alone() -> None:
    result = json.loads(bench(*SHORT, "--bench.only", "plain", *TINY).stdout)
    assert result["dtron"] is None and result["speed_over_plain"] is None and len(result["plain"]["step_s"]) == 2


def test_mistakes_are_told_in_one_line() -> None:
    done = bench(*TINY, "--model.dimm", "3")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and '"model.dimm"' in line
    done = bench("--bench.steps", "0", *TINY)
    assert done.returncode == 2 and "are 1 or more" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_are_legal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    ranks = int(words[words.index("--nproc-per-node") + 1]) if "torchrun" in words else 1
    newer = "qwen3-30b" in command and ranks > 1 and not compat.has_units_of_two_meshes  # compiled, with ep
    with pytest.raises(UserError, match=r"needs torch 2\.13") if newer else contextlib.nullcontext():
        resolve(load(words[words.index("--job.config_file") :]), ranks)
    options = [word for word in words[: words.index("--job.config_file")] if word.startswith("--bench.")]
    assert set(options) <= {
        f"--bench.{name}" for name in ("rounds", "steps", "warmup", "out", "only", "profile", "routers", "experts")
    }


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 5
