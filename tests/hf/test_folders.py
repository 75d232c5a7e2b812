"""What a Hugging Face folder may look like: read as transformers reads it, or refused with what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.models import logits_of, save_random, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtron.__main__ import main
from dtron.checkpoint.load import check_source
from dtron.checkpoint.storage import StoragePath
from dtron.config import load
from dtron.errors import UserError
from dtron.hf.read import open_model
from dtron.models.hf import hf_dimensions
from dtron.train.resolve import resolve

Weights = dict[str, Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random("Qwen3-0.6B", tmp_path_factory.mktemp("tied") / "model")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random("Qwen3-8B", tmp_path_factory.mktemp("untied") / "model")


@torch.no_grad()
def ours(path: Path) -> Tensor:
    return open_model(str(path), torch.device("cpu"), torch.float32).model(tokens())


def weights_of(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def made(source: Path, folder: Path, weights: Weights, *files: str) -> Path:
    """A folder with the config.json of `source` and these weights, shared out over files, which an index then names."""
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    names, save = list(weights), torch.save if files[0].lower().endswith(".bin") else save_file
    parts = {file: names[i :: len(files)] for i, file in enumerate(files)}
    for file, part in parts.items():
        save({name: weights[name] for name in part}, folder / file)
    if len(files) > 1:
        index = "pytorch_model.bin.index.json" if save is torch.save else "model.safetensors.index.json"
        where = {name: file for file, part in parts.items() for name in part}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def bare(weights: Weights) -> Weights:
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def before(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def in_the_middle(weights: Weights) -> Weights:
    return {
        name.replace("layers.", "_orig_mod.layers.").replace(
            "self_attn", "_checkpoint_wrapped_module.self_attn"
        ): tensor
        for name, tensor in before("module.")(weights).items()
    }


def computed(weights: Weights) -> Weights:
    return weights | {
        "model.rotary_emb.inv_freq": torch.zeros(8), "rotary_emb.inv_freq": torch.zeros(8, dtype=torch.float64),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.zeros(8),
    }  # fmt: skip


ONE, TWO = ("model.safetensors",), ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.mark.parametrize(
    ("change", "files"),
    [
        (bare, ONE),
        (computed, ONE),
        (before("module."), ONE),
        (before("_orig_mod."), ONE),
        (before("model."), ONE),
        (in_the_middle, ONE),
        (dict, ("pytorch_model.bin",)),
        (bare, TWO),
        (computed, TWO),
        (dict, ("MODEL.SAFETENSORS",)),
        (dict, ("weights.safetensors",)),
        (dict, ("Model-1.safetensors", "model-2.safetensors")),
    ],
)
def test_names_and_files_are_read_as_they_are_meant(
    change: Callable[[Weights], Weights], files: tuple[str, ...], untied: Path, tmp_path: Path
) -> None:
    expected = ours(untied)
    torch.testing.assert_close(expected, logits_of(untied), rtol=1e-4, atol=1e-4)
    folder = made(untied, tmp_path / "model", change(weights_of(untied)), *files)
    torch.testing.assert_close(ours(folder), expected, rtol=0, atol=0)
    assert main(["convert", str(folder), str(tmp_path / "here")]) == 0
    torch.testing.assert_close(ours(tmp_path / "here"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["hf", "http"])
def test_a_local_folder_with_the_name_of_a_protocol(
    name: str, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).symlink_to(tied)
    monkeypatch.chdir(tmp_path)
    assert open_model(name, torch.device("cpu"), torch.float32).name == name


def test_a_tied_matrix_is_read_under_either_name(tied: Path, tmp_path: Path) -> None:
    weights = weights_of(tied)
    assert EMBEDDING in weights and HEAD not in weights
    as_head = {HEAD if name == EMBEDDING else name: tensor for name, tensor in weights.items()}
    for number, there in enumerate((bare(weights), as_head, bare(as_head), as_head | weights)):
        folder = made(tied, tmp_path / str(number), {name: tensor.clone() for name, tensor in there.items()}, *ONE)
        torch.testing.assert_close(ours(folder), logits_of(tied), rtol=1e-4, atol=1e-4)
    assert main(["convert", str(tmp_path / "1"), str(tmp_path / "here")]) == 0
    torch.testing.assert_close(ours(tmp_path / "here"), ours(tied), rtol=0, atol=0)


def test_half_precision_and_the_format_before_torch_1_6_are_read(untied: Path, tmp_path: Path) -> None:
    weights = {name: tensor.half() for name, tensor in weights_of(untied).items()}
    expected = ours(made(untied, tmp_path / "a", weights, *ONE))
    folder = made(untied, tmp_path / "b", weights, "pytorch_model.bin")
    torch.testing.assert_close(ours(folder), expected, rtol=0, atol=0)
    old = {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}
    torch.save(old, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(ours(folder), expected, rtol=0, atol=0)


def test_names_in_capitals_as_some_disks_have_them(untied: Path, tmp_path: Path) -> None:
    folder = made(untied, tmp_path / "model", weights_of(untied), *TWO)
    expected = ours(folder)
    for file in folder.glob("pytorch_model*"):
        file.rename(folder / file.name.upper())
    torch.testing.assert_close(ours(folder), expected, rtol=0, atol=0)


def test_the_single_file_counts_as_in_transformers(untied: Path, tmp_path: Path) -> None:
    """Whatever an index says of others, and whatever .bin files there are."""
    folder = Path(shutil.copytree(untied, tmp_path / "model"))
    index = {"weight_map": {HEAD: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"")
    torch.testing.assert_close(ours(folder), logits_of(folder), rtol=1e-4, atol=1e-4)


# --- what a path means


def cache_of(model: Path, folder: Path) -> Path:
    """The cache of the hub: blobs, and two snapshots of links to them, of which `main` is one."""
    cache = folder / "models--Qwen--Qwen3-8B"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc123\n")
    shutil.copytree(model, cache / "blobs")
    for name in ("abc123", "old"):
        (cache / "snapshots" / name).mkdir(parents=True)
        for file in (cache / "blobs").iterdir():
            (cache / "snapshots" / name / file.name).symlink_to(file)
    return cache


def test_a_cache_of_the_hub_and_a_file_mean_their_folder(
    untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cache_of(untied, tmp_path)
    snapshot = cache / "snapshots" / "abc123"
    for path in (cache, snapshot / "model.safetensors", snapshot / "config.json"):
        assert open_model(str(path), torch.device("cpu"), torch.float32).name == str(snapshot)
    given = [f"--checkpoint.initial_load_path={snapshot / 'model.safetensors'}", f"--model.hf_config_path={cache}",
             f"--model.hf_assets_path={cache}", "--checkpoint.initial_load_in_hf"]  # fmt: skip
    resolved = resolve(load([*given, "--training.device", "cpu"]), 1).config
    assert resolved.checkpoint.initial_load_path == resolved.model.hf_config_path == str(snapshot)
    assert resolved.model.hf_assets_path == str(snapshot)
    (cache / "refs" / "main").write_text("of another machine")
    assert f"{snapshot}, {cache / 'snapshots' / 'old'}" in refused(capsys, cache)
    shutil.rmtree(cache / "snapshots" / "old")
    assert open_model(str(cache), torch.device("cpu"), torch.float32).name == str(snapshot)


def refused(capsys: pytest.CaptureFixture[str], source: Path) -> str:
    """What `dtron convert` says."""
    capsys.readouterr()
    assert main(["convert", str(source), str(source.parent / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_what_is_no_whole_model_is_named(untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = weights_of(untied)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        (adapter / name).write_bytes(b"")
        assert "is a LoRA adapter (it has adapter_config.json)" in refused(capsys, adapter)
        assert "is a LoRA adapter" in initial_weights_refused(adapter)
        (adapter / name).unlink()
    unmerged = weights | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}
    said = refused(capsys, made(untied, tmp_path / "unmerged", unmerged, *ONE))
    assert "a LoRA adapter (base_model.model.model.layers.0" in said and "merge_and_unload" in said
    headless = {name: tensor for name, tensor in bare(weights).items() if name != HEAD}
    said = refused(capsys, made(untied, tmp_path / "headless", headless, *ONE))
    assert "it has no lm_head.weight; it may be a base model that was saved without its head" in said
    both = made(untied, tmp_path / "both", weights | {"norm.weight": torch.ones(64)}, *ONE)
    assert "has both model.norm.weight and norm.weight" in refused(capsys, both)
    score = made(untied, tmp_path / "score", bare(weights) | {"score.weight": torch.ones(2, 64)}, *ONE)
    assert "which has no score.weight;" in refused(capsys, score)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "x-Q4.gguf").write_bytes(b"")
    for path in (tmp_path / "gguf", tmp_path / "gguf" / "x-Q4.gguf"):
        assert "x-Q4.gguf holds weights of llama.cpp, which are not read" in refused(capsys, path)
        assert "weights of llama.cpp" in initial_weights_refused(path)
    (untied / "other.safetensors").write_bytes(b"")
    assert "other.safetensors is not among the weights of" in refused(capsys, untied / "other.safetensors")
    (untied / "other.safetensors").unlink()
    assert "is no checkpoint but a file; expected the folder of one" in refused(
        capsys, untied / "generation_config.json"
    )
    # What else lies in a run's folder does not keep its checkpoints from being found.
    assert main(["convert", str(untied), str(tmp_path / "run" / "checkpoint" / "step-3")]) == 0
    (tmp_path / "run" / "notes.pt").write_bytes(b"")
    torch.testing.assert_close(ours(tmp_path / "run"), ours(untied), rtol=0, atol=0)


def initial_weights_refused(path: Path) -> str:
    """What a training from it says, with the key for Hugging Face's folders and without."""
    with pytest.raises(UserError) as early:
        given = ["--checkpoint.initial_load_path", str(path), "--checkpoint.initial_load_in_hf"]
        resolve(load([*given, "--training.device", "cpu"]), 1)
    if path.is_dir():
        with pytest.raises(UserError) as late:
            check_source(StoragePath.at(path))
        assert str(early.value) == str(late.value)
    return str(early.value)


def test_faults_of_saved_files_are_named(untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(untied, tmp_path / "model", weights_of(untied), *TWO)
    content = (folder / TWO[1]).read_bytes()
    for broken, said in (
        (content[:-100], f"{TWO[1]} is truncated or not a file of torch.save"),
        (b"", f"{TWO[1]} is truncated or not a file of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\n", f"{TWO[1]} is a pointer of git-lfs"),
    ):
        (folder / TWO[1]).write_bytes(broken)
        assert said in refused(capsys, folder)
    for held, said in (
        ({"state_dict": weights_of(untied)}, "is no state dict, just names and tensors, but holds state_dict"),
        ({HEAD: torch.ones(2, dtype=torch.int8)}, "lm_head.weight is stored as int8"),
    ):
        torch.save(held, folder / TWO[1])
        assert said in refused(capsys, folder)
    (folder / TWO[1]).unlink()
    assert f"1 of 2 files named in pytorch_model.bin.index.json are missing, {TWO[1]} the first" in refused(
        capsys, folder
    )
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    assert "pytorch_model.bin.index.json is no index of torch.save files" in refused(capsys, folder)


# --- config.json

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96,
}  # fmt: skip
FULL, OTHER = {"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    "rope",
    [
        {"full_attention": FULL},
        {"full_attention": FULL, "sliding_attention": OTHER},
        {"full_attention": FULL, "sliding_attention": None},
        {"sliding_attention": FULL},
        {"sliding_attention": FULL, "chunked_attention": FULL},
    ],
)
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_rotary_settings_by_kind_of_layer_are_read(rope: dict[str, Any], field: str) -> None:
    assert hf_dimensions(LLAMA | {field: rope}, "config.json").rope_theta == 1e6


def test_rotary_settings_that_are_ambiguous_or_of_another_type_are_refused() -> None:
    scaled = FULL | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192}  # fmt: skip
    read = hf_dimensions(LLAMA | {"rope_parameters": {"full_attention": scaled}}, "config.json")
    assert read.rope_scaling is not None and read.rope_scaling.factor == 8
    for rope, said in (
        ({"sliding_attention": FULL, "chunked_attention": OTHER}, "settings of sliding_attention, chunked_attention"),
        (
            {"full_attention": FULL, "rope_theta": 1e4},
            r"by kind of layer \(full_attention\) and others beside \(rope_theta",
        ),
        ({"full_attention": FULL | {"rope_type": "proportional"}}, "'proportional' cannot be represented"),
        ({"full_attention": FULL | {"rope_theta": -1}}, "rope_theta = -1"),
    ):
        with pytest.raises(UserError, match=said):
            hf_dimensions(LLAMA | {"rope_parameters": rope}, "config.json")


def test_code_that_comes_with_a_model_is_never_run(
    untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, folder = tmp_path / "flag", Path(shutil.copytree(untied, tmp_path / "model"))
    code = f"from pathlib import Path\nPath({str(flag)!r}).touch()\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "x", "auto_map": named}))
    said = refused(capsys, folder)
    assert "model_type is 'x'; expected one of llama" in said and "auto_map names is never run" in said
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "vocab.json").write_text("{}")
    assert main(["sample", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "needs code of its own to be read" in said and "is never run (no trust_remote_code)" in said
    assert not flag.exists()
