"""Files with the words of torchtitan, 2024-06 to 2026-02: what is read as what, accepted, and refused with a reason."""

from pathlib import Path
from typing import Any

import pytest

from dtron.config import load, read, to_toml
from dtron.config.keys import KEYS, SECTIONS
from dtron.config.load import Reading, flatten
from dtron.config.torchtitan import ABSENT, RENAMED
from dtron.errors import UserError
from dtron.train.resolve import resolve

# Written for this test, with the keys that the files of these years have.
OLD = """
[job]
use_for_integration_test = true
[metrics]
enable_color_printing = true
[model]
name = "llama3"
flavor = "8B"
norm_type = "fused_rmsnorm"
tokenizer_path = "./assets/original/tokenizer.model"
[optimizer]
fused = true
[training]
dataset = "stdlib"
batch_size = 3
warmup_steps = 2
steps = 10
data_parallel_degree = -1
tensor_parallel_degree = 2
enable_loss_parallel = false
fp8_linear = ""
compile = true
seed = 5
[experimental]
pipeline_parallel_degree = 2
pipeline_parallel_schedule = "1f1b"
[checkpoint]
enable_checkpoint = true
interval_type = "steps"
model_weights_only = true
[float8]
enable_float8_linear = false
scaling_type_input = "dynamic"
[memory_estimation]
enabled = false
"""
NEW = """
[model]
name = "llama3"
flavor = "70B"
print_after_conversion = false
[training]
dataset = "stdlib"
gc_debug = false
[parallelism]
expert_parallel_comm_backend = "standard"
pipeline_parallel_expert_parallel_overlap = true
[checkpoint]
enable = false
export_dtype = "float16"
enable_ft_dataloader_checkpoints = true
[activation_checkpoint]
mode = "full"
determinism_check = "default"
preserve_rng_state = false
per_op_sac_force_recompute_mm_shapes_by_fqns = ["moe.router.gate"]
[quantize.linear.float8]
filter_fqns = ["output"]
[quantize.linear.mx]
recipe_name = "mxfp8_cublas"
[quantize.grouped_mm.float8]
fqns = ["experts"]
[fault_tolerance]
enable = false
group_size = 2
[memory_estimation]
enable = false
[experimental]
custom_import = ""
[debug]
moe_force_load_balance = false
deterministic_warn_only = false
"""


def read_text(folder: Path, text: str, *argv: str) -> Reading:
    (folder / "x.toml").write_text(text)
    return read(["--job.config_file", str(folder / "x.toml"), *argv])


def refusal(folder: Path, text: str) -> str:
    reading = read_text(folder, text)
    with pytest.raises(UserError) as caught:
        resolve(reading.config, 1, "cpu", mistakes=reading.mistakes)
    return str(caught.value)


def test_old_names_are_read_as_the_new_ones_and_each_is_told(tmp_path: Path) -> None:
    reading = read_text(tmp_path, OLD)
    assert reading.mistakes == []
    values = flatten(reading.config)
    expected: dict[str, Any] = {
        "metrics.disable_color_printing": False,
        "model.name": "llama3",
        "model.hf_assets_path": "assets/original",
        "optimizer.implementation": "fused",
        "training.local_batch_size": 3,
        "lr_scheduler.warmup_steps": 2,
        "parallelism.data_parallel_shard_degree": -1,
        "parallelism.tensor_parallel_degree": 2,
        "parallelism.disable_loss_parallel": True,
        "parallelism.pipeline_parallel_degree": 2,
        "parallelism.pipeline_parallel_schedule": "1F1B",
        "compile.enable": True,
        "debug.seed": 5,
        "checkpoint.enable": True,
        "checkpoint.last_save_model_only": True,
        "model.converters": [],
    }
    assert {name: values[name] for name in expected} == expected
    told = "\n".join(reading.notes)
    assert "x.toml: training.batch_size is read as training.local_batch_size = 3" in told
    assert told.count(" is read as ") == len(expected) - 1
    assert "without effect here: job.use_for_integration_test, model.norm_type" in told
    assert "model.name is llama3: metrics.enable_color_printing is a key of torchtitan before 2025-10" in told


def test_what_asks_for_nothing_is_accepted(tmp_path: Path) -> None:
    reading = read_text(tmp_path, NEW)
    assert reading.mistakes == []
    setup = resolve(reading.config, 1, "cpu")
    assert setup.config.model.name == "llama3.1" and setup.model_config.rope_scaling is not None
    assert reading.config.quantize.linear.float8.filter_fqns == ["output"]
    told = "\n".join(reading.notes)
    for part in (
        "model.name is llama3.1: quantize.linear.float8.filter_fqns is a key of torchtitan since 2025-10",
        "quantize.linear.float8.filter_fqns has no effect: only read with model.converters naming float8",
        "checkpoint.export_dtype has no effect",
    ):
        assert part in told, told


@pytest.mark.parametrize("name", RENAMED)
def test_every_old_name_has_a_key_and_no_key_is_old(name: str) -> None:
    assert RENAMED[name].name in KEYS and name not in KEYS
    assert not set(ABSENT) & set(KEYS)
    assert name.rpartition(".")[0] in [*SECTIONS, "experimental", "float8"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[training]\nbatch_size = 2\nlocal_batch_size = 2", ["old name of training.local_batch_size"]),
        ("[training]\nbatch_size = 'two'", ["training.batch_size, now: training.local_batch_size", "an integer"]),
        (
            '[model]\nconverters = ["quantize.grouped_mm.float8", "mx"]\n[training]\n'
            'dataset = "c4"\n[fault_tolerance]\nenable = true\n[debug]\nmoe_force_load_balance = true',
            [
                "5 mistakes", "model.converters = 'mx': MXFP8 is not built yet", "float8 products of experts",
                "allenai/c4",
                'dataset_subset = "en"', "fault_tolerance.enable = true is not supported",
                "balanced by training.expert_balance_loss",
            ],
        ),
        ('[training]\ndataset = "c4_test"', ["'c4_test' is unknown", "tests/assets/c4_test", "dataset_path"]),
        ('[model]\nname = "llama4"', ["this mixture of experts is not built yet (mixtral, qwen3_moe and olmoe are)"]),
        ('[model]\nflavor = "8B_flex"', ['attention_mask = "document"']),
        ("[float8]\nenable_float8_linear = true", ["float8 needs a GPU"]),
        ("[experimental]\npipeline_parallel_split_points = ['layers.2']", ["module_fqns_per_model_part"]),
        ("[experimental]\npipeline_parallel_microbatches = 4", ["pipeline_parallel_microbatch_size"]),
        ("[experimental]\nwrong = 4", ['unknown key "experimental.wrong"']),
        ("[job]\ncustom_config_module = 'x'", ["job.custom_import"]),
    ],
)  # fmt: skip
def test_the_rest_is_refused_with_its_reason_all_at_once(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(tmp_path, text + "\n")
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("text", "argv", "name"),
    [
        ("[checkpoint]\nenable_checkpoint = false\n", [], "llama3"),
        ("[quantize.linear.float8]\nemulate = false\n", [], "llama3.1"),
        ("[quantize.linear.float8]\nemulate = false\n[job]\nprint_args = false\n", [], "llama3.1"),
        ("[quantize.linear.float8]\nemulate = false\n", ["--model.name", "llama3"], "llama3"),
        ("[quantize.linear.float8]\nemulate = false\n[model]\nname = 'qwen3'\n", [], "qwen3"),
        ("[training]\nsteps = 300\n", [], "llama3"),
    ],
)
def test_llama3_is_what_it_was_when_the_file_was_written(tmp_path: Path, text: str, argv: list[str], name: str) -> None:
    reading = read_text(tmp_path, text, *argv)
    assert reading.config.model.name == name and reading.mistakes == []
    assert any("rotary" in note for note in reading.notes) == ("300" not in text and not argv and name != "qwen3")
    again = read_text(tmp_path, to_toml(reading.config))  # a run's own record says its name itself
    assert again.config.model.name == name


def test_a_file_that_states_every_key_of_torchtitans_is_no_record_of_a_run(tmp_path: Path) -> None:
    text = to_toml(load(["--training.steps", "300"]))
    assert read_text(tmp_path, text).config.model.name == "llama3"
    assert read_text(tmp_path, text + "\n[fault_tolerance]\nenable = false\n").config.model.name == "llama3.1"


def test_a_base_and_the_command_line_override_an_old_name(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text("[training]\nbatch_size = 2\n")
    assert read_text(tmp_path, "base = 'b.toml'\n").config.training.local_batch_size == 2
    assert (
        read_text(tmp_path, "base = 'b.toml'\n[training]\nlocal_batch_size = 4\n").config.training.local_batch_size == 4
    )
    given = ["--job.config_file", str(tmp_path / "b.toml"), "--training.local_batch_size", "8"]
    assert load(given).training.local_batch_size == 8
