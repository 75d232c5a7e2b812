"""Texts as token ids."""

import json
import pickle
import sys

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
        assert calls.pop() == ("some/one", {"cache_dir": str(tmp_path / "cache"), "token": sent})


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
