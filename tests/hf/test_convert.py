"""`dtron convert`: the same logits in transformers and here, both ways; the same bits there and back; faults."""

import contextlib
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hf.models import PUBLISHED, logits_of, save_random, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtron.__main__ import main
from dtron.checkpoint.files import find_damage, read_manifest
from dtron.checkpoint.storage import StoragePath
from dtron.hf.read import open_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model of several files, with the files that lie beside weights."""
    made = save_random("Llama-3.2-1B", tmp_path_factory.mktemp("hf") / "model", torch.bfloat16, "50KB")
    (made / "chat_template.jinja").write_text("{{ messages }}")
    (made / "README.md").write_text("not carried")
    return made


@torch.no_grad()
def ours(path: Path) -> Tensor:
    return open_model(str(path), CPU, torch.float32).model(tokens())


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_are_those_of_transformers_both_ways(name: str, tmp_path: Path) -> None:
    there = save_random(name, tmp_path / "there")
    expected = logits_of(there)
    assert expected.std() > 0.05, "logits that are all alike prove nothing"
    torch.testing.assert_close(ours(there), expected, rtol=1e-4, atol=1e-4)
    assert main(["convert", str(there), str(tmp_path / "here")]) == 0
    torch.testing.assert_close(ours(tmp_path / "here"), expected, rtol=1e-4, atol=1e-4)
    assert main(["convert", str(tmp_path / "here"), str(tmp_path / "back"), "--max-file-gb", "0.0001"]) == 0
    torch.testing.assert_close(logits_of(tmp_path / "back"), expected, rtol=0, atol=0)
    assert same_bits(weights(there), weights(tmp_path / "back"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_round_trip_is_bitwise(dtype: torch.dtype, size: str, tmp_path: Path) -> None:
    there = save_random("Qwen3-8B", tmp_path / "there", dtype, size)
    assert len(list(there.glob("*.safetensors"))) == 1 or size == "50KB"
    assert main(["convert", str(there), str(tmp_path / "here")]) == 0
    assert main(["convert", str(tmp_path / "here"), str(tmp_path / "back")]) == 0
    assert same_bits(weights(there), weights(tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert main(["convert", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    assert main(["convert", str(tmp_path / "again"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert same_bits({n: w.bfloat16() for n, w in weights(there).items()}, weights(tmp_path / "half"))


def test_a_checkpoint_is_verified_and_carries_what_lies_beside(folder: Path, tmp_path: Path) -> None:
    assert main(["convert", str(folder), str(tmp_path / "here")]) == 0
    place = StoragePath.at(tmp_path / "here")
    manifest = read_manifest(place)
    assert find_damage(place, manifest.files.items()) == [] and manifest.progress.model_only
    assert {"config.json", "generation_config.json", "chat_template.jinja"} <= manifest.files.keys()
    assert main(["convert", str(tmp_path / "here"), str(tmp_path / "back"), "--max-file-gb", "0.00005"]) == 0
    back = tmp_path / "back"
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert not (back / "README.md").exists()
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and files == {path.name for path in back.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(w.numel() * w.element_size() for w in weights(back).values())
    for file in files:
        with safe_open(back / file, "pt") as opened:
            assert set(opened.keys()) == {name for name, f in index["weight_map"].items() if f == file}
    assert "lm_head.weight" not in index["weight_map"]


def test_a_tied_head_that_is_saved_twice_is_read_once(folder: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(folder, twice)
    add_tensor(twice, "lm_head.weight", weights(folder)["model.embed_tokens.weight"].clone())
    torch.testing.assert_close(ours(twice), ours(folder), rtol=0, atol=0)
    assert main(["convert", str(twice), str(tmp_path / "here")]) == 0
    torch.testing.assert_close(ours(tmp_path / "here"), ours(folder), rtol=0, atol=0)


def add_tensor(folder: Path, name: str, tensor: Tensor) -> None:
    """In a file of its own."""
    save_file({name: tensor}, folder / "model-more.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "model-more.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- faults


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What `dtron convert` says, having made nothing."""
    out = Path(arguments[1])
    before = sorted(os.listdir(out)) if out.is_dir() else out.exists()
    assert main(["convert", *map(str, arguments)]) == 1
    assert (sorted(os.listdir(out)) if out.is_dir() else out.exists()) == before
    assert not list(out.parent.glob(f"{out.name}.*")), "no half folder stays"
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def first_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_a_missing_file_is_named(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first_file(broken).unlink()
    said = refused(capsys, broken, tmp_path / "out")
    assert "files named in model.safetensors.index.json are missing, model-00001-of" in said


@pytest.mark.parametrize("left", [4, 100, -1])
def test_a_truncated_file_is_named(left: int, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = first_file(broken)
    file.write_bytes(file.read_bytes()[:left])
    said = refused(capsys, broken, tmp_path / "out")
    assert file.name in said and "truncated" in said


def test_a_wrong_shape_is_named(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(content | {"intermediate_size": 128}))
    said = refused(capsys, broken, tmp_path / "out")
    assert "model.layers.0.mlp.gate_proj.weight is [96, 64] there and [128, 64] in the model" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 4}, "it has no model.layers.3."),
        ({"num_hidden_layers": 2}, "which has no model.layers.2."),
        ({"tie_word_embeddings": False}, "it has no lm_head.weight"),
        ({"model_type": "gemma4"}, "model_type is 'gemma4'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "it has no model.layers.0.self_attn.q_proj.bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"rope_parameters": {"rope_type": "mrope", "factor": 4.0}}, "'mrope' cannot be represented"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types = ['sliding_attention', "),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(
    change: dict[str, Any], said: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(content | change))
    answer = refused(capsys, broken, tmp_path / "out")
    assert said in answer and str(broken) in answer


def test_dropout_is_told(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((broken / "config.json").read_text())
    for dropout, told in ((0.0, False), (0.1, True)):
        (broken / "config.json").write_text(json.dumps(content | {"attention_dropout": dropout}))
        assert main(["convert", str(broken), str(tmp_path / f"out-{dropout}")]) == 0
        said = capsys.readouterr().out
        warning = "/config.json has attention_dropout = 0.1: dtron trains without dropout"
        assert (warning in said) == told
        assert (warning in open_model(str(broken), CPU, torch.float32).warning) == told


def test_a_tensor_too_many_is_named(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_tensor(broken, "model.layers.0.self_attn.q_proj.bias", torch.zeros(64))
    assert "which has no model.layers.0.self_attn.q_proj.bias" in refused(capsys, broken, tmp_path / "out")


def test_old_files_with_rotary_frequencies_are_read(broken: Path, tmp_path: Path) -> None:
    add_tensor(broken, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4))
    assert main(["convert", str(broken), str(tmp_path / "out")]) == 0


def test_a_head_that_differs_from_the_tied_embedding_is_refused(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = weights(broken)["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    add_tensor(broken, "lm_head.weight", head)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(capsys, broken, tmp_path / "out")


def test_quantized_and_empty_weights_are_refused(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = first_file(broken)
    content = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(content, file)
    assert "stored as F8_E4M3" in refused(capsys, broken, tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(broken / "config.json", empty)
    (empty / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is truncated or not a file of torch.save" in refused(capsys, empty, tmp_path / "out")


def test_a_lost_index_and_a_pointer_are_named(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first_file(broken).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "it is a pointer of git-lfs" in refused(capsys, broken, tmp_path / "out")
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    assert "is no index of safetensors files" in refused(capsys, broken, tmp_path / "out")
    (broken / "model.safetensors.index.json").unlink()
    assert "the index of the others there" in refused(capsys, broken, tmp_path / "out")


def test_what_is_no_model_is_refused(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a checkpoint" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    for name in ("HuggingFaceTB/SmolLM-135M", "https://huggingface.co/HuggingFaceTB/SmolLM-135M", ""):
        assert "hf download" in refused(capsys, name, tmp_path / "out")
    assert main(["convert", str(folder), "s3://bucket/model"]) == 1
    assert "DST s3://bucket/model is a URL" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "config.json").unlink()
    assert "has no config.json" in refused(capsys, bare, tmp_path / "out")


def test_nothing_is_overwritten(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, back, notes = tmp_path / "here", tmp_path / "back", tmp_path / "notes"
    for source, out in ((folder, here), (here, back)):
        assert main(["convert", str(source), str(out)]) == 0
        capsys.readouterr()
        assert "nothing is overwritten" in refused(capsys, source, out)
        first = {path.name: path.read_bytes() for path in out.iterdir()}
        assert main(["convert", str(source), str(out), "--force"]) == 0
        assert first.keys() == {path.name for path in out.iterdir()}
        capsys.readouterr()
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    assert "it holds mine.txt" in refused(capsys, folder, notes, "--force")
    (here / "mine.txt").write_text("mine")
    assert "it holds mine.txt" in refused(capsys, folder, here, "--force")
    (here / "mine.txt").unlink()
    (back / "inner").mkdir()
    assert "it holds inner" in refused(capsys, here, back, "--force")
    assert "it is no folder" in refused(capsys, folder, notes / "mine.txt", "--force")
    assert "lie in one another" in refused(capsys, folder, folder / "inside")
    assert "lie in one another" in refused(capsys, folder, folder.parent, "--force")
    assert (notes / "mine.txt").read_text() == "mine"


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk is like: the kernel refuses to write more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    assert main(["convert", str(folder), str(here)]) == 0
    capsys.readouterr()
    with files_of_at_most(20_000):
        said = [refused(capsys, folder, tmp_path / "out"), refused(capsys, here, tmp_path / "out")]
    assert all("File too large" in text and "make room, or name another disk" in text for text in said), said


def test_a_value_that_float16_does_not_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = save_random("Qwen3-8B", tmp_path / "there")
    content = load_file(there / "model.safetensors")
    content["model.norm.weight"][3] = 7e4
    save_file(content, there / "model.safetensors", {"format": "pt"})
    assert main(["convert", str(there), str(tmp_path / "here")]) == 0
    capsys.readouterr()
    said = refused(capsys, tmp_path / "here", tmp_path / "out", "--dtype", "float16")
    assert "model.norm.weight has values that float16 does not hold" in said
    assert main(["convert", str(tmp_path / "here"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0


def test_folders_of_similar_names_are_left_alone(folder: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    assert main(["convert", str(folder), str(here)]) == 0
    for name in ("out.partial", "out.new", "out.old", "out.partial-1"):
        shutil.copytree(here, tmp_path / name)
    before = sorted(path.name for path in tmp_path.iterdir())
    for source in (here, folder):
        for _ in range(2):
            assert main(["convert", str(source), str(tmp_path / "out"), "--force"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_appears_meanwhile_is_not_overwritten(
    force: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, out, save = tmp_path / "here", tmp_path / "out", safetensors.torch.save_file
    assert main(["convert", str(folder), str(here)]) == 0

    def saved_while_someone_writes(*arguments: Any, **more: Any) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")
        save(*arguments, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", saved_while_someone_writes)
    assert main(["convert", str(here), str(out), *force]) == 1
    said = capsys.readouterr().err
    assert ("it holds mine.txt" if force else "nothing is overwritten") in said and said.count("\n") == 1
    assert (out / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "out"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rename = tmp_path / "out", Path.rename
    assert main(["convert", str(folder), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def refuse(path: Path, target: Any) -> Path:
        if ".partial-" in path.name and Path(target) == out:
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert main(["convert", str(folder), str(out), "--force"]) == 1
    assert "the disk is gone" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_interrupt_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, out = tmp_path / "here", tmp_path / "out"
    assert main(["convert", str(folder), str(here)]) == 0

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    assert main(["convert", str(here), str(out)]) == 130
    monkeypatch.setattr(torch, "save", interrupted)  # as DCP writes
    assert main(["convert", str(folder), str(out)]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]


def test_a_damaged_checkpoint_is_not_exported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = tmp_path / "here"
    assert main(["convert", str(folder), str(here)]) == 0
    capsys.readouterr()
    (file,) = here.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "is not what was written" in refused(capsys, here, tmp_path / "out")
