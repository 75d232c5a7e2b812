"""From a source to a folder of shards: the same bytes whatever the processes and however often it was ended."""

import errno
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtron.data import prepare as prepare_module
from dtron.data import shards
from dtron.data.prepare import choose_encoder, prepare, prepare_cached
from dtron.data.shards import JOURNAL, MANIFEST, ShardWriter, is_prepared, open_store
from dtron.data.sources import SourceSpec, open_source
from dtron.data.tokenizer import train_bpe
from dtron.errors import UserError

FILES = [[f"document {i} of file {file}: " + "né " * (i % 7) for i in range(n)] for file, n in enumerate((40, 0, 60))]
TEXTS = [text for file in FILES for text in file]


def silent(_):
    pass


class Reader:
    def __init__(self, texts, at):
        self.texts, self.at = texts, at

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.texts):
            raise StopIteration
        self.at += 1
        if isinstance(self.texts[self.at - 1], BaseException):
            raise self.texts[self.at - 1]
        return self.texts[self.at - 1]

    def state(self):
        return {"at": self.at}


class Lists:
    """A source in memory; a text that is an exception is raised. reads: what was asked for."""

    name = "a list"

    def __init__(self, files=FILES, fingerprint="fp"):
        self.files, self.n_files, self.fingerprint, self.reads = files, len(files), fingerprint, []

    def read(self, file, state=None):
        self.reads.append((file, state))
        return Reader(self.files[file], (state or {"at": 0})["at"])


@pytest.fixture(scope="module")
def encoder():
    return train_bpe(TEXTS, 300)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH", 150)


def go(out, encoder, source=None, **kwargs):
    kwargs = {"processes": 1, "shard_tokens": 200, "log": silent} | kwargs
    return prepare(source or Lists(), encoder, out, **kwargs)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def documents(store, encoder):
    ends = [*store.document_starts(0, store.n_tokens)[1:], store.n_tokens]
    starts = [0, *ends[:-1]]
    return [encoder.decode(store.read(a, b)) for a, b in zip(starts, ends, strict=True)]


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    go(out, encoder)
    return content(out)


def test_every_document_in_order(encoder, tmp_path):
    store = go(tmp_path / "out", encoder)
    assert documents(store, encoder) == [text + encoder.eos for text in TEXTS]
    assert store.n_documents == 100 and store.n_tokens == sum(map(len, encoder.encode(TEXTS)))
    assert (store.vocab_size, store.tokenizer_fingerprint) == (encoder.vocab_size, encoder.fingerprint)
    assert store.tokenizer_json.read_text() == encoder.json and store.source == {"name": "a list", "files": 3}
    assert len(store.shards) > 5
    for number, shard in enumerate(store.shards[:-1]):  # full with its last document, not before
        lengths = store.document_lengths(number)
        assert shard.tokens >= 200 > shard.tokens - lengths[-1]
    suffixes = ("tokens", "documents", "crc32")
    expected = {f"{shard.name}.{suffix}" for shard in store.shards for suffix in suffixes}
    assert set(content(tmp_path / "out")) == expected | {MANIFEST, "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("batch", [1, 1000, 10**6])
def test_bytes_depend_on_neither_processes_nor_batches(encoder, whole, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(prepare_module, "BATCH", batch)
    go(tmp_path / "out", encoder, processes=1 if batch == 1 else 3)
    assert content(tmp_path / "out") == whole


def test_interrupted_anywhere_it_resumes_to_the_same_bytes(encoder, whole, tmp_path):
    for n in range(3, 100, 12):
        out = tmp_path / str(n)
        broken = [[*FILES[0]], [], [*FILES[2]]]
        file, i = (0, n) if n < 40 else (2, n - 40)
        broken[file][i] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            go(out, encoder, Lists(broken))
        found = content(out) if out.exists() else {}
        assert not [name for name in found if name.endswith("partial")] and MANIFEST not in found
        assert all(whole[name] == data for name, data in found.items() if name.startswith("shard"))
        if found:
            with pytest.raises(UserError, match="is not finished"):
                open_store(out)
            with pytest.raises(UserError, match="it has another shard_tokens .200, not 300"):
                go(out, encoder, shard_tokens=300)
        source, lines = Lists(), []
        go(out, encoder, source, log=lines.append)
        assert content(out) == whole
        if n > 20:  # not from the start
            assert source.reads[0][1] is not None and any("resuming after shard" in line for line in lines)


def _prepare_slowly(out, encoder, processes):
    add = ShardWriter.add

    def slow(*args):
        add(*args)
        time.sleep(0.05)

    ShardWriter.add = slow
    prepare_module.BATCH = 150
    go(out, encoder, processes=processes)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def _wait(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_it_leaves_no_worker_and_is_resumed(encoder, whole, tmp_path):
    out = tmp_path / "out"
    child = multiprocessing.get_context("spawn").Process(target=_prepare_slowly, args=(out, encoder, 2))
    child.start()
    _wait(lambda: (out / "shard-00001.tokens").exists())
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(child.pid)], capture_output=True, text=True).stdout
    assert len(workers := listed.split()) >= 2
    with pytest.raises(UserError, match=rf"is being prepared by process {child.pid} on "):
        go(out, encoder)
    child.kill()
    child.join()
    _wait(lambda: not any(map(_alive, workers)))
    assert is_prepared(out) and not (out / MANIFEST).exists()
    for left in ("shard-00099.tokens.partial", "shard-00098.documents", f"{MANIFEST}.partial"):
        (out / left).write_text("half")
    go(out, encoder)
    assert content(out) == whole


class KillsAWorker(Lists):
    """Kills one of the processes that are new since it was made, when its last file is read."""

    def __init__(self):
        super().__init__()
        self.others = set(multiprocessing.active_children())  # the pool of ranks, where other tests ran before

    def new(self):
        return [child for child in multiprocessing.active_children() if child not in self.others]

    def read(self, file, state=None):
        if file == 2:
            os.kill(self.new()[0].pid, signal.SIGKILL)
        return super().read(file, state)


def test_killed_worker_is_reported(encoder, whole, tmp_path):
    source = KillsAWorker()
    with pytest.raises(UserError, match="a worker process died .exit code -9"):
        go(tmp_path / "out", encoder, source, processes=2)
    assert not source.new()
    go(tmp_path / "out", encoder)
    assert content(tmp_path / "out") == whole


def test_finished_is_left_alone(encoder, tmp_path):
    out, lines, source = tmp_path / "out", [], Lists()
    first = go(out, encoder)
    before = content(out)
    assert go(out, encoder, source, log=lines.append).fingerprint == first.fingerprint
    assert source.reads == [] and "prepared already" in lines[0]
    other = train_bpe(TEXTS, 290)
    for source, tokenizer, kwargs, named in (
        (Lists(fingerprint="other"), encoder, {}, "source"),
        (Lists(), other, {}, "tokenizer"),
        (Lists(), encoder, {"shard_tokens": 9}, "shard_tokens"),
    ):
        with pytest.raises(UserError, match=f"holds other data; it has another {named} "):
            go(out, tokenizer, source, **kwargs)
    assert content(out) == before


def test_finished_by_another_process_before_the_lock_was_free(encoder, whole, tmp_path, monkeypatch):
    out, lines, source, lock = tmp_path / "out", [], Lists(), prepare_module.lock_folder

    def late(folder):
        monkeypatch.setattr(prepare_module, "lock_folder", lock)
        go(out, encoder)
        return lock(folder)

    monkeypatch.setattr(prepare_module, "lock_folder", late)
    assert go(out, encoder, source, log=lines.append).n_documents == 100
    assert content(out) == whole and source.reads == [] and "prepared already" in lines[-1]


def test_foreign_folders_are_left_alone(encoder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for out, message in ((tmp_path, "is neither empty nor made by"), (tmp_path / "mine.txt", "is a file")):
        with pytest.raises(UserError, match=message):
            go(out, encoder)
    assert content(tmp_path) == {"mine.txt": b"mine"}
    with pytest.raises(UserError, match="cannot be written"):
        go(Path("/proc/nowhere"), encoder)


@pytest.mark.parametrize("files", [[[]], [[], []], [["", ""]]])
def test_empty_source_leaves_nothing(encoder, tmp_path, files):
    with pytest.raises(UserError, match="a list is empty"):
        go(tmp_path / "out", encoder, Lists(files), shard_tokens=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_full_disk_leaves_what_is_finished(encoder, whole, tmp_path, monkeypatch, code):
    out, fsync, calls = tmp_path / "out", os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 30:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"{os.strerror(code)}.: [1-9]\d* shards with [1-9]\d* tokens are finished"):
        go(out, encoder)
    monkeypatch.undo()
    assert not list(out.glob("*.partial")) and not (out / MANIFEST).exists()
    go(out, encoder)
    assert content(out) == whole


def test_writes_that_fail_midway_leave_what_is_finished(encoder, tmp_path):
    """The kernel itself refuses: no file may have more than 40 kB; the second shard would."""
    code = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from test_prepare import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
source = Lists([TEXTS, ["x y z " * 30_000]])
prepare(source, train_bpe(TEXTS, 300), sys.argv[1], shard_tokens=500, log=silent)
"""
    out = tmp_path / "out"
    result = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    assert "UserError" in result.stderr and "File too large" in result.stderr and "are finished" in result.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert not list(out.glob("*.partial")) and (out / "shard-00000.tokens").exists()
    source = Lists([TEXTS, ["x y z " * 30_000]])
    assert prepare(source, encoder, out, shard_tokens=500, log=silent).n_documents == 101


def test_one_huge_document(encoder, tmp_path):
    huge = "".join(f"line {i} of a long text\n" for i in range(200_000))
    code = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from test_prepare import *
huge = "".join(f"line {{i}} of a long text\\n" for i in range(200_000))
encoder = train_bpe(TEXTS, 300)
encoder.encode(["warm " * 200_000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare(Lists([["short", huge, "last"]]), encoder, sys.argv[1], log=silent)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    growth_kb = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    store = open_store(tmp_path / "out")
    assert documents(store, encoder) == [text + encoder.eos for text in ("short", huge, "last")]
    assert growth_kb < 160_000  # 80 MiB; encoded at once, 254


def test_files_of_all_kinds(encoder, tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    table = pa.table({"text": TEXTS})
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i:03d}.txt").write_text(text)
    expected = None
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "texts"):
        source = open_source(SourceSpec(str(tmp_path / name)), tmp_path / "cache")
        interrupted = go(tmp_path / f"{name}-out", encoder, source)
        expected = expected or interrupted.fingerprint
        assert interrupted.fingerprint == expected and interrupted.n_documents == 100


@pytest.mark.parametrize("processes", [1, 2])
def test_invalid_utf8_names_the_file_and_keeps_what_is_finished(encoder, tmp_path, processes):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines[:60], b'{"text": "\xff\xfe"}\n', *lines[60:]]))
    source = open_source(SourceSpec(str(tmp_path / "a.jsonl")), tmp_path / "cache")
    with pytest.raises(UserError, match="a.jsonl.* is not valid UTF-8"):
        go(tmp_path / "out", encoder, source, processes=processes)
    assert (tmp_path / "out" / JOURNAL).exists() and not list((tmp_path / "out").glob("*.partial"))


def test_damaged_journal_is_reported(encoder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        go(out, encoder, Lists([*FILES[:2], [*FILES[2], KeyboardInterrupt()]]))
    (out / JOURNAL).write_text('{"rec')
    with pytest.raises(UserError, match=f"{JOURNAL} is damaged"):
        go(out, encoder)
    assert (out / "shard-00000.tokens").exists()


def test_cached_is_prepared_once_and_keyed(encoder, tmp_path):
    source, cache = Lists(), tmp_path / "cache"
    first = prepare_cached(source, encoder, cache, log=silent)
    assert first.n_documents == 100 and len(source.reads) == 3
    assert prepare_cached(source, encoder, cache, log=silent).fingerprint == first.fingerprint
    assert len(source.reads) == 3 and len(os.listdir(cache)) == 1
    prepare_cached(Lists(FILES[:1], "other"), encoder, cache, log=silent)
    prepare_cached(Lists(), train_bpe(TEXTS, 290), cache, log=silent)
    assert len(os.listdir(cache)) == 3
    with pytest.raises(UserError, match="is empty"):
        prepare_cached(Lists([[]], "third"), encoder, cache, log=silent)
    assert len(os.listdir(cache)) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="job.cache_folder"):
        prepare_cached(source, encoder, tmp_path / "file" / "cache", log=silent)


def test_a_whole_cache_may_be_read_only(encoder, tmp_path, monkeypatch):
    first = prepare_cached(Lists(), encoder, tmp_path, log=silent)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert prepare_cached(Lists(), encoder, tmp_path, log=silent).fingerprint == first.fingerprint
    with pytest.raises(UserError, match="job.cache_folder = .* cannot be written .permission denied"):
        prepare_cached(Lists(fingerprint="other"), encoder, tmp_path, log=silent)


def test_cached_resumes_after_a_kill_and_waits_for_another(encoder, whole, tmp_path):
    said, cache = [], tmp_path / "cache"
    first = prepare_cached(Lists(), encoder, cache, log=silent)
    partial = cache / f".partial-{first.folder.name}"
    shutil.move(first.folder, partial)  # finished, and killed before it was moved into place

    def log(line):
        said.append(line)
        if "waiting" in line and len(said) == 1:
            other.communicate(b"\n")

    (partial / MANIFEST).unlink()  # or killed in the middle, by a process that another has followed
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", lock, str(partial / "prepare.lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    source = Lists()
    (partial / JOURNAL).write_text(json.dumps({"recipe": {}, "shards": [], "file": 0, "state": None}))
    again = prepare_cached(source, encoder, cache, log=log)
    assert again.fingerprint == first.fingerprint and again.folder == first.folder and not partial.exists()
    assert said[0].startswith("waiting for another process") and source.reads


def test_bpe_is_trained_on_the_first_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BPE_TEXT", sum(map(len, FILES[0])))
    chosen = choose_encoder(Lists(), "bpe:290", tmp_path)
    assert chosen.fingerprint == train_bpe(FILES[0], 290).fingerprint != train_bpe(TEXTS, 290).fingerprint
    chosen.save(tmp_path)
    assert choose_encoder(Lists(), str(tmp_path), tmp_path).fingerprint == chosen.fingerprint
    for wrong in ("bpe:256", "bpe:", "bpe:x"):
        with pytest.raises(UserError):
            choose_encoder(Lists(), wrong, tmp_path)


def test_progress_is_logged(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "PROGRESS_S", 0.0)
    lines = []
    store = go(tmp_path / "out", encoder, log=lines.append)
    assert lines[0] == "tokenizing a list" and len(lines) > 5
    assert lines[-2].startswith(f"100 documents, {store.n_tokens:,} tokens, ")
    assert lines[-2].endswith(" tokens/s, in file 3 of 3")


def test_a_large_vocabulary_takes_four_bytes(encoder, tmp_path):
    wide = json.loads(encoder.json)
    wide["added_tokens"].append(wide["added_tokens"][0] | {"id": 70000, "content": "<s>"})
    wide["model"]["vocab"]["<s>"] = 70000
    store = go(tmp_path / "out", shards_encoder := type(encoder)(json.dumps(wide), "<s>"))
    assert store.dtype == np.uint32 and store.read(0, store.n_tokens).max() == 70000
    assert documents(store, shards_encoder) == [text + "<s>" for text in TEXTS]
    assert shards.BLOCK % store.dtype.itemsize == 0
