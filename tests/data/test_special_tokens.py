"""The special tokens of a tokenizer around documents: in data of every kind, in prompts, and in what is exported."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import Ranks
from tinyrun import quiet_world
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from dtron.__main__ import main
from dtron.checkpoint.files import Progress
from dtron.config import load
from dtron.config import replace as with_key
from dtron.data.build import stdlib
from dtron.data.corpus import load_stdlib
from dtron.data.router import StreamedSource
from dtron.data.shards import MANIFEST, open_store
from dtron.data.tokenizer import TextEncoder, read_tokenizer, train_bpe
from dtron.models.llama import LlamaConfig
from dtron.train.assets import encoder_of
from dtron.train.data import RunData, open_data
from dtron.train.folder import run_identity
from dtron.train.resolve import resolve

BASE = Tokenizer.from_str(train_bpe(["the quick brown fox jumps over the lazy dog"] * 40, 300).json)
BASE.add_special_tokens(["<s>", "</s>"])
BOS, EOS = BASE.token_to_id("<s>"), BASE.token_to_id("</s>")
TEXTS = ["the quick brown fox", "", "<s> of HTML </s>"]
BYTES = processors.ByteLevel(trim_offsets=False)
# What the tokenizers of public models add: its name -> (post-processor, before, after).
KINDS = {
    "GPT-2, Qwen": (BYTES, [], []),
    "no post-processor": (None, [], []),
    "Llama 2, Gemma": ("<s> $A", ["<s>"], []),
    "Llama 3": ("bytes, <s> $A", ["<s>"], []),
    "T5": ("$A </s>", [], ["</s>"]),
    "RoBERTa": (processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS)), ["<s>"], ["</s>"]),
    "NLLB": ("$A </s> <s>", [], ["</s>", "<s>"]),
    "OPT": ("</s> $A", ["</s>"], []),
}


def tokenizer_of(kind: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(BASE.to_str())
    processor = KINDS[kind][0]
    if isinstance(processor, str):
        single = processor.removeprefix("bytes, ")
        specials = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in single]
        template = processors.TemplateProcessing(single, None, specials)
        processor = processors.Sequence([BYTES, template]) if "bytes" in KINDS[kind][0] else template
    if processor is not None:
        tokenizer.post_processor = processor
    return tokenizer


def save(folder: Path, kind: str = "Llama 3") -> Path:
    folder.mkdir()
    tokenizer_of(kind).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    return folder


def read(folder: Path, **options: Any) -> TextEncoder:
    return read_tokenizer(str(folder), folder, "--tokenizer", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_what_the_tokenizers_own_encode_adds(kind: str, tmp_path: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(save(tmp_path / "t", kind)), read(tmp_path / "t")
    _, before, after = KINDS[kind]
    document = ours.encode(TEXTS)[0].tolist()
    added = theirs(TEXTS[0])["input_ids"]
    assert document == added + ([] if "</s>" in after else [ours.eos_id])  # never twice
    assert theirs.convert_ids_to_tokens(ours.begins_with) == before
    assert theirs.convert_ids_to_tokens(ours.ends_with) == (after or ["</s>"])
    assert [ours.decode(ids) for ids in ours.encode(TEXTS)] == [
        "".join(before) + text + "".join(after or ["</s>"]) for text in TEXTS
    ]  # what a text spells is none of them
    assert ours.encode_prompt(TEXTS[0]) == document[: -len(ours.ends_with)]  # not ended before it is continued

    plain = read(tmp_path / "t", add_special_tokens=False)
    bare = theirs(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert plain.encode(TEXTS)[0].tolist() == [*bare, plain.eos_id] and plain.encode_prompt(TEXTS[0]) == bare
    assert (plain.fingerprint == ours.fingerprint) == (document == [*bare, plain.eos_id])

    for encoder, expected in ((ours, added), (plain, bare)):  # what leaves with the weights
        folder = tmp_path / f"exported-{encoder.add_special_tokens}"
        folder.mkdir()
        for name, text in encoder.files().items():
            (folder / name).write_text(text, encoding="utf-8")
        exported = AutoTokenizer.from_pretrained(folder)
        assert exported(TEXTS[0])["input_ids"] == expected and exported.eos_token == "</s>"
        assert exported.bos_token == (before[0] if before and encoder is ours else None)
        again = read(folder)
        assert (again.begins_with, again.ends_with) == (encoder.begins_with, encoder.ends_with)
        assert again.encode_prompt(TEXTS[0]) == encoder.encode_prompt(TEXTS[0])


def prepare(folder: Path, name: str, *options: str) -> Path:
    """Prepared data of TEXTS, by the tokenizer in `folder`/t."""
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 9))
    out, tokenizer = folder / name, [] if "--tokenizer" in options else ["--tokenizer", str(folder / "t")]
    source = ["prepare", str(folder / "text.jsonl"), *tokenizer, "--processes", "1"]
    assert main([*source, "--out", str(out), *options]) == 0
    return out


def of_a_version_before(prepared: Path) -> Path:
    """The folder, made without special tokens, as a version wrote it that knew nothing of them."""
    manifest = json.loads((prepared / MANIFEST).read_text())
    for key in ("add_special_tokens", "begins_with", "ends_with"):
        del manifest[key]
    (prepared / MANIFEST).write_text(json.dumps(manifest))
    return prepared


def test_prepared_data_records_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "t")
    stores = [open_store(prepare(tmp_path, name, *options)) for name, options in (
        ("with", ()), ("without", ("--no-add-special-tokens",)), ("like-with", ("--tokenizer", str(tmp_path / "with"))),
        ("like-without", ("--tokenizer", str(tmp_path / "without"))),
    )]  # fmt: skip
    old = open_store(of_a_version_before(prepare(tmp_path, "old", "--no-add-special-tokens")))
    like_old = open_store(prepare(tmp_path, "like-old", "--tokenizer", str(tmp_path / "old")))
    for store in (*stores, old, like_old):
        there = store.add_special_tokens
        assert there == ("without" not in store.folder.name and "old" not in store.folder.name)
        encoder = read(store.folder)
        assert encoder.fingerprint == store.tokenizer_fingerprint
        assert (store.begins_with, store.ends_with) == ([BOS] if there else [], [EOS])
        start, stop = store.document(0)
        assert store.read(start, stop).tolist() == encoder.encode(TEXTS)[0].tolist()
        assert (store.read(0, store.n_tokens) == BOS).sum() == (27 if there else 0)
    capsys.readouterr()
    assert main(["prepare", "--show", str(tmp_path / "with")]) == 0
    assert "documents begin with '<s>' and end with '</s>'" in capsys.readouterr().out
    # The same command for the folder of the other kind neither takes it for its own nor changes it.
    command = ["prepare", str(tmp_path / "text.jsonl"), "--tokenizer", str(tmp_path / "t"), "--out"]
    assert main([*command, str(tmp_path / "old")]) == 1
    assert "--no-add-special-tokens" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "old"), "--no-add-special-tokens"]) == 0


def test_data_of_empty_documents_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "t")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    command = ["prepare", str(tmp_path / "empty.jsonl"), "--tokenizer", str(tmp_path / "t"), "--processes", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "without any text" in capsys.readouterr().err and not (tmp_path / "out").exists()


def opened(arguments: list[str], fingerprint: str = "") -> dict[str, Any]:
    """What a run with these arguments trains on, evaluates on and exports."""
    world, _ = quiet_world()
    sizes = "--model.vocab_size 320 --training.seq_len 16 --training.local_batch_size 2 --training.device cpu"
    setup = resolve(load([*sizes.split(), *arguments]), 1)
    config = with_key(setup.config, "training.global_batch_size", 2)
    progress = Progress(data_fingerprint=fingerprint)
    data: RunData = open_data(config, 320, setup.degrees, 0, world, progress)
    encoder = encoder_of(data.first)
    tokens = np.concatenate([next(data.loader).tokens.numpy() for _ in range(8)]).ravel().tolist()
    held_out = [row for i in range(3) for row in data.held_out.dataset[i][0].tolist()] if data.held_out else []
    return {
        "streamed": isinstance(data.first, StreamedSource), "fingerprint": progress.data_fingerprint,
        "begins": tokens.count(BOS) > 0, "held_out_begins": held_out.count(BOS) > 0,
        "exported": json.loads(encoder.files()["tokenizer.json"])["post_processor"]["type"],
    }  # fmt: skip


def test_a_run_has_one_rule_for_all_of_its_data(ranks: Ranks, tmp_path: Path) -> None:
    save(tmp_path / "t")
    new, plain = prepare(tmp_path, "new"), prepare(tmp_path, "plain", "--no-add-special-tokens")
    old = of_a_version_before(prepare(tmp_path, "old", "--no-add-special-tokens"))
    text, tokenizer = str(tmp_path / "text.jsonl"), ["--model.hf_assets_path", str(tmp_path / "t")]
    cache = ["--job.cache_folder", str(tmp_path / "cache")]

    def run(dataset: str | Path, *more: str, fingerprint: str = "") -> dict[str, Any]:
        return ranks.run(1, opened, ["--training.dataset", str(dataset), *cache, *more], fingerprint)[0]

    stdlib = ["--validation.enable", "--validation.dataset", text, *tokenizer]
    assert run(new)["begins"] and not run(plain)["begins"] and not run(old)["begins"]
    # Tokenized on the fly: as the prepared data beside it, else as the tokenizer has it.
    for dataset, begins in ((new, True), (plain, False), (old, False), (text, True)):
        found = run(dataset, *stdlib)
        assert (found["begins"], found["held_out_begins"]) == (begins, begins)
        assert found["exported"] == ("Sequence" if begins else "ByteLevel")
    found = run(text, *tokenizer, "--model.no_add_special_tokens")
    assert (found["streamed"], found["begins"], found["exported"]) == (True, False, "ByteLevel")
    # A run of a version that added none, tokenized on the fly: its checkpoint goes on, and so it stays.
    assert not run(text, *tokenizer, fingerprint=found["fingerprint"])["begins"]
    assert run(text, *tokenizer, fingerprint=run(text, *tokenizer)["fingerprint"])["begins"]
    for dataset, more, said in (
        (old, ["--model.add_special_tokens"], "prepared without the special tokens .* again with --add-special-tokens"),
        (new, ["--model.no_add_special_tokens"], "prepared with the special .* again with --no-add-special-tokens"),
        (new, ["--validation.enable", "--validation.dataset", str(old)], "prepared without the special tokens"),
        (
            text,
            [*tokenizer, "--validation.enable", "--validation.dataset", str(old), "--model.add_special_tokens"],
            "prepared without the",
        ),
    ):
        with pytest.raises(Exception, match=said):
            run(dataset, *more)
    with pytest.raises(Exception, match="is not the one this run was trained on"):
        run(text, *tokenizer, fingerprint="another")


def test_the_key_is_part_of_what_makes_a_run_the_same() -> None:
    configs = [load(["--training.dataset", "stdlib", *given]) for given in ([], ["--model.no_add_special_tokens"])]
    assert len({run_identity(config, LlamaConfig(300, 32, 1, 4, 2, 64)) for config in configs}) == 2


def test_nothing_is_lost_in_a_long_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one document get no special tokens of their own."""
    encoder = read(save(tmp_path / "t"))
    whole = encoder.encode(["word by word " * 30])[0].tolist()
    monkeypatch.setattr("dtron.data.tokenizer.PIECE", 50)
    ids = encoder.encode(["word by word " * 30])[0].tolist()
    assert ids.count(BOS) == 1 and ids.count(EOS) == 1 and encoder.decode(ids) == encoder.decode(whole)


def test_the_embedded_corpus_has_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "t")
    source = tmp_path / "lib" / "json"
    source.mkdir(parents=True)
    for i in range(40):  # enough for both splits
        (source / f"m{i}.py").write_text("the quick brown fox\n" * 9)
    monkeypatch.setattr("dtron.data.build.load_stdlib", functools.partial(load_stdlib, source=tmp_path / "lib"))
    arguments = ["--model.hf_assets_path", str(tmp_path / "t"), "--job.cache_folder", str(tmp_path / "cache")]
    for given, begins in (([], True), (["--model.no_add_special_tokens"], False)):
        config = load([*arguments, *given])
        for split in ("train", "validation"):
            data = stdlib(config, config.training, split, 32, 320, lambda _: None)
            assert (BOS in data.store.read(0, data.store.n_tokens)) == begins == data.store.add_special_tokens
