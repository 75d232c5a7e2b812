"""The embedded corpus, on a tiny standard library of its own."""

import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from dtron.data import corpus, prepare
from dtron.data.corpus import StdlibSource, is_held_out, load_stdlib, prepare_stdlib, read_sources
from dtron.data.tokenizer import END_OF_TEXT, train_bpe
from dtron.errors import UserError

TESTS = ["json/tests/test_x.py", "test/test_abc.py", "idlelib/idle_test/a.py"]
TABLES = ["encodings/cp037.py", "pydoc_data/topics.py", "html/entities.py", "stringprep.py", "locale.py"]
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
    for path in ("json/decoder.py", "json/data.txt", *TESTS, *TABLES, *OUTSIDE):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("import this\n" * 20)
    (root / "zipfile.py").write_bytes(b"latin = '\xe9\xff'\r\n" * 5)
    return root


def load(cache, source, split="train", **kwargs):
    kwargs = {"vocab_size": 400, "log": silent} | kwargs
    return load_stdlib(cache, 16, split, source=source, **kwargs)


def texts_of(source, held_out):
    sources = read_sources(source)
    return [
        path.read_bytes().decode(errors="replace") for name, path in sources.items() if is_held_out(name) == held_out
    ]


def tokens_of(dataset):
    return dataset.store.read(0, dataset.store.n_tokens)


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
    assert sum(path.stat().st_size for path in sources.values()) > 5_000_000
    literal = re.compile(r"^\s*[\[({]?\s*[urb]*(['\"(]|-?\d|\\\\x)(?!\"\")")
    for name, path in sources.items():  # no table is left: a file of which more than half is rows of literals
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        rows = sum(len(line) for line in lines if literal.match(line))
        assert rows <= max(3000, sum(map(len, lines)) / 2), name
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
        tokens = tokens_of(dataset)
        assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == "".join(t + END_OF_TEXT for t in texts)
        assert tokens.dtype == np.uint16 and tokens.max() < dataset.vocab_size == 400
        assert dataset.store.n_documents == len(texts)
    assert "\ufffd'\r\n" in tokenizer.decode(tokens_of(load(cache, source)).tolist())  # of the file that is not UTF-8


def test_held_out_text_shapes_nothing(cache, source, tmp_path):
    train, validation = load(cache, source), load(cache, source, "validation")
    tokenizer = Tokenizer.from_file(train.tokenizer_json)
    assert HELD_OUT_WORD in tokenizer.decode(tokens_of(validation).tolist())
    assert HELD_OUT_WORD not in tokenizer.decode(tokens_of(train).tolist())
    changed = shutil.copytree(source, tmp_path / "changed")
    held_out = next(path for name, path in read_sources(changed).items() if is_held_out(name))
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
        "print(*[p.name + p.read_bytes().hex() for p in sorted(f.rglob('*.*'))])"
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
        patch.setattr(corpus, "prepare", None)
        assert load(tmp_path, source, "validation").fingerprint == first.fingerprint
    load(tmp_path, source, vocab_size=300)
    assert len(os.listdir(tmp_path)) == 2
    changed = shutil.copytree(source, tmp_path / "changed")
    (changed / "zipfile.py").write_bytes((changed / "zipfile.py").read_bytes().replace(b"l", b"m"))
    load(tmp_path, changed)  # sources of the same names and sizes
    assert len(os.listdir(tmp_path)) == 4


def test_progress_is_told(source, tmp_path):
    lines = []
    load(tmp_path, source, log=lines.append)
    assert any("tokenizing the standard library (train)" in line for line in lines)
    assert f"(validation): {sum(map(is_held_out, read_sources(source)))} documents" in lines[-1]


@pytest.mark.parametrize("where", ["train_bpe", "prepare", "open_store"])
def test_interrupted_preparation_leaves_nothing(source, tmp_path, monkeypatch, where):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare if where == "open_store" else corpus, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, source)
    assert calls and os.listdir(tmp_path) == []
    monkeypatch.undo()
    assert len(load(tmp_path, source)) > 10


def _die_while_building(cache, source):
    def die(*args):
        os._exit(9)

    prepare.open_store = die  # once the training split is whole
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

    def meet_and_replace(old, new):  # both have built before either moves its folder into place
        if new.name.startswith("stdlib-"):
            barrier.wait(60)
        replace(old, new)

    os.replace = meet_and_replace
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


def test_own_tokenizer_is_used(source, tmp_path):
    own = train_bpe(["def f(x): return x"] * 9, 280)
    (assets := tmp_path / "assets").mkdir()
    own.save(assets)
    dataset = load(tmp_path / "cache", source, hf_assets_path=str(assets))
    assert dataset.tokenizer_fingerprint == own.fingerprint and dataset.vocab_size == own.vocab_size < 400
    one = prepare_stdlib(tmp_path / "cache", str(assets), log=silent, source=source)
    assert dataset.store.folder == one / "train"
    train_bpe(["another text"] * 9, 270).save(assets)
    assert prepare_stdlib(tmp_path / "cache", str(assets), log=silent, source=source) != one
    with pytest.raises(UserError, match="model.hf_assets_path = .* is no local file or folder"):
        load(tmp_path / "cache", source, hf_assets_path=str(tmp_path / "absent"))


def test_documents_of_a_sequence_are_known(cache, source):
    dataset = load(cache, source, documents=True)
    firsts = [i for i in range(len(dataset)) if (dataset[i][2] > 0).any()]
    assert 0 < len(firsts) < dataset.store.n_documents
    for i in firsts:
        inputs, _, documents = dataset[i]
        begin = documents.max()
        assert documents[begin] == begin and inputs[begin - 1] == dataset.store.eos_id
    assert len(load(cache, source)[0]) == 2


def test_it_is_a_source_like_any_other(source):
    train = StdlibSource.open("train", source)
    assert [*train.texts()] == texts_of(source, held_out=False)
    for file in (0, train.n_files - 1):
        reader = train.read(file)
        assert len([*reader]) == 1 and [*train.read(file, reader.state())] == []
    assert pickle.loads(pickle.dumps(train)) == train
    assert len({train.fingerprint, StdlibSource.open("validation", source).fingerprint}) == 2


def test_vocabulary_without_room_for_bytes_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="256 tokens"):
        load(tmp_path, source, vocab_size=256)
