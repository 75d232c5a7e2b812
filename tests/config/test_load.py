"""What the loader reads, what it refuses, and what its refusals say."""

import functools
import random
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from dtron.config import Config, HelpRequested, flatten, help_text, load, replace, to_toml
from dtron.config.keys import KEYS, SECTIONS, checked
from dtron.config.sections import Source
from dtron.config.toml import tomllib
from dtron.config.unread import unmet
from dtron.errors import UserError

# The names of the last torchtitan release configured by TOML: its users' files carry them.
TORCHTITAN_KEYS = {
    "job": "config_file dump_folder description print_config save_config_file",
    "profiling": "enable_profiling save_traces_folder profile_freq profiler_active profiler_warmup "
    "enable_memory_snapshot save_memory_snapshot_folder",
    "metrics": "log_freq enable_tensorboard disable_color_printing save_tb_folder save_for_all_ranks enable_wandb",
    "model": "name flavor hf_assets_path converters",
    "optimizer": "name lr beta1 beta2 eps weight_decay implementation early_step_in_backward",
    "lr_scheduler": "warmup_steps total_steps decay_ratio decay_type min_lr_factor",
    "training": "dataset dataset_path local_batch_size global_batch_size seq_len max_norm steps enable_cpu_offload "
    "dtype mixed_precision_param mixed_precision_reduce gc_freq",
    "training.dataloader": "num_workers persistent_workers pin_memory prefetch_factor",
    "parallelism": "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward "
    "tensor_parallel_degree disable_loss_parallel enable_async_tensor_parallel pipeline_parallel_degree "
    "module_fqns_per_model_part pipeline_parallel_first_stage_less_layers "
    "pipeline_parallel_last_stage_less_layers pipeline_parallel_layers_per_stage pipeline_parallel_schedule "
    "pipeline_parallel_schedule_csv pipeline_parallel_microbatch_size context_parallel_degree "
    "context_parallel_load_balancer context_parallel_rotate_method expert_parallel_degree "
    "expert_tensor_parallel_degree",
    "checkpoint": "enable folder interval initial_load_path initial_load_model_only initial_load_in_hf "
    "initial_load_in_hf_quantized last_save_model_only last_save_in_hf export_dtype async_mode keep_latest_k "
    "load_step exclude_from_loading enable_first_step_checkpoint create_seed_checkpoint load_only",
    "activation_checkpoint": "mode selective_ac_option early_stop memory_budget preserve_rng_state debug",
    "compile": "enable components backend",
    "quantize.linear.float8": "enable_fsdp_float8_all_gather precompute_float8_dynamic_scale_for_fsdp recipe_name "
    "filter_fqns emulate",
    "comm": "init_timeout_seconds train_timeout_seconds trace_buf_size save_traces_folder save_traces_file_prefix mode",
    "validation": "enable dataset dataset_path local_batch_size seq_len freq steps",
    "validation.dataloader": "num_workers persistent_workers pin_memory prefetch_factor",
    "debug": "seed deterministic",
}


def write(folder: Path, text: str, name: str = "x.toml") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def load_text(folder: Path, text: str, *arguments: str) -> Config:
    return load(["--job.config_file", write(folder, text), *arguments])


def refusal(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load(argv)
    return str(caught.value)


def refusal_of_text(folder: Path, text: str, *arguments: str) -> str:
    return refusal(["--job.config_file", write(folder, text), *arguments])


def value(config: Config, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


# ---- the keys ----


@pytest.mark.parametrize("section", TORCHTITAN_KEYS)
def test_every_torchtitan_key_is_known(section: str) -> None:
    assert [leaf for leaf in TORCHTITAN_KEYS[section].split() if f"{section}.{leaf}" not in KEYS] == []


@pytest.mark.parametrize("name", KEYS)
def test_every_key_has_a_legal_default_and_a_meaning(name: str) -> None:
    key = KEYS[name]
    assert key.help or key.unsupported
    kinds = (int, float, bool, str, list[str], list[list[str]], list[Source])
    assert key.kind in kinds or get_origin(key.kind) is Literal or key.is_list_of_words
    assert checked(key, key.default, "default") == key.default
    assert key.kind is not float or not isinstance(key.default, int)


# ---- files ----


def test_file_then_command_line(tmp_path: Path) -> None:
    text = "[training]\nseq_len = 64\nsteps = 7\n[training.dataloader]\nnum_workers = 3\n"
    config = load_text(tmp_path, text, "--training.steps", "9")
    assert (config.training.seq_len, config.training.steps, config.training.dataloader.num_workers) == (64, 9, 3)
    assert config.training.local_batch_size == Config().training.local_batch_size
    assert config.validation.dataloader.num_workers == 0
    assert config.job.config_file == str(tmp_path / "x.toml")


def test_no_argument_at_all_is_refused() -> None:
    message = refusal([])
    assert "--job.config_file" in message and "configs/quickstart.toml" in message


def changes(a: Config, b: Config) -> dict[str, Any]:
    """The values of `b` that are others in `a`."""
    left, right = flatten(a), flatten(b)
    return {name: right[name] for name in KEYS if left[name] != right[name]}


def test_overrides_alone_start_from_the_defaults() -> None:
    assert changes(Config(), load(["--debug.seed", "3"])) == {"debug.seed": 3}


def test_loads_do_not_share_lists() -> None:
    load(["--debug.seed", "1"]).compile.components.append("changed")
    assert load(["--debug.seed", "1"]).compile.components == ["model", "loss"]


def test_base_chain_merges_deeply_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, "[compile]\ncomponents = ['model']\n[training]\nsteps = 1\nseq_len = 16\n", "far/a.toml")
    write(tmp_path, "base = '../far/a.toml'\n[training]\nsteps = 2\nlocal_batch_size = 5\n", "near/b.toml")
    config = load_text(tmp_path, "base = 'near/b.toml'\n[training]\nlocal_batch_size = 6\n")
    training = config.training
    assert (training.steps, training.seq_len, training.local_batch_size) == (2, 16, 6)
    assert config.compile.components == ["model"]


def test_base_cycle_names_the_chain(tmp_path: Path) -> None:
    write(tmp_path, "base = 'c.toml'\n", "b.toml")
    write(tmp_path, "base = './b.toml'\n", "c.toml")
    message = refusal_of_text(tmp_path, "base = 'b.toml'\n")
    assert "circle" in message
    names = ["x.toml", "b.toml", "c.toml", "b.toml"]
    assert " -> ".join(str(tmp_path / name) for name in names) in message


def test_base_of_itself_is_a_cycle(tmp_path: Path) -> None:
    assert "circle" in refusal_of_text(tmp_path, "base = 'x.toml'\n")


def test_base_errors_name_the_right_file(tmp_path: Path) -> None:
    message = refusal_of_text(tmp_path, "base = 'gone.toml'\n")
    assert f"{tmp_path / 'x.toml'}: base" in message and str(tmp_path / "gone.toml") in message
    assert "base = 3" in refusal_of_text(tmp_path, "base = 3\n")
    write(tmp_path, "[training]\nsteps = 'many'\n", "b.toml")
    assert refusal_of_text(tmp_path, "base = 'b.toml'\n").startswith(f"{tmp_path / 'b.toml'}: training.steps")
    assert 'did you mean "base"?' in refusal_of_text(tmp_path, "[job]\nbase = 'b.toml'\n")


def test_missing_file_says_what_is_near(tmp_path: Path) -> None:
    write(tmp_path, "", "quickstart.toml")
    write(tmp_path, "", "other.toml")
    path = str(tmp_path / "quikstart.toml")
    message = refusal(["--job.config_file", path])
    assert path in message and "quickstart.toml" in message
    assert "other.toml" not in message
    assert "quickstart.toml" in refusal(["--job.config_file", str(tmp_path / "zzz")])
    assert "does not exist" in refusal(["--job.config_file", str(tmp_path / "gone" / "x.toml")])
    (tmp_path / "empty").mkdir()
    assert "no TOML file" in refusal(["--job.config_file", str(tmp_path / "empty" / "x.toml")])


def test_folder_non_utf8_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "", "inside.toml")
    message = refusal(["--job.config_file", str(tmp_path)])
    assert "is a folder" in message and "inside.toml" in message
    (tmp_path / "latin.toml").write_bytes(b"[job]\ndescription = 'caf\xe9'\n")
    message = refusal(["--job.config_file", str(tmp_path / "latin.toml")])
    assert "latin.toml" in message and "UTF-8" in message and "byte 24" in message
    assert "cannot read" in refusal(["--job.config_file", str(tmp_path / "inside.toml" / "x.toml")])
    assert "cannot read" in refusal_of_text(tmp_path, 'base = "a\\u0000b"\n')


def test_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    (tmp_path / "w.toml").write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 4\r\n")
    assert load(["--job.config_file", str(tmp_path / "w.toml")]).training.steps == 4
    (tmp_path / "w.toml").write_bytes(b"[training]\r\nsteps 4\r\n")
    assert refusal(["--job.config_file", str(tmp_path / "w.toml")]).splitlines()[1] == "    steps 4"
    assert "\r" not in refusal(["--job.config_file", str(tmp_path / "w.toml")])


def test_syntax_error_shows_line_column_and_text(tmp_path: Path) -> None:
    message = refusal_of_text(tmp_path, "[training]\nsteps = 3\nseq_len 128\n")
    assert f"{tmp_path / 'x.toml'}: line 3, column 9: not valid TOML" in message
    assert message.splitlines()[1:] == ["    seq_len 128", "    " + " " * 8 + "^"]


@pytest.mark.parametrize("text", ["[training]\nsteps =", "[training]\nname = '''abc\n", "a = " + "[" * 5000])
def test_unfinished_files_are_refused(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "x.toml") in refusal_of_text(tmp_path, text)


def test_a_key_given_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    assert "line 3" in refusal_of_text(tmp_path, "[training]\nsteps = 1\nsteps = 2\n")


# ---- unknown names ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[training]\nseqlen = 1", 'unknown key "training.seqlen"; did you mean "training.seq_len"?'),
        ("[training]\nlr = 1", 'unknown key "training.lr"; did you mean "optimizer.lr" or "optimizer.muon.lr"?'),
        (
            "[optimizer]\nsteps = 1",
            'unknown key "optimizer.steps"; did you mean "training.steps" or "validation.steps"?',
        ),
        ("[trainng]\nsteps = 1", 'unknown section "trainng"; did you mean "training"?'),
        ("[dataloader]\npin_memory = true", 'unknown section "dataloader"; did you mean "training.dataloader"'),
        ("[training.dataloadr]\nnum_workers = 1", 'unknown section "training.dataloadr"; did you mean'),
        ("zzzzzz = 1", 'unknown key "zzzzzz"; --help lists'),
        ("training = 3", "training = 3: expected a section, written as [training]"),
        ("[[training]]\nsteps = 3", "expected a section, written as [training]"),
        ("[job]\nconfig_file = 'y.toml'", "job.config_file belongs on the command line"),
    ],
)
def test_unknown_names_in_a_file(tmp_path: Path, text: str, words: str) -> None:
    message = refusal_of_text(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'x.toml'}: ") and words in message


def test_unknown_names_on_the_command_line() -> None:
    message = refusal(["--training.seqlen", "3"])
    assert message == 'command line: unknown key "training.seqlen"; did you mean "training.seq_len"?'
    assert 'did you mean "training.seq_len" or "validation.seq_len"?' in refusal(["--seq-len", "3"])
    assert "--training is a section" in refusal(["--training", "3"])


# ---- types ----


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("training.steps", "'ten'", '"ten" (a string): expected an integer of at least 1'),
        ("training.steps", "1.0", "1.0 (a float): expected an integer"),
        ("training.steps", "true", "true (a boolean): expected an integer"),
        ("training.steps", "0", "0 (an integer): expected an integer of at least 1"),
        ("training.steps", "2020-01-01", "2020-01-01 (a date or time): expected an integer"),
        ("training.steps", "{a = 1}", "{a = 1} (a table): expected an integer"),
        ("training.prefetch", "1", "unknown key"),
        ("optimizer.lr", "true", "true (a boolean): expected a finite number of at least 0"),
        ("optimizer.lr", "nan", "nan (a float): expected a finite number"),
        ("optimizer.lr", "inf", "inf (a float): expected a finite number"),
        ("optimizer.lr", "-1", "-1.0 (a float): expected a finite number of at least 0"),
        ("optimizer.lr", "1" + "0" * 400, "(an integer): expected a finite number"),
        ("compile.enable", "1", "1 (an integer): expected true or false"),
        ("compile.components", "'model'", '"model" (a string): expected a list of any of'),
        ("compile.components", "['model', 1]", '["model", 1] (an array): expected a list of any of'),
        ("parallelism.module_fqns_per_model_part", "['a']", 'a list of lists of strings, or "" for none'),
        ("model.n_layers", "0", 'expected an integer of at least 1, or "" for none'),
        ("model.name", "3", "3 (an integer): expected a string"),
        ("optimizer.implementation", "'fusd'", 'expected "for-loop", "foreach" or "fused"; did you mean "fused"?'),
        ("optimizer.implementation", "3", '3 (an integer): expected "for-loop", "foreach" or "fused"'),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, name: str, given: str, words: str) -> None:
    section, _, leaf = name.rpartition(".")
    message = refusal_of_text(tmp_path, f"[{section}]\n{leaf} = {given}\n")
    assert message.startswith(str(tmp_path / "x.toml")) and name in message and words in message
    assert len(message) < 400


def test_integers_become_floats_and_empty_strings_none(tmp_path: Path) -> None:
    text = (
        '[optimizer]\nlr = 1\n[parallelism]\ncontext_parallel_load_balancer = ""\npipeline_parallel_schedule_csv = ""\n'
    )
    config = load_text(tmp_path, text)
    assert isinstance(config.optimizer.lr, float) and config.optimizer.lr == 1.0
    assert config.parallelism.context_parallel_load_balancer is None
    assert config.parallelism.pipeline_parallel_schedule_csv == ""


# ---- what is lacking ----


def rule_is_never_met(name: str) -> bool:
    """Keys of features that are refused where they are turned on."""
    return name in ("activation_checkpoint.preserve_rng_state",)


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.unsupported])
def test_lacking_keys_take_their_default_only(tmp_path: Path, name: str) -> None:
    section, _, leaf = name.rpartition(".")
    key = KEYS[name]
    default = '""' if key.default is None else as_toml(key.default)
    assert load_text(tmp_path, f"[{section}]\n{leaf} = {default}\n") is not None
    other = changed(key, random.Random(0))
    needs = {
        "quantize.linear.float8": ["--model.converters", "float8"],
        "checkpoint": ["--checkpoint.initial_load_in_hf"],
    }
    if unmet(name, Config()):  # alone in a file it asks for nothing
        assert value(load_text(tmp_path, f"[{section}]\n{leaf} = {as_toml(other)}\n"), name) == key.default
    if rule_is_never_met(name):
        message = refusal([f"--{name}={str(other).lower()}"])  # typed, it is meant
        assert message.startswith(f"command line: {name} = ") and f"is not supported: {key.unsupported}" in message
        return
    message = refusal_of_text(tmp_path, f"[{section}]\n{leaf} = {as_toml(other)}\n", *needs.get(section, []))
    accepted = "leaving it out" if key.default is None else default
    assert f"{name} = {as_toml(other)} is not supported: {key.unsupported}; only {accepted} is accepted" in message
    wrong_type = refusal_of_text(tmp_path, f"[{section}]\n{leaf} = 2020-01-01\n")
    assert key.unsupported and key.unsupported in wrong_type and str(tmp_path / "x.toml") in wrong_type


def test_an_override_mends_a_lacking_key(tmp_path: Path) -> None:
    text = "[comm]\nmode = 'fake_backend'\n"
    assert load_text(tmp_path, text, "--comm.mode", "default").comm.mode == "default"
    message = refusal(["--comm.mode", "fake_backend"])
    assert message.startswith("command line: comm.mode") and "only real process groups" in message


# ---- all mistakes at once ----


def test_all_mistakes_of_files_and_command_line_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, "[training]\nsteps = 'many'\n[moe]\nexperts = 8\n", "b.toml")
    text = "base = 'b.toml'\n[optimizer]\nlr = -1\nmomentum = 0.9\n[lr_scheduler]\nmin_lr_factor = 3\n"
    message = refusal_of_text(tmp_path, text, "--training.seqlen", "8", "--tp", "two", "--cp", "2", "stray")
    for part in (
        "8 mistakes", f"{tmp_path / 'b.toml'}: training.steps", 'unknown section "moe"; --help', "x.toml: optimizer.lr",
        '"optimizer.momentum"', "min_lr_factor = 3", "in [0, 1]", '"training.seqlen"', "tensor_parallel_degree",
        "'stray'",
    ):  # fmt: skip
        assert part in message, message
    assert refusal_of_text(tmp_path, "[training]\nsteps = 0\n").count("\n") == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--config x.toml", "did you mean --job.config_file x.toml?"),
        ("--cfg=x.toml", "did you mean --job.config_file x.toml?"),
        ("--config", "did you mean --job.config_file FILE.toml?"),
        ("configs/x.toml", "as --job.config_file configs/x.toml"),
        ("--training.batch_size 8", 'torchtitan\'s old name of "training.local_batch_size"'),
        ("--training.steps 99999999999999999999", "expected an integer"),
        ("--lr_scheduler.decay_ratio 1.5", "in [0, 1]"),
        ("--comm.train_timeout_seconds 99999999999999", "at most 10000000 seconds"),
    ],
)
def test_hints_of_the_command_line(argv: str, words: str) -> None:
    assert words in refusal(argv.split())


def test_a_missing_file_lists_a_folder_of_many(tmp_path: Path) -> None:
    for name in ("debug", "quickstart", "llama3-8b", "llama3-70b", "smollm-1.7b", "mine"):
        write(tmp_path, "", f"{name}.toml")
    assert "did you mean" in (message := refusal(["--job.config_file", str(tmp_path / "llama3_8b.toml")])), message
    assert str(tmp_path / "llama3-8b.toml") in message and "debug.toml" not in message
    message = refusal(["--job.config_file", str(tmp_path / "pretrain.toml")])
    assert "debug.toml, llama3-70b.toml, llama3-8b.toml, mine.toml, quickstart.toml, smollm-1.7b.toml" in message


# ---- paths ----


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.is_path])
def test_the_home_folder_of_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if KEYS[name].unsupported or name == "job.config_file":
        return
    if KEYS[name].check:  # a folder inside the run folder
        assert "inside the run folder" in refusal([f"--{name}", "~/a"])
        return
    section, _, leaf = name.rpartition(".")
    for given, expected in (("~/a b", f"{tmp_path}/a b"), ("~", str(tmp_path)), ("./~/a", "./~/a"), ("a~", "a~")):
        assert value(load([f"--{name}", given]), name) == expected
        assert value(load_text(tmp_path, f"[{section}]\n{leaf} = {as_toml(given)}\n"), name) == expected


def test_the_home_folder_of_files_and_of_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "[[training.mixture]]\ndataset = '~/data'\n", "b.toml")
    write(tmp_path, "base = '~/b.toml'\n", "sub/x.toml")
    config = load(["--job.config_file", "~/sub/x.toml"])
    assert config.training.mixture[0].dataset == f"{tmp_path}/data"
    assert "no such user" in refusal(["--job.dump_folder", "~nobody-of-that-name/runs"])


def test_every_key_named_like_a_path_is_one() -> None:
    ends = ("folder", "_path", "_file", "_csv", "dataset")
    assert [name for name, key in KEYS.items() if name.endswith(ends) and key.kind is str and not key.is_path] == []


def test_a_link_has_its_base_beside_the_file_else_beside_the_link(tmp_path: Path) -> None:
    write(tmp_path, "base = 'b.toml'\n", "real/x.toml")
    write(tmp_path, "[training]\nsteps = 1\n", "links/b.toml")
    (tmp_path / "links/x.toml").symlink_to("../real/x.toml")
    argv = ["--job.config_file", str(tmp_path / "links/x.toml")]
    assert load(argv).training.steps == 1
    write(tmp_path, "[training]\nsteps = 2\n", "real/b.toml")
    assert load(argv).training.steps == 2


# ---- the command line ----


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        ("--training.seq_len 128", "training.seq_len", 128),
        ("--training.seq_len=128", "training.seq_len", 128),
        ("--training.seq-len 128", "training.seq_len", 128),
        ("--lr-scheduler.warmup-steps=0", "lr_scheduler.warmup_steps", 0),
        ("--training.global_batch_size -1", "training.global_batch_size", -1),
        ("--training.steps 1 --training.steps 2", "training.steps", 2),
        ("--optimizer.lr 1", "optimizer.lr", 1.0),
        ("--optimizer.lr 3e-4", "optimizer.lr", 3e-4),
        ("--compile.enable", "compile.enable", True),
        ("--compile.enable --debug.deterministic", "compile.enable", True),
        ("--compile.enable true", "compile.enable", True),
        ("--compile.enable=True", "compile.enable", True),
        ("--metrics.enable_tensorboard false", "metrics.enable_tensorboard", False),
        ("--metrics.no_enable_tensorboard", "metrics.enable_tensorboard", False),
        ("--metrics.no-enable-tensorboard --tp 2", "metrics.enable_tensorboard", False),
        ("--model.tie_embeddings", "model.tie_embeddings", True),
        ("--model.no_tie_embeddings", "model.tie_embeddings", False),
        ("--model.tie_embeddings none", "model.tie_embeddings", None),
        ("--compile.components loss model --tp 2", "compile.components", ["loss", "model"]),
        ("--compile.components=loss,model", "compile.components", ["loss", "model"]),
        ("--compile.components loss,model", "compile.components", ["loss", "model"]),
        ("--compile.components loss", "compile.components", ["loss"]),
        ("--compile.components=", "compile.components", []),
        ("--model.name=a=b", "model.name", "a=b"),
        ("--job.description=--odd", "job.description", "--odd"),
        ("--job.description=", "job.description", ""),
        ("--training.dataset_path=", "training.dataset_path", None),
        ("--parallelism.context_parallel_load_balancer null", "parallelism.context_parallel_load_balancer", None),
        ("--parallelism.pipeline_parallel_schedule_csv=", "parallelism.pipeline_parallel_schedule_csv", ""),
        ("--training.dataloader.num_workers 2", "training.dataloader.num_workers", 2),
        ("--quantize.linear.float8.emulate false", "quantize.linear.float8.emulate", False),
        ("--dp 2", "parallelism.data_parallel_shard_degree", 2),
        ("--dp -1", "parallelism.data_parallel_shard_degree", -1),
        ("--dp-replicate 2", "parallelism.data_parallel_replicate_degree", 2),
        ("--dp_replicate=2", "parallelism.data_parallel_replicate_degree", 2),
        ("--tp 2", "parallelism.tensor_parallel_degree", 2),
        ("--cp 2", "parallelism.context_parallel_degree", 2),
        ("--pp=2", "parallelism.pipeline_parallel_degree", 2),
        ("--tp 4 --parallelism.tensor_parallel_degree 2", "parallelism.tensor_parallel_degree", 2),
        (
            '--parallelism.module_fqns_per_model_part [["a"],["b","c"]]',
            "parallelism.module_fqns_per_model_part",
            [["a"], ["b", "c"]],
        ),
    ],
)
def test_forms_of_the_command_line(argv: str, name: str, expected: Any) -> None:
    got = value(load(argv.split()), name)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("configs/x.toml", "stray argument 'configs/x.toml'"),
        ("-x", "stray argument '-x'"),
        ("--training.steps 5 six", "stray argument 'six'"),
        ("--training.steps=5 six", "stray argument 'six'"),
        ("--compile.components=a b", "stray argument 'b'"),
        ("--", "stray argument '--'"),
        ("--training.steps", "--training.steps needs a value: --training.steps int>=1"),
        ("--training.steps --debug.seed 1", "--training.steps needs a value"),
        ("--compile.components", "an empty list is --compile.components="),
        ("--compile.no_enable true", "takes no value; --compile.no_enable alone sets compile.enable to false"),
        ("--compile.enable yes", 'compile.enable = "yes": expected true or false'),
        ("--training.no_steps", 'unknown key "training.no_steps"'),
        ("--training.steps 1.5", 'command line: training.steps = "1.5": expected an integer of at least 1'),
        ("--training.steps=", 'training.steps = "": expected an integer'),
        ("--training.steps 0", "training.steps = 0: expected an integer of at least 1"),
        ("--optimizer.lr nan", "expected a finite number"),
        ("--optimizer.implementation Fused", 'did you mean "fused"?'),
        ("--parallelism.module_fqns_per_model_part [[1]]", "a list of lists of strings"),
        ("--parallelism.module_fqns_per_model_part a,b", "a list of lists of strings"),
        ("--model.name caf\udce9", "not UTF-8"),
    ],
)
def test_refusals_of_the_command_line(argv: str, words: str) -> None:
    message = refusal(argv.split())
    assert message.startswith("command line: ") and words in message


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--training.seqlen", "1", "--help"]])
def test_help_is_raised_with_its_text(argv: list[str]) -> None:
    with pytest.raises(HelpRequested) as caught:
        load(argv)
    assert str(caught.value) == help_text()
    assert not isinstance(caught.value, SystemExit)


def test_help_lists_every_key_with_its_section() -> None:
    text = help_text()
    blocks = dict(block.split("]\n", 1) for block in text.split("\n\n[")[1:])
    for name, key in KEYS.items():
        section, _, leaf = name.rpartition(".")
        entry = " ".join(blocks[section].split(f"  {leaf}: ", 1)[1].split())
        default = "none" if key.default is None else as_toml(key.default)
        assert f"= {default} " in entry
        if key.unsupported:
            assert f"(not supported: {key.unsupported}; only {default} accepted)" in entry
        else:
            assert key.help in entry
    assert "implementation: for-loop|foreach|fused = " in text
    assert max(len(line) for line in text.splitlines()) <= 120


# ---- back to text ----


def as_toml(value: Any) -> str:
    """A value as TOML, apart from the writer under test."""
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def changed(key: Any, rng: random.Random) -> Any:
    """A legal value other than the default."""
    if get_origin(key.kind) is Literal:
        return rng.choice([choice for choice in get_args(key.kind) if choice != key.default] or [key.default])
    if key.check:  # words of few, and numbers with bounds of their own
        legal = [0.5, 1, 7, "op", "3", "there", "rank_of_"]
        return rng.choice([v for v in legal if type(v) is key.kind and not key.check(v) and v != key.default])
    if key.kind is bool:
        return not key.default
    if key.kind is int:
        return rng.randrange(20001, 10**9)  # above every minimum and no default
    if key.kind is float:
        return rng.expovariate(1.0) + 1e-9
    word = functools.partial(rng.choice, ["é", "a.b-c", "x" * 5, "0", "true", "[job]"])
    if key.kind is str:
        return word()
    if key.kind == list[Source]:
        return [Source(word(), weight=rng.random()), Source(word(), word(), word(), word(), word())]
    if key.is_list_of_words and get_args(key.kind)[0] is not str:
        return [rng.choice(get_args(get_args(key.kind)[0]))]
    items = [word() for _ in range(rng.randrange(1, 4))]
    return items if key.kind == list[str] else [items, [word()], []]


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_of_changed_values(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    config = Config()
    for name, key in KEYS.items():
        if not key.unsupported and name != "job.config_file":
            config = replace(config, name, None if key.optional and rng.random() < 0.3 else changed(key, rng))
    again = load_text(tmp_path, to_toml(config))
    config = replace(config, "job.config_file", again.job.config_file)
    assert changes(config, again) == {} and again == config
    assert len(changes(config, Config())) > 60


@pytest.mark.parametrize("text", ['"', "\\", "\n", "\t\r\b\f", "\x00\x1f\x7f\x85", "😀 é", "# no comment", "'''", ""])
def test_round_trip_of_odd_strings(tmp_path: Path, text: str) -> None:
    config = replace(replace(Config(), "job.description", text), "model.converters", [text, "b"])
    again = load_text(tmp_path, to_toml(config))
    assert (again.job.description, again.model.converters) == (text, [text, "b"])


@pytest.mark.parametrize("number", [1e-8, 1e16, 1e300, 5e-324, 0.1, 3.0, 123456789.123])
def test_round_trip_of_floats(tmp_path: Path, number: float) -> None:
    config = replace(Config(), "optimizer.lr", number)
    assert load_text(tmp_path, to_toml(config)).optimizer.lr == number


def test_to_toml_states_every_value_but_none() -> None:
    tables = tomllib.loads(to_toml(Config()))
    stated = {name for name in KEYS if functools.reduce(lambda t, part: t.get(part, {}), name.split("."), tables) != {}}
    assert stated == {name for name, key in KEYS.items() if key.default is not None}
    assert set(flatten(Config())) == set(KEYS)
    assert all(section in SECTIONS for section in tables)


def test_the_comment_cannot_leave_its_line(tmp_path: Path) -> None:
    config = replace(Config(), "job.config_file", "a\n[training]\nsteps = 1")
    assert load_text(tmp_path, to_toml(config)).training.steps == Config().training.steps


# ---- arrays of tables ----


def test_a_mixture_is_read_from_tables_and_from_the_command_line(tmp_path: Path) -> None:
    first = '[training]\nsteps = 3\n[[training.mixture]]\ndataset = "a"\nweight = 2\n'
    text = first + '[[training.mixture]]\ntext_column = "t"\n'
    config = load_text(tmp_path, text)
    assert config.training.mixture == [Source("a", weight=2.0), Source(text_column="t")]
    assert isinstance(config.training.mixture[0].weight, float)
    again = load_text(tmp_path, text, "--training.mixture", '[{"dataset": "b", "weight": 0.5}]')
    assert again.training.mixture == [Source("b", weight=0.5)]


@pytest.mark.parametrize(
    "given, words",
    [
        ('mixture = ["a"]', ["training.mixture", "[[training.mixture]]"]),
        ('mixture = [{datset = "a"}]', ["training.mixture[0].datset", 'did you mean "training.mixture[0].dataset"']),
        ("mixture = [{}, {weight = -1}]", ["training.mixture[1].weight", "at least 0"]),
        ("mixture = [{dataset = 3}]", ["training.mixture[0].dataset", "expected a string"]),
    ],
)
def test_a_wrong_mixture_is_refused_by_name(tmp_path: Path, given: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_text(tmp_path, f"[training]\n{given}\n")
    assert all(word in str(error.value) for word in words), error.value
