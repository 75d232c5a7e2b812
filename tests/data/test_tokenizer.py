"""Texts as token ids."""

import base64
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer

from dtron.data import tokenizer
from dtron.data.tokenizer import END_OF_TEXT, TextEncoder, read_tokenizer, train_bpe
from dtron.errors import UserError

TEXTS = ["def f(x):\n    return x\n", "", "naïve <|endoftext|> \U0001f40d " * 9]


@pytest.fixture(scope="module")
def encoder():
    return train_bpe(TEXTS * 9, 280)


@pytest.fixture
def assets(encoder, tmp_path):
    """A folder with a tokenizer whose ids have a hole, that truncates and pads."""
    content = json.loads(encoder.json)
    content["model"]["vocab"]["<s>"] = 70000
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 70000, "content": "<s>"})
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9999}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT}
    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    return folder


def read(name, cache="/nonexistent"):
    return read_tokenizer(str(name), cache, "--tokenizer")


def test_documents_end_in_eos_and_spell_their_text(encoder):
    documents = encoder.encode(TEXTS)
    for text, ids in zip(TEXTS, documents, strict=True):
        assert ids.dtype == encoder.dtype == np.uint16 and ids.max() < encoder.vocab_size == 280
        assert ids.tolist().count(encoder.eos_id) == 1 and ids[-1] == encoder.eos_id  # not the one the text spells
        assert encoder.decode(ids[:-1]) == text
    assert encoder.encode([]) == []


def test_long_documents_are_cut_where_it_matters_least(encoder, monkeypatch):
    text = "".join(f"word{i} and more\n" for i in range(300))
    whole, short = encoder.encode([text, "short"])
    monkeypatch.setattr(tokenizer, "PIECE", 50)
    monkeypatch.setattr(tokenizer, "BATCH", 200)
    calls = []
    batches = tokenizer._batches
    monkeypatch.setattr(tokenizer, "_batches", lambda pieces: calls.extend(found := [*batches(pieces)]) or found)
    cut, after = encoder.encode([text, "short"])
    assert cut.tolist() == whole.tolist() and after.tolist() == short.tolist()  # newlines part words anyway
    assert len(calls) > 10 and all(sum(len(piece) for _, piece in call) <= 250 for call in calls)
    assert all(len(piece) <= 50 and (piece[-1] == "\n" or piece == "short") for call in calls for _, piece in call)
    for other, end in ((" spaced" * 40, "d"), ("x" * 130, "x"), (" " + "y" * 130, "y")):
        pieces = [*tokenizer._pieces(other)]
        assert "".join(pieces) == other and max(map(len, pieces)) <= 50 and {piece[-1] for piece in pieces} == {end}
        assert encoder.decode(encoder.encode([other])[0][:-1]) == other


def test_it_survives_pickling(encoder):
    other = pickle.loads(pickle.dumps(encoder))
    assert other.fingerprint == encoder.fingerprint
    assert [ids.tolist() for ids in other.encode(TEXTS)] == [ids.tolist() for ids in encoder.encode(TEXTS)]


def test_user_tokenizer_is_read_whole(assets):
    for given in (assets, assets / "tokenizer.json"):
        found = read(given)
        assert (found.eos, found.eos_id, found.vocab_size, found.dtype) == ("<s>", 70000, 70001, np.uint32)
    text = "a <s> of HTML, longer than eight tokens are"
    [ids] = found.encode([text])
    assert found.decode(ids) == text + "<s>" and ids.tolist().count(70000) == 1
    assert json.loads(found.json)["truncation"] is None and json.loads(found.json)["padding"] is None


def test_fingerprint_tells_tokenizers_apart(assets, encoder, tmp_path):
    first = read(assets)
    (assets / "tokenizer_config.json").unlink()
    default = read(assets)
    assert default.eos == END_OF_TEXT and default.json == first.json
    assert len({first.fingerprint, default.fingerprint, encoder.fingerprint}) == 3
    first.save(tmp_path)
    assert read(tmp_path).fingerprint == first.fingerprint
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token == "<s>"


def test_tokenizer_in_another_format(encoder, tmp_path):
    """vocab.json and merges.txt, as GPT-2 has them, are read through transformers."""
    Tokenizer.from_str(encoder.json).model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert [ids.tolist() for ids in read(tmp_path).encode(TEXTS)] == [ids.tolist() for ids in encoder.encode(TEXTS)]


def test_hub_name_is_kept_in_the_cache_folder(encoder, tmp_path, monkeypatch):
    calls = []
    encoder.save(tmp_path)
    local = transformers.AutoTokenizer.from_pretrained(tmp_path)
    fake = type("Fake", (), {"from_pretrained": lambda name, **where: calls.append((name, where)) or local})
    monkeypatch.setattr("transformers.AutoTokenizer", fake)
    for token, sent in ((None, False), ("hf_x", "hf_x")):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        assert read("some/one", tmp_path / "cache").eos == END_OF_TEXT
        where = {"cache_dir": str(tmp_path / "cache"), "token": sent, "trust_remote_code": False}
        assert calls.pop() == ("some/one", where)


def test_wrong_tokenizers_are_the_users_error(assets, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in ((tmp_path / "absent", "is no local file or folder"), (tmp_path / "empty", "no readable")):
        with pytest.raises(UserError, match=f"--tokenizer = .*{message}"):
            read(name)
    for eos in ("<nowhere>", None):
        (assets / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        with pytest.raises(UserError, match=f"no end-of-text token {eos!r}"):
            read(assets)
    for content in ("{", '{"model": 1}', "\ufeff"):
        (assets / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="--tokenizer = .*no readable tokenizer"):
            read(assets)


def plain(folder, **files):
    """A folder with a tokenizer.json of <s> and </s>, no <|endoftext|>, and with other files of JSON."""
    tokens = Tokenizer.from_str(train_bpe(TEXTS, 280).json.replace(END_OF_TEXT, "<s>"))
    tokens.add_special_tokens(["</s>"])
    folder.mkdir()
    tokens.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def added(*tokens):
    """An added_tokens_decoder, whose ids are often not those that the tokens get."""
    return {str(128000 + i): {"content": token, "special": True} for i, token in enumerate(tokens)}


BEGIN_END = {"eos_token": "<end>", "bos_token": "<begin>", "added_tokens_decoder": added("<begin>", "<end>")}
MAP = {"eos_token": "</s>"}
NAMED = {
    "as text": ({"tokenizer_config": {"eos_token": "</s>"}}, "</s>"),
    "as a token": ({"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "</s>"}}}, "</s>"),
    "added, as in torchtitan's assets": ({"tokenizer_config": BEGIN_END}, "<end>"),
    "in the map": ({"special_tokens_map": MAP}, "</s>"),
    "in the map as a token": (
        {"tokenizer_config": {}, "special_tokens_map": {"eos_token": {"content": "</s>"}}},
        "</s>",
    ),
    "in both": ({"tokenizer_config": {"eos_token": "<s>"}, "special_tokens_map": MAP}, "</s>"),
    "in both, with added tokens": (
        {"tokenizer_config": {"eos_token": "<s>", "added_tokens_decoder": {}}, "special_tokens_map": MAP},
        "<s>",
    ),
}


@pytest.mark.parametrize("how", NAMED)
def test_the_end_of_text_token_is_that_of_transformers(how, tmp_path):
    files, eos = NAMED[how]
    folder = plain(tmp_path / "t", **files)
    found, theirs = read(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (found.eos, found.eos_id) == (eos, theirs.eos_token_id) and theirs.eos_token == eos
    assert found.encode(["some text"])[0].tolist() == [*theirs("some text")["input_ids"], theirs.eos_token_id]
    found.save(tmp_path)
    assert read(tmp_path).fingerprint == found.fingerprint


def test_the_end_of_text_token_of_the_model_where_the_tokenizer_names_none(tmp_path):
    for i, (files, eos) in enumerate((
        ({"config": {"eos_token_id": 280}}, "</s>"),
        ({"config": {"eos_token_id": [0, 280]}}, "<s>"),
        ({"generation_config": {"eos_token_id": [280, 0]}, "config": {"eos_token_id": 0}}, "</s>"),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 280}}, "</s>"),
        ({"generation_config": {}, "config": {"eos_token_id": 280}, "tokenizer_config": {"eos_token": None}}, "</s>"),
    )):  # fmt: skip
        assert read(plain(tmp_path / str(i), **files)).eos == eos
    for i, files in enumerate(({}, {"config": {"eos_token_id": 999}}, {"config": {"eos_token_id": "</s>"}})):
        with pytest.raises(UserError, match="no end-of-text token None"):
            read(plain(tmp_path / f"none-{i}", **files))
    with pytest.raises(UserError, match=r"special_tokens_map.json holds a JSON list; expected an object"):
        read(plain(tmp_path / "list", special_tokens_map=[1]))


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    """transformers itself says that tiktoken is missing for a tokenizer of sentencepiece."""
    find = importlib.util.find_spec
    for content, library, absent in (
        (b"\n\x0e\n\x05<unk>", "sentencepiece", "sentencepiece"),
        (b"\n\x0e\n\x05<unk>", "sentencepiece", "google.protobuf"),
        (b"IQ== 0\nIg== 1\n", "tiktoken", "tiktoken"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, gone=absent: None if name == gone else find(name))
        with pytest.raises(UserError, match=rf"is of {library}, .* needs .*pip install 'dtron\[tokenizers\]'"):
            read(tmp_path)
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert '\ntokenizers = ["protobuf", "sentencepiece", "tiktoken"]\n' in pyproject.read_text()


def test_a_tokenizer_of_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="pip install 'dtron[tokenizers]'")
    (tmp_path / "text").write_text("\n".join(f"hello world number {i}, {i * 7} words" for i in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=330, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found, theirs = read(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert found.encode(["hello world"])[0].tolist() == [*theirs("hello world")["input_ids"], theirs.eos_token_id]
    assert found.begins_with == [theirs.bos_token_id] and found.eos == "</s>"


def test_a_tokenizer_of_tiktoken(tmp_path):
    pytest.importorskip("tiktoken", reason="pip install 'dtron[tokenizers]'")
    words = [*(bytes([i]) for i in range(256)), b"he", b"ll", b"hell", b"hello"]
    lines = (b"%s %d\n" % (base64.b64encode(word), i) for i, word in enumerate(words))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    config["added_tokens_decoder"] = {"260": {"content": "<begin>"}, "261": {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read(tmp_path).encode(["hello!"])[0].tolist() == [259, ord("!"), 261]


def test_bpe_without_room_for_bytes_is_refused():
    with pytest.raises(UserError, match="256 tokens"):
        train_bpe(TEXTS, 256)


def test_transformers_is_not_needed_for_a_tokenizer_json(assets, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert read(assets).eos == "<s>"
    (assets / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="transformers"):
        read(assets)
    assert isinstance(train_bpe(TEXTS, 260), TextEncoder)


@pytest.mark.parametrize("name", ["bpe4096", "bpe", "BPE-4096", "bpe:4k", "bpe_512"])
def test_a_mistyped_bpe_is_told_before_the_hub_is_asked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_converted", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=r"expected bpe:N .* as in --tokenizer bpe:4096"):
        read_tokenizer(name, tmp_path, "--tokenizer")
