"""What lies beside the weights in a run's checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf.models import save_random
from safetensors.torch import load_file
from tinyrun import train_tiny
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from dtron.checkpoint.storage import StoragePath
from dtron.config import load
from dtron.data.tokenizer import TextEncoder, train_bpe
from dtron.models.hf import hf_dimensions
from dtron.train.assets import model_assets
from dtron.train.initial import check_vocabulary
from dtron.train.resolve import resolve
from dtron.train.setup import Setup

TEXT = ["the quick brown fox jumps over the lazy dog"] * 40
SIZES = "--model.dim 64 --model.n_layers 2 --model.n_heads 4 --model.n_kv_heads 2 --model.ffn_dim 96"
SIZES += " --model.vocab_size 320 --training.seq_len 48 --training.device cpu"


class Data:
    """A data set with a tokenizer."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder


def setup(*arguments: str) -> Setup:
    return resolve(load([*SIZES.split(), *arguments]), 1)


def weights(folder: Path, encoder: TextEncoder) -> Path:
    save_random("Llama-3.1-8B", folder)
    encoder.save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_fresh_run_describes_itself_and_carries_its_tokenizer() -> None:
    encoder = train_bpe(TEXT, 300)
    made = setup("--model.name", "llama3.2")
    assets = model_assets(made, None, Data(encoder))
    config = json.loads(assets["config.json"])
    assert hf_dimensions(config, "") == made.model_config
    assert config["eos_token_id"] == encoder.eos_id and config["max_position_embeddings"] == 8192
    assert TextEncoder(assets["tokenizer.json"].decode(), encoder.eos).fingerprint == encoder.fingerprint
    assert json.loads(assets["tokenizer_config.json"])["eos_token"] == encoder.eos
    without = model_assets(setup(), None, object())
    assert without.keys() == {"config.json"}
    assert json.loads(without["config.json"])["max_position_embeddings"] == 48


def test_what_came_with_the_weights_is_kept_while_it_holds(tmp_path: Path) -> None:
    encoder, other = train_bpe(TEXT, 300), train_bpe([*TEXT, *["zebra"] * 99], 300)
    folder = weights(tmp_path / "weights", encoder)
    same = setup("--model.hf_config_path", str(folder), "--model.n_layers", "3", *["--model.n_kv_heads", "4"],
                 *["--model.n_heads", "8"])  # fmt: skip
    given = {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" not in path.name}
    assert model_assets(same, StoragePath.at(folder), Data(encoder)) == given
    assert model_assets(same, StoragePath.at(folder), object()) == given
    # Another rotary base: a config.json of its own, with the ids of the tokenizer that stays.
    longer = setup("--model.hf_config_path", str(folder), "--model.n_layers", "3", *["--model.n_kv_heads", "4"],
                   *["--model.n_heads", "8", "--model.rope_theta", "9e6"])  # fmt: skip
    changed = model_assets(longer, StoragePath.at(folder), Data(encoder))
    config = json.loads(changed["config.json"])
    assert config["bos_token_id"] == 1 and hf_dimensions(config, "").rope_theta == 9e6
    assert {**changed, "config.json": b""} == {**given, "config.json": b""}
    # Another tokenizer: nothing of the old one stays.
    assert model_assets(same, StoragePath.at(folder), Data(other)).keys() == {
        "config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert model_assets(same, StoragePath.at(tmp_path / "gone"), Data(encoder)).keys() == {
        "config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_the_tokenizer_begins_texts_as_the_documents_of_the_run_begin(tmp_path: Path) -> None:
    """Whatever that of the initial weights, or of a checkpoint of an earlier version, does."""
    plain = train_bpe(TEXT, 300)
    tokenizer = Tokenizer.from_str(plain.json)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", tokenizer.token_to_id("<s>"))])
    begins = TextEncoder(tokenizer.to_str(), plain.eos)
    without = TextEncoder(begins.json, plain.eos, add_special_tokens=False)
    folder = weights(tmp_path / "weights", begins)
    sizes = ["--model.hf_config_path", str(folder), "--model.n_layers", "3", "--model.n_kv_heads", "4"]
    made, source = setup(*sizes, "--model.n_heads", "8"), StoragePath.at(folder)
    given = {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" not in path.name}
    assert model_assets(made, source, Data(begins)) == given
    changed = model_assets(made, source, Data(without))
    assert TextEncoder(changed["tokenizer.json"].decode(), plain.eos).encode_prompt("the")[0] != begins.begins_with[0]
    assert changed | {"tokenizer.json": b""} == given | {"tokenizer.json": b""}
    for encoder, bos_id in ((begins, begins.begins_with[0]), (without, None)):
        config = json.loads(model_assets(setup(), None, Data(encoder))["config.json"])
        assert config["bos_token_id"] == bos_id


def test_models_that_hugging_face_does_not_know_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup()
    unknown = dataclasses.replace(made, spec=dataclasses.replace(made.spec, hf_config=None))
    assert model_assets(unknown, None, object()) == {}


def finished_and_then_exported(folder: str) -> list[str]:
    """What rank 0 is told by a finished run that is started again with last_save_in_hf."""
    train_tiny(folder, 2, "")
    exported = "--checkpoint.last_save_in_hf --checkpoint.export_dtype bfloat16"
    trainer, said = train_tiny(folder, 2, exported)
    dist.barrier()
    assert sorted(path.name for path in (trainer.run_folder / "hf").iterdir()) == ["step-2"]
    return [line for line in said + train_tiny(folder, 2, exported)[1] if "Hugging Face" in line]


def test_a_finished_run_is_exported_when_asked_for_it_later(ranks: Any, tmp_path: Path) -> None:
    (told,) = ranks.run(2, finished_and_then_exported, str(tmp_path))[0]
    weights = load_file(Path(told.split(" in ", 1)[1]) / "model.safetensors")
    assert weights["lm_head.weight"].shape == (96, 16) and weights["lm_head.weight"].dtype == torch.bfloat16


def vocabulary(config: Any, data: Any) -> None:
    check_vocabulary(config, data)


def test_another_vocabulary_is_refused_unless_the_embeddings_are_new(ranks: Any, tmp_path: Path) -> None:
    encoder, other = train_bpe(TEXT, 300), train_bpe([*TEXT, *["zebra"] * 99], 300)
    folder = weights(tmp_path / "weights", encoder)
    config = load(["--checkpoint.initial_load_path", str(folder), "--job.cache_folder", str(tmp_path)])
    ranks.run(2, vocabulary, config, Data(encoder))
    ranks.run(2, vocabulary, config, object())
    with pytest.raises(
        Exception, match=r"the data was tokenized with another vocabulary .* \(id \d+ is .* in the data"
    ):
        ranks.run(2, vocabulary, config, Data(other))
    # The weights' tokenizer as GPT-2 has it.
    (folder / "tokenizer.json").unlink()
    Tokenizer.from_str(encoder.json).model.save(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    ranks.run(1, vocabulary, config, Data(encoder))
    with pytest.raises(Exception, match="the data was tokenized with another vocabulary"):
        ranks.run(1, vocabulary, config, Data(other))
    new = ["--checkpoint.exclude_from_loading", "embed_tokens.*", "lm_head.*"]
    ranks.run(2, vocabulary, load(["--checkpoint.initial_load_path", str(folder), *new]), Data(other))
