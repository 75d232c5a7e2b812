"""The lines a person reads."""

import io
import math
import re
import statistics
from pathlib import Path

import pytest
import torch

from dtron.models.families import FAMILIES
from dtron.models.flops import attention_flops_per_token, flops_formula, flops_per_token, matmul_parameters
from dtron.models.llama import Llama
from dtron.observe.console import (
    EtaClock,
    format_step,
    format_summary,
    human_bytes,
    human_count,
    human_seconds,
    use_color,
)
from dtron.observe.goodput import PARTS

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "step": 120,
    "loss": 4.83119,
    "grad_norm": 1.2031,
    "lr": 8e-4,
    "tokens": 245760,
    "step_s": 2.0,
    "data_s": 0.002,
    "tokens_per_s": 12345.0,
    "tokens_per_s_per_gpu": 6172.5,
    "mfu": 0.412,
    "max_memory_bytes": 1288490189,
}


def test_a_step_is_one_readable_line() -> None:
    assert format_step(ROW, 400, 133.0, color=False) == (
        "step 120/400  30%  loss 4.8312  norm 1.203  lr 8.0e-04  12.3k tok/s  MFU 41.2%  mem 1.20 GiB  "
        "data 0.1%  left 2m13s"
    )


def test_what_is_not_known_is_left_out_and_validation_is_shown() -> None:
    line = format_step({**ROW, "mfu": None, "validation_loss": 5.0}, 400, None, color=False)
    assert "MFU" not in line and "left" not in line
    assert "loss 4.8312  val 5.0000  norm" in line
    assert format_step({"step": 1}, 400, None, color=False) == "step 1/400  0%"


def test_colours_change_nothing_but_colour_and_mark_a_nan() -> None:
    row = {**ROW, "loss": math.nan}
    plain, painted = (format_step(row, 400, 9.0, color=color) for color in (False, True))
    assert "\033" not in plain and "loss nan" in plain
    assert "\033[1;31mloss nan\033[0m" in painted
    for code in ("1", "1;31", "36", "0"):
        painted = painted.replace(f"\033[{code}m", "")
    assert painted == plain


def test_colours_need_a_terminal_and_leave() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert use_color(Terminal(), disabled=False)
    assert not use_color(Terminal(), disabled=True)
    assert not use_color(io.StringIO(), disabled=False)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (5 * 2**20, "5.00 MiB"),
        (60 * 2**30, "60.00 GiB"),
        (2**41, "2.00 TiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999.4, "999"),
        (999.6, "1.0k"),
        (12345, "12.3k"),
        (999_949, "999.9k"),
        (999_951, "1.0M"),
        (8.03e9, "8.0B"),
        (15e12, "15.0T"),
    ],
)
def test_human_count(count: float, text: str) -> None:
    assert human_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.5, "0.5s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (133, "2m13s"),
        (3599.6, "1h00m"),
        (3720, "1h02m"),
        (187200, "2d04h"),
    ],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_the_time_left_ignores_one_slow_step_and_forgets_old_ones() -> None:
    clock = EtaClock(total_steps=100, window=5)
    assert clock.seconds_left(0) is None
    for step_s in (60.0, 1.0, 1.1, 0.9):
        clock.tick(step_s)
    assert clock.seconds_left(4) == pytest.approx(statistics.median([60.0, 1.0, 1.1, 0.9]) * 96)
    for step_s in [1.0] * 20 + [2.0] * 5:
        clock.tick(step_s)
    assert clock.seconds_left(90) == pytest.approx(20.0)
    assert clock.seconds_left(100) == 0.0


def test_the_summary_tells_the_run_with_the_formula_of_its_mfu() -> None:
    flops, peak = 57.9e9, 989.5e12
    mfu = [speed * flops / peak for speed in (500.0, 6000.0, 7000.0, 8000.0)]
    rows = [
        {
            **ROW,
            "step": step,
            "tokens_per_s": 2 * speed,
            "tokens_per_s_per_gpu": speed,
            "mfu": share,
            "max_memory_bytes": memory * 2**30,
        }
        for step, speed, share, memory in zip(
            (1, 10, 20, 30), (500.0, 6000.0, 7000.0, 8000.0), mfu, (1, 3, 2, 2), strict=True
        )
    ]
    rows[2]["validation_loss"] = 5.0
    text = format_summary(
        rows, "outputs/run", "torchrun train.py", unigram_entropy=7.25, flops_per_token=flops, peak_flops=peak
    )
    lines = dict(line.split(None, 1) for line in text.splitlines() if line[0] != " ")
    assert lines["steps"] == "30" and lines["tokens"] == "245.8k" and lines["loss"] == "4.8312"
    assert lines["validation"] == "5.0000 (step 20; unigram entropy 7.2500)"
    assert lines["tokens/s"] == "14.0k", "the first row, with its warm-up, does not count"
    assert lines["MFU"] == "41.0% = 7000 tokens/s/GPU x 5.79e+10 FLOPs per token / 9.895e+14 FLOP/s (dense bf16 peak)"
    assert "6 x matmul parameters + 12 x layers x heads x head size x seq_len" in text
    assert lines["peak"] == "memory   3.00 GiB"
    assert lines["outputs"] == "outputs/run" and lines["resume"] == "with   torchrun train.py"


def test_the_formula_of_mfu_is_what_the_code_computes() -> None:
    """Of Qwen3, whose heads together are wider than its hidden size."""
    config = FAMILIES["qwen3"]["0.6B"]
    with torch.device("meta"):
        model = Llama(config)
    row = {**ROW, "step": 1, "mfu": 0.4, "tokens_per_s_per_gpu": 1.0}
    (text,) = re.findall(r"token = (.*)", format_summary([row], "out", "cmd", flops_per_token=1.0, peak_flops=1.0))
    sizes = {
        "matmul parameters": matmul_parameters(model), "layers": config.n_layers, "head size": config.head_size,
        "heads": config.n_heads, "dim": config.dim, "seq_len": 4096,
    }  # fmt: skip
    for name, size in sizes.items():
        text = text.replace(name, str(size))
    assert eval(text.replace(" x ", " * ")) == flops_per_token(
        model, [attention_flops_per_token(config, 4096)] * config.n_layers
    )
    assert flops_formula() in (ROOT / "docs" / "dashboard.md").read_text()


def account(unix_s: float, **spent: float) -> dict[str, float]:
    parts = {f"spent_s/{part}": float(spent.get(part, 0.0)) for part in PARTS}
    return {"goodput": spent.get("steps", 0.0) / max(1.0, sum(parts.values())), **parts, "unix_s": unix_s}


def test_the_summary_says_where_the_wall_time_went() -> None:
    spent = {"steps": 931, "data": 3, "startup": 21, "checkpoint": 10, "replayed": 30, "other": 4.6, "validation": 0.4}
    newest = {**ROW, "step": 7, **account(200.0, **{part: 8 * s for part, s in spent.items()})}
    older = {**ROW, "step": 9, **account(100.0, steps=1)}  # of an attempt before, which got on further
    text = format_summary([newest, older, {**ROW, "step": 11}], "out", "cmd")
    (line,) = [line for line in text.splitlines() if line.startswith("goodput")]
    assert line == (
        "goodput       93.1% of 2h13m: data 0.3%, start-up 2.1%, checkpoints 1.0%, replayed 3.0%, other 0.5%"
    )
    assert "goodput       100.0% of 10s\n" in format_summary([{**ROW, **account(1.0, steps=10)}], "out", "cmd")
    assert "goodput       0.0% of 0.0s\n" in format_summary([{**ROW, **account(1.0)}], "out", "cmd")
    assert "goodput" not in format_summary([ROW], "out", "cmd")


def test_the_summary_of_a_cpu_run_and_of_no_run_claim_nothing() -> None:
    text = format_summary([{**ROW, "mfu": None, "loss": None}], "outputs/run", "cmd")
    assert "MFU" not in text and "validation" not in text
    assert "not finite" in text and "12.3k" in text, "a single row is all there is"
    assert format_summary([], "outputs/run", "cmd").splitlines() == [
        "steps         none was logged",
        "outputs       outputs/run",
        "resume with   cmd",
    ]


def test_the_summary_is_of_the_newest_attempt_whatever_its_clock_says() -> None:
    old = {**ROW, "step": 3, "attempt": 1, **account(0.2, steps=2), "unix_s": 1.8e9 + 2 * 86400}
    new = {**ROW, "step": 9, "attempt": 2, **account(0.9, steps=90), "unix_s": 1.8e9}
    assert "goodput       100.0% of 1m30s\n" in format_summary([old, new], "out", "cmd")


def test_the_loss_is_of_the_last_step_that_has_one() -> None:
    rows = [{**ROW, "step": 7, "loss": 2.5}, {"step": 9, "validation_loss": 3.0}]
    assert "loss          2.5000 (step 7)\n" in format_summary(rows, "out", "cmd")
    assert "loss          none was logged\n" in format_summary(rows[1:], "out", "cmd")
