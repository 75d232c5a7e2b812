"""Weights that leave for Hugging Face and come back, as their user sees it: through torchrun and train.py."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from frontdoor import CONFIG, Run, torchrun
from hf.models import config_json, save_random
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtron import registry
from dtron.__main__ import main
from dtron.config import load
from dtron.data.tokenizer import train_bpe
from dtron.errors import UserError
from dtron.hf.read import open_model
from dtron.models.hf import from_hf_config, hf_dimensions, to_hf_config
from dtron.models.rope import YarnScaling
from dtron.models.variants import Variant
from dtron.train.initial import check_initial
from dtron.train.resolve import resolve

TEXT = ["the quick brown fox jumps over the lazy dog", "a model that cannot leave is a toy's"] * 40
OWN_DATA = CONFIG.replace('dataset = "uneven"', 'dataset = "data"').replace("vocab_size = 64", "vocab_size = 320")
SAVING = OWN_DATA + "[checkpoint]\nenable = true\nlast_save_in_hf = true\n[debug]\ndeterministic = true\n"
FOUR = ("--pp", "2", "--tp", "2", "--training.steps", "4")


def good(run: Run) -> Run:
    assert run.code == 0, run.everything()
    return run


def prepare(folder: Path) -> None:
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXT))
    assert main(["prepare", str(folder / "text.jsonl"), "--tokenizer", "bpe:320", "--out", str(folder / "data")]) == 0


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    out = model(tokens)
    return getattr(out, "logits", out)


def test_a_model_of_pp2_tp2_opens_in_transformers_and_comes_back(tmp_path: Path) -> None:
    prepare(tmp_path)
    run = good(torchrun(tmp_path, 4, *FOUR, config=SAVING))
    (checkpoint,) = tmp_path.glob("outputs/*/checkpoint/step-4")
    (exported,) = tmp_path.glob("outputs/*/hf/step-4")
    assert "weights for Hugging Face in" in run.out[0]
    theirs = AutoModelForCausalLM.from_pretrained(exported, attn_implementation="sdpa").eval()
    mine = open_model(str(checkpoint), torch.device("cpu"), torch.float32)
    tokens = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(mine.model, tokens), logits(theirs, tokens), rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer(TEXT[0])["input_ids"]) == TEXT[0] and mine.encoder is not None
    assert mine.stop_ids == [tokenizer.eos_token_id] == [mine.encoder.eos_id]

    assert main(["convert", str(exported), str(tmp_path / "back")]) == 0
    assert main(["convert", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    a, b = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    # Trained on from the export, and from the checkpoint it came back as, on other layouts: the same losses.
    (tmp_path / "on").mkdir()
    (tmp_path / "on" / "data").symlink_to(tmp_path / "data")
    losses = []
    for layout, source in ((("--tp", "2"), exported), ((), tmp_path / "back")):
        dump = ("--job.dump_folder", f"outputs/{source.name}", "--training.steps", "2", "--model.hf_config_path")
        config = SAVING.replace("last_save_in_hf = true", "initial_load_in_hf = true")
        if source != exported:
            config = config.replace("initial_load_in_hf = true", "")
        # The dimensions come from config.json, not from keys of the file.
        config = "\n".join(line for line in config.splitlines() if not line.startswith(SIZES))
        arguments = (*layout, *dump, str(source), "--checkpoint.initial_load_path", str(source))
        good(torchrun(tmp_path / "on", 2, *arguments, *local(layout), config=config))
        (path,) = (tmp_path / "on" / "outputs" / source.name).glob("*/metrics.jsonl")
        losses.append([json.loads(line)["loss"] for line in path.read_text().splitlines() if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


SIZES = ("n_layers", "dim", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")


def local(layout: tuple[str, ...]) -> tuple[str, ...]:
    return ("--training.local_batch_size", "8" if layout else "4")


def weights(folder: Path) -> tuple[Path, str, list[str]]:
    """A Hugging Face folder with its tokenizer, a configuration without sizes, and the arguments that start from it."""
    made = save_random("Meta-Llama-3-8B", folder / "weights", torch.float32, "50KB")
    train_bpe([*TEXT, "another text"] * 9, 300).save(made)
    config = "\n".join(line for line in OWN_DATA.splitlines() if not line.startswith(SIZES))
    arguments = ["--model.hf_config_path", str(made), "--checkpoint.initial_load_path", str(made)]
    return made, config, [*arguments, "--checkpoint.initial_load_in_hf"]


@pytest.mark.parametrize("what", ["vocabulary", "truncated"])
def test_weights_that_do_not_fit_are_told_before_training(what: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    folder, config, arguments = weights(tmp_path)
    said = "the data was tokenized with another vocabulary than the weights in"
    if what == "truncated":
        first = sorted(folder.glob("*.safetensors"))[0]
        first.write_bytes(first.read_bytes()[:-1])
        said = "is truncated or"
    run = torchrun(tmp_path, 1, *arguments, config=config)
    assert run.code == 1 and run.out[0].count("step ") == 0
    assert said in run.err[0], run.everything()
    assert run.err[0].count("error") == 1 and "Traceback" not in run.err[0]


LLAMA2 = (
    "--model.name llama2 --model.dim 64 --model.n_heads 8 --model.n_layers 3 --model.n_kv_heads 4 --model.ffn_dim 96"
)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("the model has rope_theta 10000.0, but the weights in", (0, 2, LLAMA2.split())),
        ("the model has n_layers 2, but the weights in .* were trained with 3", (5, 5, ["--model.n_layers", "2"])),
        ("checkpoint.initial_load_in_hf needs the folder with the weights", (2, 4, [])),
        ("has no config.json with safetensors beside it", (3, 4, ["."])),
        ("last_save_in_hf needs checkpoint.enable", (5, 5, ["--checkpoint.last_save_in_hf"])),
        (
            "model.converters change the model",
            (5, 5, ["--checkpoint.last_save_in_hf", "--checkpoint.enable", "--model.converters", "x"]),
        ),
    ],
)
def test_mistakes_are_told_before_a_process_group(
    said: str, change: tuple[int, int, list[str]], tmp_path: Path
) -> None:
    _, config, arguments = weights(tmp_path)
    registry.register("converter", "x", keep)
    first, last, given = change
    arguments[first:last] = given
    write(tmp_path, config)
    with pytest.raises(UserError, match=said):
        resolve(load(["--job.config_file", str(tmp_path / "x.toml"), *arguments]), 1)


def write(folder: Path, config: str) -> None:
    text = config.replace('custom_import = ["frontdoor_parts"]', "").replace('"data"', '"stdlib"')
    (folder / "x.toml").write_text(text)


def keep(model: Any, config: Any) -> Any:
    return model


def test_every_field_of_the_config_json_beside_the_weights_is_compared(tmp_path: Path) -> None:
    """Most do not show in the shapes of the weights."""
    (tmp_path / "config.json").write_text(json.dumps(config_json("SmolLM3-3B")))
    config = load(["--checkpoint.initial_load_path", str(tmp_path)])
    there = from_hf_config(tmp_path)
    check_initial(config, there)
    for name, value in (
        ("ropes", ()), ("partial_rotary_factor", 0.5), ("o_bias", True), ("windows", (9,)), ("attention_scale", 0.5),
        ("variant", Variant(logits_multiplier=2.0)),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"the model has {name} .* but the weights in"):
            check_initial(config, replace(there, **{name: value}))


def resolved(folder: Path, *more: str) -> Any:
    _, config, arguments = weights(folder)
    write(folder, config)
    return resolve(load(["--job.config_file", str(folder / "x.toml"), *arguments, *more]), 1).model_config


def test_a_rope_that_is_meant_is_accepted(tmp_path: Path) -> None:
    assert resolved(tmp_path, "--model.rope_theta", "1000000").rope_theta == 1e6


def test_a_rope_scaling_that_is_meant_is_accepted_and_exported(tmp_path: Path) -> None:
    """Training on with longer sequences; the scaling of the folder is another, or none."""
    keys = ["--model.rope_scaling.rope_type", "yarn", "--model.rope_scaling.factor", "4"]
    given = resolved(tmp_path, *keys, "--model.rope_scaling.original_max_position_embeddings", "32")
    assert given.rope_scaling == YarnScaling(4.0, 32)
    assert hf_dimensions(to_hf_config(given), "config.json").rope_scaling == YarnScaling(4.0, 32)
