"""A key that is set and that nothing reads is told at start, in one line."""

import fnmatch
from pathlib import Path

import pytest

from dtron.config import Config, read, to_toml
from dtron.config.keys import KEYS
from dtron.config.unread import RULES, Rule

# What makes each rule hold, and what makes it fail, by what it needs.
STATES = {
    "validation.only = false": ("", "--validation.only"),
    "checkpoint.enable = true": ("--checkpoint.enable", ""),
    "checkpoint.load_only = false": ("--checkpoint.enable", "--checkpoint.enable --checkpoint.load_only"),
    "checkpoint.last_save_in_hf = true": ("--checkpoint.last_save_in_hf", ""),
    "checkpoint.keep_latest_k above 0, which keeps all": (
        "--checkpoint.enable",
        "--checkpoint.enable --checkpoint.keep_latest_k 0",
    ),
    "checkpoint.initial_load_path": ("--checkpoint.initial_load_path x", ""),
    "checkpoint.initial_load_in_hf = true": ("--checkpoint.initial_load_in_hf", ""),
    "validation.enable = true": ("--validation.enable", ""),
    "training.loss_chunk_tokens above 0": ("", "--training.loss_chunk_tokens 0"),
    "training.loss = cross_entropy": ("", "--training.loss mine"),
    "model.rope_scaling.rope_type": ("--model.rope_scaling.rope_type yarn", ""),
    "model.hf_config_path left out, which replaces it": ("", "--model.hf_config_path x"),
    "an optimizer.name other than SGD": ("", "--optimizer.name SGD"),
    "optimizer.name = Muon": ("--optimizer.name Muon", ""),
    "optimizer.weight_decay above 0": ("", "--optimizer.weight_decay 0"),
    "lr_scheduler.decay_ratio above 0": ("", "--lr_scheduler.decay_ratio 0"),
    "training.spike_factor above 0": ("--training.spike_factor 3", ""),
    "profiling.enable_profiling = true": ("--profiling.enable_profiling", ""),
    "profiling.enable_memory_snapshot = true": ("--profiling.enable_memory_snapshot", ""),
    "profiling.enable_profiling or profiling.enable_memory_snapshot = true": ("--profiling.enable_memory_snapshot", ""),
    "metrics.enable_tensorboard = true": ("", "--metrics.no_enable_tensorboard"),
    "compile.enable = true": ("--compile.enable", ""),
    "activation_checkpoint.mode = selective": ("", "--activation_checkpoint.mode full"),
    "activation_checkpoint.mode = selective or full": ("", "--activation_checkpoint.mode none"),
    "parallelism.pipeline_parallel_degree above 1": ("--pp 2", ""),
    "parallelism.pipeline_parallel_schedule_csv left out": (
        "--pp 2",
        "--pp 2 --parallelism.pipeline_parallel_schedule_csv x",
    ),
    "parallelism.module_fqns_per_model_part left out": (
        "--pp 2",
        '--pp 2 --parallelism.module_fqns_per_model_part [["a"],["b"]]',
    ),
    "parallelism.context_parallel_degree above 1": ("--cp 2", ""),
    "training.attention_mask = causal": ("--cp 2", "--cp 2 --training.attention_mask document"),
    "parallelism.tensor_parallel_degree above 1": ("--tp 2", ""),
    "comm.trace_buf_size above 0": ("", "--comm.trace_buf_size 0"),
    "activation_checkpoint.mode = memory_budget": ("--activation_checkpoint.mode memory_budget", ""),
    "model.converters naming float8": ("--model.converters float8", ""),
    "quantize.linear.float8.enable_fsdp_float8_all_gather = true": (
        "--model.converters float8 --quantize.linear.float8.enable_fsdp_float8_all_gather",
        "--model.converters float8",
    ),
}
NEVER = {  # of features that are refused where they are turned on
    "a model that draws random numbers, which always are repeated",
}


def notes(*argv: str) -> str:
    return "\n".join(read([*argv, "--debug.seed", "0"]).notes)


def names_of(rule: Rule) -> list[str]:
    return [name for name in KEYS if any(fnmatch.fnmatchcase(name, pattern) for pattern in rule.keys)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.keys[0]} {rule.needs}")
def test_every_rule_tells_its_keys_where_it_is_not_met_and_only_there(rule: Rule) -> None:
    assert all(any(fnmatch.fnmatchcase(name, pattern) for name in KEYS) for pattern in rule.keys), "a key that is gone"
    assert not rule.switch or rule.switch in KEYS
    if rule.needs in NEVER:
        return
    met, failed = STATES[rule.needs]
    for name in names_of(rule):
        if name == rule.switch or (rule.needs == "validation.only = false" and name == "validation.freq"):
            continue
        default = KEYS[name].default
        given = f"--{name}={'' if default is None else str(default).lower() if default in (True, False) else default}"
        if KEYS[name].is_list_of_words:
            given = f"--{name}=" + ",".join(default)
        assert f"only read with {rule.needs}" in notes(*failed.split(), given), name
        assert f"only read with {rule.needs}" not in notes(*met.split(), given), name


def test_the_line_names_the_keys_and_what_would_read_them() -> None:
    assert notes("--checkpoint.load_step", "2") == (
        "checkpoint.load_step has no effect: only read with checkpoint.enable = true"
    )
    assert notes("--optimizer.name", "SGD", "--optimizer.eps", "1e-6", "--optimizer.beta2", "0.9") == (
        "optimizer.eps and beta2 have no effect: only read with an optimizer.name other than SGD"
    )


def test_what_is_turned_off_on_top_of_its_keys_is_meant_so(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text("[validation]\nenable = true\nfreq = 7\n")
    (tmp_path / "x.toml").write_text("base = 'b.toml'\n[validation]\nenable = false\n")
    for argv in (("x.toml",), ("b.toml", "--validation.no_enable")):
        assert notes("--job.config_file", str(tmp_path / argv[0]), *argv[1:]) == ""
    assert "validation.freq" in notes("--job.config_file", str(tmp_path / "x.toml"), "--validation.freq", "9")
    (tmp_path / "b.toml").write_text("[validation]\nenable = false\nfreq = 7\nsteps = -1\n")  # -1: the default
    assert notes("--job.config_file", str(tmp_path / "b.toml")) == (
        "validation.freq has no effect: only read with validation.enable = true"
    )
    (tmp_path / "b.toml").write_text("[validation]\nsteps = -1\n")
    assert "validation.steps" in notes("--job.config_file", str(tmp_path / "b.toml"))


def test_a_record_of_a_run_is_not_told_of_again(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(to_toml(Config()))
    assert notes("--job.config_file", str(tmp_path / "config.toml")) == ""
    assert "checkpoint.load_step" in notes(
        "--job.config_file", str(tmp_path / "config.toml"), "--checkpoint.load_step", "2"
    )


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ("--training.steps 5", "2.5%"),
        ("--training.steps 200", ""),
        ("--training.steps 5 --lr_scheduler.total_steps 500", ""),
    ],
)
def test_a_warm_up_longer_than_the_run_is_told(given: str, share: str) -> None:
    text = notes(*given.split())
    assert text == "" if not share else f"only rises, to {share} of optimizer.lr" in text


def test_the_kind_of_initial_weights_belongs_to_the_path_beside_it(tmp_path: Path) -> None:
    """So the config.toml of a run that began with Hugging Face weights evaluates its checkpoints."""
    (tmp_path / "x.toml").write_text("[checkpoint]\ninitial_load_in_hf = true\ninitial_load_path = 'SmolLM'\n")
    argv = ["--job.config_file", str(tmp_path / "x.toml")]
    assert read(argv).config.checkpoint.initial_load_in_hf
    assert not read([*argv, "--checkpoint.initial_load_path", "run/step-4"]).config.checkpoint.initial_load_in_hf
    both = ["--checkpoint.initial_load_path", "Qwen", "--checkpoint.initial_load_in_hf"]
    assert read([*argv, *both]).config.checkpoint.initial_load_in_hf
