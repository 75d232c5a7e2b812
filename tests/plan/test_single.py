"""The layout that a configured run has, as the planner reads it."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from dtron.config import load
from dtron.errors import UserError
from dtron.plan import command, report
from dtron.plan.dryrun import shortened
from dtron.plan.hardware import HARDWARE
from dtron.plan.layout import Layout, Sizes
from dtron.plan.memory import closed_form_peak
from dtron.plan.search import layout_keys, search, with_keys
from dtron.plan.single import describe_run, layout_of
from dtron.plan.timemodel import predict
from dtron.train.resolve import resolve

DEBUG = str(Path(__file__).resolve().parents[2] / "configs/debug.toml")
BF16 = ["--training.mixed_precision_param", "bfloat16"]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_replicate=2, dp_shard=2, tp=2, microbatch=2, microbatches=3, recompute="op", reshard=False),
        Layout(dp_shard=2, cp=2, recompute="full"),
        Layout(dp_shard=2, recompute="budget", memory_budget=0.5, compiled=True),
        Layout(pp=2, dp_shard=2, microbatch=2, microbatches=4, virtual=2, recompute="second", reshard=False),
    ],
)
def test_a_layout_is_read_from_its_own_keys(layout: Layout) -> None:
    compiled = ["--compile.enable"] if layout.recompute == "budget" else []
    config = with_keys(load(["--job.config_file", DEBUG, "--model.n_layers", "4", *BF16, *compiled]), layout)
    assert layout_of(resolve(config, layout.gpus, "cuda")) == layout


def test_a_step_of_several_passes_of_a_pipeline_takes_as_often_as_long() -> None:
    one = Layout(pp=2, microbatch=1, microbatches=4, recompute="none", reshard=False)
    config = with_keys(load(["--job.config_file", DEBUG]), one)
    setup = resolve(config, 2, "cuda")
    training = dataclasses.replace(config.training, global_batch_size=12)
    three = resolve(dataclasses.replace(config, training=training), 2, "cuda")
    assert layout_of(three) == one
    steps = [float(describe_run(each, "h100")[1].split()[1]) for each in (setup, three)]
    assert steps[1] == pytest.approx(3 * steps[0], rel=0.01)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("--model.converters float8", "h100 or newer"),
        ("--training.enable_cpu_offload", "does not know training.enable_cpu_offload"),
        ("--activation_checkpoint.mode memory_budget --compile.enable false", "the compiler chooses"),
    ],
)
def test_what_the_planner_does_not_know_is_refused_at_once(keys: str, said: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = parser.parse_args([DEBUG, "--gpus", "2", "--exact", "0", "--hardware", "a100"])
    with pytest.raises(UserError, match=said):
        report.main(given, [*BF16, *keys.split()])


def test_a_memory_budget_is_searched_where_blocks_are_compiled() -> None:
    """Where it is asked for, with tensor parallel as well; it keeps more than full recomputation, and costs less."""
    given = {"training.global_batch_size": 8, "activation_checkpoint.memory_budget": 0.75}
    seen = {}
    for words in (
        "--compile.enable",
        "--compile.enable false",
        "--compile.enable --activation_checkpoint.mode memory_budget",
    ):
        config = load(["--job.config_file", DEBUG, *BF16, *words.split()])
        setup, mode = resolve(config, 1, "cuda"), config.activation_checkpoint.mode
        fixed = given | ({"activation_checkpoint.mode": mode} if mode == "memory_budget" else {})
        found = search(config, setup, 8, HARDWARE["h100"], fixed, 8, 0, 10**6).candidates
        seen[words] = {(c.layout.recompute, c.layout.tp) for c in found if c.layout.recompute == "budget"}
        keys = [layout_keys(c.layout) for c in found if c.layout.recompute == "budget"]
        assert {k["activation_checkpoint.memory_budget"] for k in keys} <= {0.75}
        assert {k["activation_checkpoint.mode"] for k in keys} <= {"memory_budget"}
    assert list(seen.values()) == [{("budget", 1)}, set(), {("budget", 1), ("budget", 2)}]
    s = Sizes.of(setup.model_config)
    peaks, again = [], []
    for recompute in ("none", "budget", "full"):
        layout = Layout(dp_shard=8, microbatch=8, recompute=recompute, memory_budget=0.75)
        peaks.append(closed_form_peak(s, layout, 2048).activations)
        again.append(predict(s, layout, 2048, HARDWARE["h100"]).recompute_s)
    assert peaks == sorted(peaks, reverse=True) and again == sorted(again) and len({*peaks}) == len({*again}) == 3


def test_a_schedule_in_a_file_is_recorded_with_its_own_number_of_microbatches(tmp_path: Path) -> None:
    """More of them than a dry run takes of a schedule that has a name."""
    n = 12
    rows = [[f"{stage}{kind}{i}" for kind in "FB" for i in range(n)] for stage in range(2)]
    (tmp_path / "gpipe.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    keys = f"--pp 2 --training.local_batch_size {n} --model.n_layers 2"
    csv = f"--parallelism.pipeline_parallel_schedule_csv {tmp_path / 'gpipe.csv'}"
    setup = resolve(load([*BF16, *f"{keys} {csv}".split()]), 2, "cuda")
    assert shortened(setup)[1] == n
    assert "needs" in describe_run(setup, "h100")[0]
