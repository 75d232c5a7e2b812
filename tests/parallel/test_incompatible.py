"""Every rule of the table of incompatible features refuses its pair, and nothing else."""

import re
from pathlib import Path

import pytest

from dtron.config import load
from dtron.errors import UserError
from dtron.parallel.incompatible import FEATURES, RULES, Rule, as_markdown, check_compatible

ROOT = Path(__file__).resolve().parents[2]

# Arguments that turn a feature on, without what it needs from others. What nothing is said about is off.
ON = {
    "pipeline parallel": "--pp 2",
    "zero-bubble schedule": "--pp 2 --parallelism.pipeline_parallel_schedule InterleavedZeroBubble",
    "compiled blocks": "--compile.enable",
    "eager blocks": "--compile.no_enable",
    "recompute by operation": "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op",
    "memory budget": "--activation_checkpoint.mode memory_budget",
    "reshard always": "--parallelism.fsdp_reshard_after_forward always",
    "reduce at the last microbatch": "--parallelism.gradient_reduce last_microbatch",
    "async tensor parallel": "--parallelism.enable_async_tensor_parallel",
    "no tensor parallel": "--tp 1",
    "tensor parallel": "--tp 2",
    "float8 all-gather": "--model.converters float8 --quantize.linear.float8.enable_fsdp_float8_all_gather",
    "CPU offload": "--training.enable_cpu_offload",
    "Muon": "--optimizer.name Muon",
    "ring attention": "--cp 2",
    "fp32 compute on CUDA": "--training.device cuda --training.mixed_precision_param float32",
    "loss in Triton": "--training.loss_kernel triton",
    "device cpu": "--training.device cpu",
}
# Neither feature of a rule is on here but by its arguments: so these switch off what would be on by default.
OFF = {
    "eager blocks": "--compile.enable",
    "no tensor parallel": "--tp 2",
    "device cpu": "--training.device cuda",
}


def features(arguments: str) -> set[str]:
    config = load(arguments.split() or ["--training.device", "cuda"])
    return {name for name, is_on in FEATURES.items() if is_on(config)}


def arguments_of(rule: Rule, *on: str) -> str:
    """A configuration with the features `on` of a rule's two, and with everything else that is refused switched off."""
    wanted = [ON[name] for name in on]
    clear = [text for name, text in OFF.items() if name not in on]
    if "compiled blocks" not in on and "zero-bubble schedule" in on:
        clear.remove(OFF["eager blocks"])
    if "float8 all-gather" in on:
        clear.remove(OFF["no tensor parallel"])
    return " ".join([*clear, *wanted])


def test_every_feature_can_be_on_and_off() -> None:
    assert set(ON) == set(FEATURES)
    for name, arguments in ON.items():
        assert name in features(arguments), name
        assert name not in features(OFF.get(name, "")), name


def test_every_feature_is_in_a_rule() -> None:
    assert {name for rule in RULES for name in (rule.first, rule.second)} == set(FEATURES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.first} with {rule.second}")
def test_rule(rule: Rule) -> None:
    """Both features are refused with the reason and the way out; each alone is not."""
    with pytest.raises(UserError) as refused:
        check_compatible(load(arguments_of(rule, rule.first, rule.second).split()))
    assert str(refused.value) == f"{rule.first} and {rule.second} are incompatible: {rule.because}; {rule.instead}"
    for alone, other in ((rule.first, rule.second), (rule.second, rule.first)):
        arguments = arguments_of(rule, alone)
        assert alone in features(arguments) and other not in features(arguments), alone
        check_compatible(load(arguments.split()))


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_zero_bubble_schedules(schedule: str) -> None:
    """By name, and only where there is a pipeline."""
    chosen = f"--parallelism.pipeline_parallel_schedule {schedule}"
    assert "zero-bubble schedule" in features(f"--pp 2 {chosen}")
    assert "zero-bubble schedule" not in features(chosen)


def test_zero_bubble_schedule_in_a_file(tmp_path: Path) -> None:
    """A CSV schedule that splits its backward is one, whatever the name beside it."""
    split, whole = tmp_path / "split.csv", tmp_path / "whole.csv"
    split.write_text("0F0,0I0,0W0\n1F0,1I0,1W0\n")
    whole.write_text("0F0,0B0\n1F0,1B0\n")
    key = "--pp 2 --parallelism.pipeline_parallel_schedule DualPipeV --parallelism.pipeline_parallel_schedule_csv"
    assert "zero-bubble schedule" in features(f"{key} {split}")
    assert "zero-bubble schedule" not in features(f"{key} {whole}")
    assert "zero-bubble schedule" not in features(f"{key} {tmp_path / 'missing.csv'}")


def test_compiled_loss_alone_composes() -> None:
    check_compatible(load(f"{ON['zero-bubble schedule']} --compile.enable --compile.components loss".split()))


def test_table_as_shown() -> None:
    """Each rule is a row; the test it names is there and tests the table."""
    rows = as_markdown().splitlines()[2:]
    assert len(rows) == len(RULES)
    for rule, row in zip(RULES, rows, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:4] == [rule.first, rule.second, rule.because, rule.instead]
        assert re.search("import .*RULES", (ROOT / rule.test).read_text())
