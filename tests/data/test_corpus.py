"""The embedded corpus, on a tiny standard library of its own."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from dtron.data import corpus
from dtron.data.corpus import TokenDataset, is_held_out, load_stdlib, prepare_stdlib, read_sources, unigram_entropy
from dtron.errors import UserError

TESTS = ["json/tests/test_x.py", "test/test_abc.py", "idlelib/idle_test/a.py"]
OUTSIDE = [
    "site-packages/json/a.py",
    "dist-packages/abc.py",
    "sitecustomize.py",
    "config-3.11/abc.py",
    "__pycache__/abc.py",
]
MODULES = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))[:60]
HELD_OUT_WORD = "zyzzyvazyzzyva"


def silent(_):
    pass


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """60 small modules of a standard library; those held out repeat a word the others lack."""
    root = tmp_path_factory.mktemp("stdlib")
    for number, name in enumerate(MODULES):
        lines = [f"def {name}_{i}(x):\n    return x * {i * number} + {name!r}.count('é')\n" for i in range(20)]
        extra = HELD_OUT_WORD * 50 if is_held_out(f"{name}.py") else ""
        (root / f"{name}.py").write_text("\n".join(lines) + extra, encoding="utf-8")
    for path in ("json/decoder.py", "json/data.txt", *TESTS, *OUTSIDE):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("import this\n" * 20)
    (root / "zipfile.py").write_bytes(b"latin = '\xe9\xff'\n" * 5)
    return root


def load(cache, source, split="train", **kwargs):
    kwargs = {"vocab_size": 400, "log": silent} | kwargs
    return load_stdlib(cache, 16, split, source=source, **kwargs)


def texts_of(source, held_out):
    sources = read_sources(source)
    return [text.decode("utf-8", errors="replace") for name, text in sources.items() if is_held_out(name) == held_out]


@pytest.fixture(scope="module")
def cache(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    load(folder, source)
    return folder


def test_sources_are_the_library_and_nothing_else(source):
    names = list(read_sources(source))
    assert names == sorted([*(f"{name}.py" for name in MODULES), "json/decoder.py", "zipfile.py"])


def test_real_standard_library():
    sources = read_sources()
    assert {"abc.py", "json/decoder.py", "email/message.py"} <= sources.keys()
    assert sum(map(len, sources.values())) > 5_000_000
    outside = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [name for name in sources if outside.intersection(name.split("/"))]
    assert 0.02 < np.mean([is_held_out(name) for name in sources]) < 0.09


def test_no_sources_is_the_users_error(tmp_path):
    for missing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="no sources of the standard library"):
            load(tmp_path, missing)


def test_text_survives_and_files_are_marked(cache, source):
    tokenizer = Tokenizer.from_file(load(cache, source).tokenizer_json)
    for split in ("train", "validation"):
        dataset = load(cache, source, split)
        texts = texts_of(source, held_out=split == "validation")
        assert len(texts) > 1
        text = tokenizer.decode(dataset.tokens.tolist(), skip_special_tokens=False)
        assert text == "".join(t + corpus.END_OF_TEXT for t in texts)
        assert isinstance(dataset.tokens, np.memmap) and dataset.tokens.dtype == np.uint16
        assert dataset.tokens.max() < dataset.vocab_size == 400
    assert "\ufffd" in tokenizer.decode(load(cache, source).tokens.tolist())  # of the file that is not UTF-8


def test_held_out_text_shapes_nothing(cache, source, tmp_path):
    train, validation = load(cache, source), load(cache, source, "validation")
    tokenizer = Tokenizer.from_file(train.tokenizer_json)
    assert HELD_OUT_WORD in tokenizer.decode(validation.tokens.tolist())
    assert HELD_OUT_WORD not in tokenizer.decode(train.tokens.tolist())
    changed = shutil.copytree(source, tmp_path / "changed")
    held_out = next(path for path in changed.glob("*.py") if is_held_out(path.name))
    held_out.write_text("something_else = 'entirely'\n" * 50)
    other = load(tmp_path, changed)
    assert other.tokenizer_json != train.tokenizer_json  # the cache knows that the sources differ
    assert Tokenizer.from_file(other.tokenizer_json).to_str() == tokenizer.to_str()
    assert other.fingerprint == train.fingerprint
    assert load(tmp_path, changed, "validation").fingerprint != validation.fingerprint


def test_preparation_is_deterministic_however_many_threads(source, tmp_path):
    code = (
        "import sys; from dtron.data.corpus import prepare_stdlib as p;"
        "f = p(sys.argv[1], vocab_size=400, source=sys.argv[2], log=lambda _: None);"
        "print(*[(f / n).read_bytes().hex() for n in ('tokenizer.json', 'train.npy', 'validation.npy', 'meta.json')])"
    )
    results = set()
    for threads in ("1", "4"):
        settings = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", code, str(tmp_path / threads), str(source)]
        results.add(subprocess.run(command, env=os.environ | settings, check=True, capture_output=True).stdout)
    assert len(results) == 1 and len(results.pop()) > 1000


def test_cache_is_reused_and_keyed(source, tmp_path, monkeypatch):
    first = load(tmp_path, source, "validation")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_build", None)
        assert load(tmp_path, source, "validation").fingerprint == first.fingerprint
    load(tmp_path, source, vocab_size=300)
    assert len(os.listdir(tmp_path)) == 2
    changed = shutil.copytree(source, tmp_path / "changed")
    (changed / "zipfile.py").write_text((changed / "zipfile.py").read_text("latin-1").replace("l", "m"), "latin-1")
    load(tmp_path, changed)  # sources of the same names and sizes
    assert len(os.listdir(tmp_path)) == 4


def test_progress_is_told(source, tmp_path):
    lines = []
    load(tmp_path, source, log=lines.append)
    assert any("tokenizing the standard library (train)" in line for line in lines)
    assert lines[-1].endswith(f"{sum(map(is_held_out, read_sources(source)))} files")


@pytest.mark.parametrize("where", ["train_bpe", "encode_files", "vocabulary"])
def test_interrupted_preparation_leaves_nothing(source, tmp_path, monkeypatch, where):
    calls = []

    def interrupted(*args):
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, source)
    assert calls and os.listdir(tmp_path) == []
    monkeypatch.undo()
    assert len(load(tmp_path, source)) > 10


def _die_while_building(cache, source):
    def die(*args):
        os._exit(9)

    corpus._build = lambda folder, *args: ((folder / "train.npy").write_bytes(b"half"), die())
    load(cache, source)


def test_killed_preparation_is_made_anew(source, tmp_path, cache):
    child = multiprocessing.get_context("spawn").Process(target=_die_while_building, args=(tmp_path, source))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert [name.startswith(".partial-") for name in os.listdir(tmp_path)] == [True]
    assert load(tmp_path, source).fingerprint == load(cache, source).fingerprint


def _build_together(cache, source, barrier):
    replace = os.replace

    def meet_and_replace(*args):  # both have built before either moves its folder into place
        barrier.wait(60)
        replace(*args)

    corpus.os.replace = meet_and_replace
    load(cache, source)


def test_processes_may_race(source, tmp_path, cache):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    children = [context.Process(target=_build_together, args=(tmp_path, source, barrier)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert len(os.listdir(tmp_path)) == 1 and os.listdir(tmp_path)[0] in os.listdir(cache)
    assert load(tmp_path, source).fingerprint == load(cache, source).fingerprint


def test_unwritable_cache_is_the_users_error(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="job.cache_folder"):
        load(tmp_path / "file" / "cache", source)


# --- the user's own tokenizer


@pytest.fixture
def assets(tmp_path):
    """A folder with a tokenizer whose ids have a hole, that truncates and pads."""
    tokenizer = corpus.train_bpe(["def f(x): return x"] * 9, 300)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"]["<s>"] = 70000
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 70000, "content": "<s>"})
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9999}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    return folder


def test_own_tokenizer_is_used_whole(assets, source, tmp_path):
    marked = shutil.copytree(source, tmp_path / "marked")
    for path in marked.glob("*.py"):
        path.write_bytes(path.read_bytes() + b"# <s> of HTML\n")
    dataset = load(tmp_path, marked, hf_assets_path=str(assets))
    assert dataset.vocab_size == 70001 and dataset.tokens.dtype == np.uint32
    assert 70000 not in dataset.tokens
    text = Tokenizer.from_file(dataset.tokenizer_json).decode(dataset.tokens.tolist(), skip_special_tokens=False)
    assert text == "".join(t + "<|endoftext|>" for t in texts_of(marked, held_out=False))


def test_tokens_are_cached_by_tokenizer(assets, source, tmp_path):
    one = prepare_stdlib(tmp_path / "cache", str(assets), log=silent, source=source)
    assert prepare_stdlib(tmp_path / "cache", str(assets), log=silent, source=source) == one
    corpus.train_bpe(["another text"] * 9, 270).save(str(assets / "tokenizer.json"))
    assert prepare_stdlib(tmp_path / "cache", str(assets), log=silent, source=source) != one


def test_tokenizer_in_another_format(source, tmp_path):
    """vocab.json and merges.txt, as GPT-2 has them, are read through transformers."""
    folder = tmp_path / "assets"
    folder.mkdir()
    trained = corpus.train_bpe(["def f(x): return x"] * 9, 270)
    trained.model.save(str(folder))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    dataset = load(tmp_path, source, hf_assets_path=str(folder))
    assert dataset.tokens.dtype == np.uint16
    trained.encode_special_tokens = True
    first = trained.encode(texts_of(source, held_out=False)[0]).ids
    assert len(first) > 100 and dataset.tokens[: len(first)].tolist() == first


def test_wrong_assets_are_the_users_error(assets, source, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, message in ((tmp_path / "absent", "is not a folder"), (empty, "no readable tokenizer")):
        with pytest.raises(UserError, match=f"model.hf_assets_path = .*{message}"):
            load(tmp_path, source, hf_assets_path=str(folder))
    (assets / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(UserError, match="no end-of-text token '<nowhere>'"):
        load(tmp_path, source, hf_assets_path=str(assets))
    (assets / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no readable tokenizer"):
        load(tmp_path, source, hf_assets_path=str(assets))


def test_vocabulary_without_room_for_bytes_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="256 tokens"):
        load(tmp_path, source, vocab_size=256)


# --- sequences


def test_sequences_share_only_their_border():
    dataset = TokenDataset(np.arange(100, 131, dtype=np.uint16), 10, vocab_size=200)
    assert len(dataset) == 3  # 31 tokens: three times ten, and the last label
    labels = []
    for i in range(3):
        x, y = dataset[i]
        assert x.dtype == y.dtype == np.int64 and x.tolist() == list(range(100 + 10 * i, 110 + 10 * i))
        labels += y.tolist()
    assert labels == list(range(101, 131))
    for bad in (-1, 3):
        with pytest.raises(IndexError):
            dataset[bad]
    assert len(TokenDataset(np.arange(30, dtype=np.uint16), 10, vocab_size=200)) == 2


def test_too_few_tokens_are_the_users_error():
    TokenDataset(np.zeros(11, np.uint16), 10, vocab_size=1)
    with pytest.raises(UserError, match="has 10 tokens, but one sequence of seq_len = 10 needs 11"):
        TokenDataset(np.zeros(10, np.uint16), 10, vocab_size=1)


def test_unigram_entropy():
    assert unigram_entropy(np.array([3, 3, 3], np.uint16)) == 0
    assert unigram_entropy(np.array([0, 9, 70000, 5], np.uint32)) == pytest.approx(np.log(4))
    tokens = np.array([1, 1, 1, 2], np.uint16)
    assert unigram_entropy(tokens) == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert TokenDataset(tokens, 2, vocab_size=3).unigram_entropy == pytest.approx(unigram_entropy(tokens))
