"""What lies beside the weights in a run's checkpoints."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hf.models import save_random
from safetensors.torch import load_file
from tinyrun import quiet_world, tiny_setup, train_tiny
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.distributed.tensor import DTensor

from dtron.checkpoint.files import Manifest, Progress
from dtron.checkpoint.save import named_tensors, write_checkpoint
from dtron.checkpoint.storage import StoragePath
from dtron.config import load
from dtron.data.tokenizer import TextEncoder, train_bpe
from dtron.errors import UserError
from dtron.mesh import Mesh
from dtron.models.hf import hf_dimensions
from dtron.parallel.compose import parallelize
from dtron.ranks.agree import from_all_ranks
from dtron.registry import cross_entropy
from dtron.train.assets import model_assets
from dtron.train.initial import check_vocabulary, load_weights
from dtron.train.optimizer import build_optimizers
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


# --- more tokens, more rows


def extended(encoder: TextEncoder, *tokens: str) -> TextEncoder:
    tokenizer = Tokenizer.from_str(encoder.json)
    tokenizer.add_tokens(list(tokens))
    return TextEncoder(tokenizer.to_str(), encoder.eos)


def checked(folder: str, cache: str, json_: str, eos: str) -> list[str]:
    """What rank 0 is told of a data set's tokenizer."""
    config = load(["--checkpoint.initial_load_path", folder, "--job.cache_folder", cache])
    _, said = quiet_world()
    check_vocabulary(config, Data(TextEncoder(json_, eos)))
    return said


def test_a_tokenizer_may_add_tokens_but_none_may_be_lost_or_moved(ranks: Any, tmp_path: Path) -> None:
    encoder = train_bpe(TEXT, 300)
    folder, more = weights(tmp_path / "weights", encoder), extended(encoder, "<|user|>", "<|bot|>")
    assert more.vocab_size == encoder.vocab_size + 2
    (line,) = ranks.run(2, checked, str(folder), str(tmp_path), more.json, more.eos)[0]
    first = f"2 tokens more than that in {folder}, from '<|user|>' (id {encoder.vocab_size}) on; the old ones agree"
    assert first in line
    more.save(folder)
    swapped = extended(encoder, "<|bot|>", "<|user|>")
    for other in (encoder, train_bpe(TEXT, 280), swapped):
        with pytest.raises(Exception, match=r"another vocabulary .* or with one that adds tokens to it"):
            ranks.run(2, checked, str(folder), str(tmp_path), other.json, other.eos)


GROWN = (
    "--model.n_layers 3 --model.dim 64 --model.n_heads 8 --model.n_kv_heads 4 --model.ffn_dim 96 --training.seq_len 16 "
    "--model.vocab_size 352 --training.mixed_precision_param float32 --debug.seed 5"
)


def loaded(source: str, layout: str) -> tuple[dict[str, Any], list[str]]:
    """Weights and optimizer state of a fresh run of 352 rows, whole, as rank 0 has them, and what it is told."""
    world, said = quiet_world()
    made = tiny_setup(f"{GROWN} {layout} --checkpoint.initial_load_path {source}")
    mesh = Mesh(made.degrees, "cpu")
    model = parallelize(made.spec, made.model_config, made.config, mesh, torch.device("cpu"), cross_entropy, [])
    optimizers = None
    if not made.config.checkpoint.initial_load_model_only:
        optimizers = build_optimizers(model, made.config.optimizer)
    load_weights(made, model, optimizers)
    whole = {n: whole_tensor(x).numpy() for n, x, _ in named_tensors(model, optimizers)}
    everyones = from_all_ranks(whole)  # a pipeline's stages have some each
    return {name: x for part in everyones for name, x in part.items()}, said


def whole_tensor(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("tied", [False, True])
def test_more_rows_keep_the_old_and_initialize_the_new_on_every_layout(tied: bool, ranks: Any, tmp_path: Path) -> None:
    """From Hugging Face, and from a checkpoint with AdamW's state, whose new rows are 0."""
    folder = save_random("Llama-3.2-1B" if tied else "Meta-Llama-3-8B", tmp_path / "hf")
    old = load_file(folder / "model.safetensors")
    theirs = f"--model.hf_config_path {folder}"
    fresh, _ = ranks.run(1, loaded, str(folder), f"{theirs} --checkpoint.exclude_from_loading *")[0]
    grown = {"model.embed_tokens.weight": "model.embed_tokens.weight", "model.lm_head.weight": "lm_head.weight"}
    grown = {name: stored for name, stored in grown.items() if stored in old}
    results = {
        (world, layout): ranks.run(world, loaded, str(folder), f"{theirs} {layout}")[0]
        for world, layout in ((1, ""), (4, "--tp 2"), (3, ""), (2, "--pp 2"))
    }
    for tensors, said in results.values():
        for name, stored in grown.items():
            assert tensors[name].shape == (352, 64)
            assert np.array_equal(tensors[name][:320], old[stored].numpy())
            assert np.array_equal(tensors[name][320:], fresh[name][320:]) and fresh[name][320:].std() > 0.01
            word = f"{name.removeprefix('model.')} has 320 rows in the initial weights and 352 here (model.vocab_size)"
            assert any(word in line for line in said), said
        assert all(np.array_equal(x, results[1, ""][0][name]) for name, x in tensors.items())
    # The dtron checkpoint of the old size.
    tensors = {f"model.{name.removeprefix('model.')}": tensor for name, tensor in old.items()}
    state = {
        f"optimizer.{n.removeprefix('model.')}.{k}": torch.ones_like(x)
        for n, x in tensors.items()
        for k in ("exp_avg", "exp_avg_sq")
    }
    steps = {f"optimizer.{n.removeprefix('model.')}.step": torch.tensor(3.0) for n in tensors}
    ranks.run(1, write, str(tmp_path / "step-3"), tensors | state | steps)
    for world, layout in ((1, ""), (4, "--tp 2")):
        arguments = f"{theirs} {layout} --checkpoint.no_initial_load_model_only"
        found, _ = ranks.run(world, loaded, str(tmp_path / "step-3"), arguments)[0]
        assert all(np.array_equal(x, results[1, ""][0][name]) for name, x in found.items() if name.startswith("model."))
        moment = found["optimizer.embed_tokens.weight.exp_avg"]
        assert (moment[:320] == 1).all() and (moment[320:] == 0).all() and moment.shape == (352, 64)


def test_more_rows_of_a_head_with_a_bias_and_of_a_model_with_fused_projections(ranks: Any, tmp_path: Path) -> None:
    for name, kv_heads, stored in (("phi-2", 8, "lm_head.bias"), ("Phi-4", 4, "model.embed_tokens.weight")):
        folder = save_random(name, tmp_path / name)
        layout = f"--tp 2 --model.hf_config_path {folder}"
        tensors, _ = ranks.run(2, loaded, str(folder), f"{layout} --model.n_kv_heads {kv_heads}")[0]
        grown = tensors["model." + stored.removeprefix("model.")]
        assert len(grown) == 352 and np.array_equal(
            grown[:320], load_file(folder / "model.safetensors")[stored].numpy()
        )


def write(folder: str, tensors: dict[str, Any]) -> None:
    write_checkpoint(StoragePath.at(folder), tensors, Manifest(Progress(step=3), {}), {})


def fails_to_load(source: str, arguments: str) -> str:
    with pytest.raises(UserError) as error:
        loaded(source, arguments)
    return str(error.value)


def test_rows_do_not_grow_where_that_is_not_asked_for(ranks: Any, tmp_path: Path) -> None:
    folder = save_random("Meta-Llama-3-8B", tmp_path / "hf")
    theirs = f"--model.hf_config_path {folder}"
    fewer = ranks.run(1, fails_to_load, str(folder), f"{theirs} --model.vocab_size 288")[0]
    assert "model.embed_tokens.weight is [320, 64] there and [288, 64] in the model" in fewer
    evaluated = f"{theirs} --validation.only --validation.dataset tiny_counting"
    assert "[320, 64] there and [352, 64]" in ranks.run(1, fails_to_load, str(folder), evaluated)[0]


# --- files beside the weights that were lost or altered


def trained(folder: str, steps: int, arguments: str = "") -> list[str]:
    return train_tiny(folder, steps, f"--checkpoint.interval 2 --lr_scheduler.warmup_steps 0 {arguments}")[1]


@pytest.mark.parametrize("how", ["lost", "lost everywhere", "altered", "broken"])
def test_a_resume_needs_no_small_file_and_the_next_checkpoint_has_it_again(
    ranks: Any, tmp_path: Path, how: str
) -> None:
    ranks.run(2, trained, str(tmp_path), 4)
    (newest,) = tmp_path.glob("*/checkpoint/step-4")
    file, written = newest / "config.json", (newest / "config.json").read_bytes()
    if how.startswith("lost"):
        file.unlink()
    else:
        file.write_bytes(written.replace(b"96", b"97") if how == "altered" else b"{")
    mine = file.read_bytes() if file.exists() else written
    if how == "lost everywhere":
        (newest.with_name("step-2") / "config.json").unlink()
    said = ranks.run(2, trained, str(tmp_path), 6)[0]
    (warning,) = [line for line in said if line.startswith("warning")]
    assert "step-4: config.json " in warning and "its tensors are whole, and no more is needed" in warning
    assert any(line.endswith("checkpoint/step-4") for line in said if line.startswith("resuming from"))
    assert json.loads((newest.with_name("step-6") / "config.json").read_bytes()) == json.loads(written)
    if how == "lost everywhere":
        assert not file.exists()
    else:
        assert file.read_bytes() == mine, "written again where it is lost, left where its user may have edited it"
    said = ranks.run(2, trained, str(tmp_path), 8, "--checkpoint.keep_latest_k 1")[0]
    assert not any(line.startswith("warning") for line in said), "a lost file is no hindrance to deleting either"
    assert [path.name for path in newest.parent.iterdir()] == ["step-8"]


def test_a_lost_tokenizer_is_taken_from_the_data(tmp_path: Path) -> None:
    encoder = train_bpe(TEXT, 300)
    made = setup("--model.name", "llama3.2")
    whole = model_assets(made, None, Data(encoder))
    files = {name: (len(content), zlib.crc32(content)) for name, content in whole.items()}
    for lost in [*([name] for name in whole), list(whole)]:
        folder = tmp_path / "-".join(lost) / "step-1"
        folder.mkdir(parents=True)
        (folder / "dtron.json").write_bytes(Manifest(Progress(step=1), files).to_json())
        for name in whole.keys() - set(lost):
            (folder / name).write_bytes(whole[name])
        assert model_assets(made, StoragePath.at(folder), Data(encoder)) == whole
