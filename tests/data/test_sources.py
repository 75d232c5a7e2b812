"""Documents of every kind of file, from every position in it, and every reading error reported."""

import csv
import gzip
import io
import itertools
import json
import os
import pickle
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch.utils.data

from dtron.data.formats import BadDocument
from dtron.data.sources import HubSource, SourceSpec, open_source
from dtron.errors import UserError

TEXTS = [f"document {i}: é✓\r\n\n  " + "word " * (i % 7) for i in range(40)] + [""]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=row["id"] % 2 == 0) + "\n" for row in rows).encode()


def table(rows):
    return pa.table({"id": [r["id"] for r in rows], "text": [r["text"] for r in rows]})


def parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(table(rows), buffer, row_group_size=9)
    return buffer.getvalue()


def arrow(make):
    def content(rows):
        buffer = io.BytesIO()
        with make(buffer, table(rows).schema) as writer:
            writer.write_table(table(rows), max_chunksize=7)
        return buffer.getvalue()

    return content


CSV = 'id,text,"a, b"\r\n1,"x, ""y""\nz",2\r\n\r\n3,é✓,4\n'


def separated(rows, delimiter=","):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["id", "text"], delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


WRITERS = {
    "a.csv": lambda rows: b"\xef\xbb\xbf" + separated(rows),
    "a.tsv": lambda rows: separated(rows, "\t"),
    "part-00000": jsonl,
    "part-00001-1b2c.c000": lambda rows: b"\n" + jsonl(rows),
    "a.jsonl.1": jsonl,
    "lines.txt": jsonl,
    "table": parquet,
    "a.jsonl": jsonl,
    "lines.json": lambda rows: b"\xef\xbb\xbf" + jsonl(rows).replace(b"\n", b"\r\n \n")[:-4],
    "array.json": lambda rows: b" \n" + json.dumps(rows, indent=1).encode(),
    "a.parquet": parquet,
    "file.arrow": arrow(pyarrow.ipc.new_file),
    "stream.arrow": arrow(pyarrow.ipc.new_stream),
}


def compress(name, content):
    if name.endswith(".gz"):
        return gzip.compress(content)
    if name.endswith(".zst"):  # two frames
        half = len(content) // 2
        return b"".join(pa.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))
    return content


def read(path, **spec):
    source = open_source(SourceSpec(str(path), **spec), "unused")
    return [text for file in range(source.n_files) for text in source.read(file)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_document_from_every_position(name, suffix, tmp_path):
    (tmp_path / (name + suffix)).write_bytes(compress(name + suffix, WRITERS[name](ROWS)))
    source = open_source(SourceSpec("data", path=str(tmp_path)), "unused")
    assert source.n_files == 1
    reader, states = source.read(0), []
    for text in TEXTS:
        states.append(json.loads(json.dumps(reader.state())))
        assert next(reader) == text
    states.append(reader.state())
    assert next(reader, None) is None
    source = pickle.loads(pickle.dumps(source))
    for start, state in enumerate(states):
        again = source.read(0, state)
        assert again.state() == state
        assert list(itertools.islice(again, 3)) == TEXTS[start : start + 3]
        if start < len(TEXTS) - 3:
            assert again.state() == states[start + 3]


def test_text_files_are_documents_in_the_order_of_their_paths(tmp_path):
    contents = {"b.txt": "b\r\nb\n", "a/z.md": "é", "a/sub/c.py": "", "a/__init__.py": "init", "c.txt.gz": "zipped"}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(compress(name, text.encode()))
    for name in ("README.md", ".hidden", ".git/config", "LICENSE", "_SUCCESS", "state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not data")
    assert read(tmp_path) == ["init", "", "é", "b\r\nb\n", "zipped"]
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbfnot data")
    assert read(tmp_path / "README.md") == ["not data"]  # a file that is named is read
    source = open_source(SourceSpec(str(tmp_path)), "unused")
    reader = source.read(2)
    assert next(reader) == "é" and list(source.read(2, reader.state())) == []


def test_other_columns_may_differ_from_row_to_row(tmp_path):
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": "x", "more": {}}, {"more": 1.5, "text": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "d", "else": None}))
    assert read(tmp_path) == ["a", "b", "c", "d"]


def test_fingerprint_is_of_the_files_not_of_their_place(tmp_path):
    def fingerprint(folder, contents, **spec):
        for name, text in contents.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text(text)
        return open_source(SourceSpec(str(tmp_path / folder), **spec), "unused").fingerprint

    first = fingerprint("one", {"a.jsonl": "12", "b.jsonl": "3"})
    assert fingerprint("two", {"a.jsonl": "12", "b.jsonl": "3"}) == first and len(first) == 64
    others = [
        fingerprint("three", {"a.jsonl": "1", "b.jsonl": "23"}),
        fingerprint("four", {"a.jsonl": "12", "c.jsonl": "3"}),
        fingerprint("same sizes", {"a.jsonl": "12", "b.jsonl": "4"}),
        fingerprint("five", {"a.txt": "12", "b.txt": "3"}),
        fingerprint("one", {}, text_column="content"),
    ]
    assert len({first, *others}) == 6


def test_csv_as_it_comes(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"text;n\na,b;1\n" + b"long " * 50_000 + b";2"))
    assert read(tmp_path) == ['x, "y"\nz', "é✓", "a,b", "long " * 50_000]
    (tmp_path / "a.csv").write_text("")
    assert len(read(tmp_path)) == 2


def test_what_a_file_is_without_a_name_that_says_so(tmp_path):
    """By its content, compressed or not; one .txt of JSON lines among other texts is text."""
    for name, content in {"gz": gzip.compress(GOOD), "zst": pa.compress(GOOD, "zstd", asbytes=True)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-00000").write_bytes(content)
        (tmp_path / name / "part-00001").write_bytes(json.dumps(ROWS).encode())
        for beside in ("_SUCCESS", ".part-00000.crc", "part-00000.crc", "_committed_12", "SHA256SUMS", "README.txt"):
            (tmp_path / name / beside).write_text("no data")
        assert read(tmp_path / name) == TEXTS * 2
    (tmp_path / "text").mkdir()
    for name, text in {"a.txt": '{"text": "a"}\n', "b.map": '{"version": 3}', "c": "plain", "d.c": "{\n}\n"}.items():
        (tmp_path / "text" / name).write_text(text)
    assert len(read(tmp_path / "text")) == 4
    (tmp_path / "text" / "part-0").write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match="several kinds: 4 text .*, 1 json .part-0."):
        read(tmp_path / "text")
    with pytest.raises(UserError, match="line 1 has no column 'text'; there are: 'body'"):
        read(tmp_path / "text" / "part-0")


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("data/a/1.txt", "data/.store/x/2.txt", "elsewhere/deep/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name[-5])
    links = {"0": "../elsewhere", "a_again": "a", "a/up": "..", "x": ".store/x", "a/b": "../../elsewhere/deep"}
    for name, target in links.items():
        (tmp_path / "data" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "one.txt").symlink_to("a/1.txt")
    source = open_source(SourceSpec(str(tmp_path / "data")), "unused")
    assert source.names == ["0/deep/3.txt", "a/1.txt", "one.txt", "x/2.txt"]
    assert read(tmp_path / "data") == ["3", "1", "1", "2"]
    (tmp_path / "linked").symlink_to("data")
    assert read(tmp_path / "linked") == ["3", "1", "1", "2"]
    (tmp_path / "data" / "broken").symlink_to("nowhere")
    with pytest.raises(UserError, match="broken is a link to nowhere, which does not exist"):
        read(tmp_path / "data")


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "a.parquet", "a.arrow"])
def test_reading_continues_after_a_bad_document(name, tmp_path):
    rows = [{"id": i, "text": text} for i, text in enumerate(["a", None, "b", "c"])]
    contents = {
        "a.jsonl": b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n{"text": \n"x"\n\xff\n{}\n'
        b'{"text": "\\ud800"}\n{"text": "c"}',
        "array.json": json.dumps([*rows[:2], 3, *rows[2:]]).encode(),
        "a.csv": b'text,n\na,1\n"x"y,2\nx\nb,3\nx,y,z\n\xff,1\nc,4\n',
        "a.parquet": parquet(rows),
        "a.arrow": arrow(pyarrow.ipc.new_file)(rows),
    }
    (tmp_path / name).write_bytes(contents[name])
    source = open_source(SourceSpec(str(tmp_path / name)), "unused")
    reader, found, bad = source.read(0), [], []
    while True:
        try:
            found.append((next(reader), reader.state()))
        except BadDocument as error:
            bad.append(str(error))
            assert [*_good(source.read(0, reader.state()))] == [*_good(source.read(0))][len(found) :]
        except StopIteration:
            break
    assert [text for text, _ in found] == ["a", "b", "c"] and len(bad) == {
        "a.jsonl": 6,
        "array.json": 2,
        "a.csv": 4,
    }.get(name, 1)
    assert all(error.startswith(f"{tmp_path / name}, ") and "--on-error skip" in error for error in bad)
    for i, (_, state) in enumerate(found):
        assert [*_good(source.read(0, state))] == ["a", "b", "c"][i + 1 :]


def _good(reader):
    while True:
        try:
            yield next(reader)
        except BadDocument:
            continue
        except StopIteration:
            return


def test_a_position_inside_a_line_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    source = open_source(SourceSpec(str(tmp_path)), "unused")
    reader = source.read(0)
    next(reader)
    (tmp_path / "a.jsonl").write_bytes(b" " + GOOD)
    with pytest.raises(UserError, match="no line that begins at byte [0-9]+.*changed before that position"):
        next(source.read(0, reader.state()))


# --- mistakes and broken files


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="no such file or folder: .*absent"):
        open_source(SourceSpec(str(tmp_path / "absent")), "unused")
    for name in ("./absent", "absent.jsonl", "absent.txt.gz"):
        with pytest.raises(UserError, match="no such file or folder"):
            open_source(SourceSpec(name), "unused")
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(UserError, match="holds no files"):
        open_source(SourceSpec(str(tmp_path)), "unused")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text("x")
    with pytest.raises(UserError, match=r"several kinds: 1 text \(a.txt\), 1 json \(b.jsonl\)"):
        open_source(SourceSpec(str(tmp_path)), "unused")
    (tmp_path / "c.xz").write_text("x")
    with pytest.raises(UserError, match="c.xz is a .xz file.*convert"):
        open_source(SourceSpec(str(tmp_path / "c.xz")), "unused")


def test_splits_of_local_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for spec in ({"subset": "en"}, {"split": "test"}):
        with pytest.raises(UserError, match="neither subsets nor splits"):
            open_source(SourceSpec("x", path=str(tmp_path), **spec), "unused")


def wrong_offsets():
    """An arrow file with a string that ends before it begins."""
    texts = pa.StringArray.from_buffers(2, pa.array([0, 5, 3], pa.int32()).buffers()[1], pa.py_buffer(b"abcdef"))
    buffer = io.BytesIO()
    with pyarrow.ipc.new_file(buffer, pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch({"text": texts}))
    return buffer.getvalue()


GOOD = jsonl(ROWS)
BROKEN = {
    "utf8.txt": (b"caf\xe9 au lait", "not valid UTF-8 .*iconv"),
    "utf8.jsonl": (GOOD + b'{"text": "caf\xe9"}\n', "not valid UTF-8"),
    "half.jsonl": (
        GOOD + b'{"no": "\\ud83d", "text": "a\\\\ud83d \\ud83d\\ude00 \\ud83d"}\n',
        r"line 42 has half a surrogate pair, .ud83d, at character 11 of its text.*--on-error skip",
    ),
    "json.jsonl": (GOOD + b'{"text": "a"\n', "line 42 is not JSON .*expected one object per line"),
    "deep.jsonl": (GOOD + b"[" * 100_000 + b"\n", "line 42 is not JSON"),
    "list.jsonl": (GOOD + b'"a"\n', 'line 42 holds "a": expected an object'),
    "null.jsonl": (GOOD + b'{"text": null}\n', "line 42 holds null, not a string"),
    "column.jsonl": (GOOD + b'{"content": "a", "id": 1}\n', "line 42 has no column 'text'; there are: 'content', 'id'"),
    "array.json": (b'[{"text": "a"}, {"text": "b"}', "cannot be read"),
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-30], "cannot be read .*download it again"),
    "cut.jsonl.zst": (pa.compress(GOOD, "zstd", asbytes=True)[:-30], "cannot be read .*download it again"),
    "no.jsonl.gz": (GOOD, "cannot be read"),
    "cut.parquet": (parquet(ROWS)[:-30], "cannot be read"),
    "flipped.parquet": (parquet(ROWS)[:4] + bytes(1000) + parquet(ROWS)[1004:], "cannot be read"),
    "cut.arrow": (arrow(pyarrow.ipc.new_stream)(ROWS)[:1500], "cannot be read"),
    "offsets.arrow": (wrong_offsets(), r"cannot be read \(.*offset"),
    "number.parquet": (parquet(ROWS), "int, not a string"),
    "column.parquet": (parquet(ROWS), "no column 'body'; there are: 'id', 'text'"),
    "column.arrow": (arrow(pyarrow.ipc.new_file)(ROWS), "no column 'body'; there are: 'id', 'text'"),
    "empty.parquet": (b"", "cannot be read"),
    "utf8.parquet": (
        parquet([{"id": 0, "text": "caf?"}]).replace(b"caf?", b"caf\xe9"),
        "part 1, row 1, is not valid UTF",
    ),
    "utf16.txt": ("né".encode("utf-16"), r"is UTF-16, expected UTF-8: convert the file \(iconv -f utf-16 -t utf-8\)"),
    "utf32.txt": ("né".encode("utf-32"), "iconv -f utf-32 "),
    "big.jsonl": (GOOD.decode().encode("utf-16be"), "is UTF-16BE.*iconv -f utf-16be"),
    "utf16.jsonl.gz": (gzip.compress(GOOD.decode().encode("utf-16")), "is UTF-16, .*iconv -f utf-16 "),
    "unmarked.csv": (CSV.encode("utf-16le"), "is UTF-16LE.*iconv -f utf-16le"),
    "utf8.csv": (b"id,text\n1,caf\xe9\n", "line 2 is not valid UTF-8.*iconv -f latin1"),
    "fields.csv": (b"id,text\n1,a\n2,b,c\n", "line 3 has 3 fields, the header has 2"),
    "quote.csv": (b'id,text\n1,a\n2,"b"c,\n', "line 3 is not CSV"),
    "open.csv": (b'id,text\n1,a\n2,"b\n3,c\n', "line 3 is not CSV"),
    "column.csv": (b"id;body\n1;a\n", "no column 'text'; there are: 'id', 'body'"),
    "zip.txt": (b"PK\x03\x04" + bytes(range(256)), "is a zip file, which is not read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_reading_errors_name_the_file(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    column = {"number.parquet": "id", "column.parquet": "body", "column.arrow": "body"}.get(name, "text")
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path, text_column=column)
    assert str(tmp_path / name) in str(raised.value)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(parquet(ROWS))
    monkeypatch.setenv("HF_HOME", "unused")
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    for spec in (SourceSpec(str(tmp_path)), SourceSpec("user/name")):
        with pytest.raises(UserError, match=r"needs the package (pyarrow|datasets).*pip install datasets"):
            next(open_source(spec, "unused").read(0))


def test_local_files_need_no_package_and_leave_nothing(tmp_path):
    """Neither datasets nor pyarrow is imported for text and JSON; nothing is written to the home folder."""
    (tmp_path / "data").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "data" / "a.jsonl.gz").write_bytes(gzip.compress(GOOD))
    (tmp_path / "a.parquet").write_bytes(parquet(ROWS))
    code = (
        "import sys; from dtron.data.sources import SourceSpec, open_source;"
        "n = len(list(open_source(SourceSpec('data'), 'cache').read(0)));"
        "heavy = {'datasets', 'pyarrow', 'transformers'} & set(sys.modules);"
        "m = len(list(open_source(SourceSpec('a.parquet'), 'cache').read(0)));"
        "print(n, m, heavy)"
    )
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": os.getcwd()}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == "41 41 set()\n", result.stderr
    assert os.listdir(tmp_path / "home") == [] and not (tmp_path / "cache").exists()


# --- datasets of the hub, with the library's own reader of local files in the hub's place


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset of three shards called user/name; the calls of load_dataset."""
    for shard in range(3):
        (tmp_path / f"{shard}.parquet").write_bytes(parquet(ROWS[shard::3]))
    files = [str(tmp_path / f"{shard}.parquet") for shard in range(3)]
    calls = []

    def load(name, subset, *, split, token, cache_dir, **kwargs):
        calls.append((name, subset, split, token, cache_dir))
        if name != "user/name":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return real(
            "parquet",
            data_files={"train": files},
            split=split,
            cache_dir=str(tmp_path / "cache"),
            token=token,
            **kwargs,
        )

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return calls


def test_hub_documents_from_every_position(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    source = pickle.loads(pickle.dumps(open_source(SourceSpec("user/name", subset="en"), "cache")))
    assert isinstance(source, HubSource) and source.n_files == 3
    assert hub == [("user/name", "en", "train", False, "cache")]
    for file in range(3):
        expected = TEXTS[file::3]
        reader, states = source.read(file), []
        for text in expected:
            states.append(json.loads(json.dumps(reader.state())))
            assert next(reader) == text
        assert next(reader, None) is None
        for start, state in enumerate(states):
            again = source.read(file, state)
            assert list(itertools.islice(again, 2)) == expected[start : start + 2]
            assert list(source.read(file, again.state())) == expected[start + 2 :]


class _Shard(torch.utils.data.IterableDataset):
    def __init__(self, source):
        self.source = source

    def __iter__(self):
        yield [list(self.source.read(file)) for file in range(3)]


def test_hub_documents_are_whole_in_every_worker(hub):
    source = open_source(SourceSpec("user/name"), "cache")
    loader = torch.utils.data.DataLoader(_Shard(source), batch_size=None, num_workers=2)
    assert list(loader) == [[TEXTS[file::3] for file in range(3)]] * 2


def test_hub_token_comes_from_the_environment_and_is_written_nowhere(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    source = open_source(SourceSpec("user/name"), tmp_path / "cache")
    assert hub[-1][3] == "hf_secret" and len(list(source.read(0))) == 14
    assert "hf_secret" not in repr(source) + source.fingerprint
    assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_hub_libraries_keep_their_files_in_the_cache_folder(hub, monkeypatch):
    monkeypatch.delenv("HF_HOME")
    open_source(SourceSpec("user/name"), "cache")
    assert os.environ["HF_HOME"] == os.path.join("cache", "huggingface")
    monkeypatch.setenv("HF_HOME", "chosen")
    open_source(SourceSpec("user/name"), "cache")
    assert os.environ["HF_HOME"] == "chosen"


def test_a_read_only_cache_is_not_locked(hub, monkeypatch, tmp_path):
    """`datasets` makes a lock wherever its cache is."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    source = open_source(SourceSpec("user/name"), tmp_path)
    assert len(list(source.read(0))) == 14 and not os.path.exists(hub[-1][-1]) and hub[-1][-1] != str(tmp_path)


def test_hub_mistakes_are_reported(hub):
    with pytest.raises(UserError, match="'user/nome' is no local file or folder, and no dataset.*doesn't exist"):
        open_source(SourceSpec("user/nome"), "cache")
    with pytest.raises(UserError, match="split 'test' .*Available splits"):
        open_source(SourceSpec("user/name", split="test"), "cache")
    with pytest.raises(UserError, match="user/name has no column 'body'; there are: 'id', 'text'"):
        open_source(SourceSpec("user/name", text_column="body"), "cache")
