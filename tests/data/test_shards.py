"""Prepared tokens on disk: what is written is what is read, and damage is reported."""

import json
import os
import pickle
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from dtron.data import shards
from dtron.data.shards import BLOCK, JOURNAL, MANIFEST, ShardWriter, is_prepared, open_store
from dtron.data.tokenizer import train_bpe
from dtron.errors import UserError

LENGTHS = [[1, 5, 40_000, 3], [70_000], [2, 2, 2]]  # tokens of each document of each shard


def content(shard):
    return np.random.default_rng(shard).integers(0, 65536, sum(LENGTHS[shard])).astype("<u2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three shards, written in pieces."""
    folder = tmp_path_factory.mktemp("shards")
    encoder = train_bpe(["some text"] * 9, 270)
    encoder.save(folder)
    entries = []
    for number, lengths in enumerate(LENGTHS):
        writer, tokens = ShardWriter(folder, number), content(number)
        ends = np.cumsum(lengths)
        for first in range(0, len(lengths), 2):
            last = min(first + 2, len(lengths)) - 1
            writer.add(tokens[ends[first] - lengths[first] : ends[last]], np.array(lengths[first : last + 1]))
        assert not (folder / f"shard-{number:05d}.tokens").exists()
        entries.append(asdict(writer.finish()))
    manifest = {"format": 1, "dtype": "uint16", "vocab_size": 65536, "eos": encoder.eos, "eos_id": encoder.eos_id}
    manifest |= {"tokenizer": encoder.fingerprint, "source": {"name": "made up"}, "recipe": {}, "shards": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert not list(folder.glob("*.partial"))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


WHOLE = np.concatenate([content(i) for i in range(3)])
STARTS = np.cumsum([0, *(n for lengths in LENGTHS for n in lengths)])[:-1]
WINDOWS = [(0, 0), (0, 1), (5, 40_007), (40_008, 40_009), (40_009, 40_010), (39_000, 110_013), (0, len(WHOLE))]


@pytest.mark.parametrize("open_shards", [1, 128])
def test_shards_are_one_run_of_tokens(made, monkeypatch, open_shards):
    monkeypatch.setattr(shards, "OPEN_SHARDS", open_shards)
    store = open_store(made)
    assert (store.n_tokens, store.n_documents) == (len(WHOLE), 8) and store.dtype == np.uint16
    assert store.source == {"name": "made up"} and store.tokenizer_json == made / "tokenizer.json"
    near = [
        (a, b) for s in STARTS for a in (s - 1, s, s + 1) for b in (a + 1, a + 3, a + 50) if 0 <= a < b <= len(WHOLE)
    ]
    for start, stop in WINDOWS + near:
        assert store.read(start, stop).tolist() == WHOLE[start:stop].tolist()
        expected = [s for s in STARTS if start <= s < stop]
        found = store.document_starts(start, stop)
        assert found.dtype == np.int64 and found.tolist() == expected
    assert len(store._open) <= open_shards
    for bad in ((-1, 5), (0, len(WHOLE) + 1), (5, 4)):
        with pytest.raises(IndexError):
            store.read(*bad)
    assert [store.document_lengths(i).tolist() for i in range(3)] == LENGTHS
    ends = [*STARTS[1:], len(WHOLE)]
    assert [store.document(i) for i in range(8)] == list(zip(STARTS, ends, strict=True))
    for bad in (-1, 8):
        with pytest.raises(IndexError):
            store.document(bad)
    store.verify()


def test_it_is_mapped_and_pickled_as_a_path(made):
    store = open_store(made)
    assert isinstance(store.read(9, 99).base, np.ndarray | np.memmap) and not store.read(9, 99).flags.owndata
    assert len(pickle.dumps(store)) < 1000
    assert pickle.loads(pickle.dumps(store)).read(9, 99).tolist() == WHOLE[9:99].tolist()


def test_fingerprint_is_of_the_content(folder, made, tmp_path):
    assert open_store(folder).fingerprint == open_store(made).fingerprint
    writer = ShardWriter(tmp_path, 0)
    writer.add(content(2)[::-1].copy(), np.array(LENGTHS[2]))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][2]["sha256"] = writer.finish().sha256
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert open_store(folder).fingerprint != open_store(made).fingerprint


def flip(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_is_never_returned(folder):
    flip(folder / "shard-00001.tokens", BLOCK + 7)
    store, first = open_store(folder), sum(LENGTHS[0])
    in_block = first + BLOCK // 2  # its first token
    assert store.read(0, in_block).tolist() == WHOLE[:in_block].tolist()
    for start, stop in ((in_block, in_block + 1), (first, len(WHOLE)), (in_block + 999, in_block + 1000)):
        with pytest.raises(UserError, match=rf"shard-00001.tokens is damaged at bytes {BLOCK} to {2 * BLOCK - 1}"):
            store.read(start, stop)
    with pytest.raises(UserError, match="shard-00001.tokens is damaged"):
        open_store(folder).verify()
    assert len(store.read(first + BLOCK, len(WHOLE))) > 0  # the blocks after it are whole


def test_damage_in_the_last_block_and_in_other_files_is_reported(folder):
    flip(folder / "shard-00002.tokens", 11)
    with pytest.raises(UserError, match="shard-00002.tokens is damaged at bytes 0"):
        open_store(folder).read(len(WHOLE) - 1, len(WHOLE))
    for suffix in ("documents", "crc32"):
        flip(folder / f"shard-00000.{suffix}", 3)
        for access in ("read", "document_starts"):
            with pytest.raises(UserError, match=f"shard-00000.{suffix} is damaged"):
                getattr(open_store(folder), access)(0, 1)
        flip(folder / f"shard-00000.{suffix}", 3)


def test_a_block_is_checked_once_in_a_process(folder, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 1)
    store, sizes = open_store(folder), []
    crc32 = shards.zlib.crc32
    monkeypatch.setattr(shards.zlib, "crc32", lambda data: sizes.append(memoryview(data).nbytes) or crc32(data))
    for _ in range(2):
        store.read(0, len(WHOLE))
    blocks = [size for size in sizes if size > 100]
    assert sum(blocks) == 2 * (len(WHOLE) - 6) and len(blocks) == 2 + 3


@pytest.mark.parametrize("suffix", ["tokens", "documents", "crc32"])
def test_truncated_and_missing_files_are_reported_at_once(folder, suffix):
    path = folder / f"shard-00001.{suffix}"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match=rf"shard-00001.{suffix} has \d+ bytes, expected \d+"):
        open_store(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"shard-00001.{suffix} is missing"):
        open_store(folder)


def test_another_tokenizer_is_reported(folder):
    train_bpe(["another text"] * 9, 265).save(folder)
    with pytest.raises(UserError, match="is not the tokenizer that .* was prepared with"):
        open_store(folder)


def test_what_is_no_finished_folder_is_reported(folder):
    assert is_prepared(folder)
    manifest = (folder / MANIFEST).read_text()
    for bad, message in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read .*shards"),
        (manifest.replace('"tokens": 6', '"tokens": "six"'), "cannot be read"),
        (manifest.replace('"format": 1', '"format": 99'), "has format 99"),
    ):
        (folder / MANIFEST).write_text(bad)
        with pytest.raises(UserError, match=message):
            open_store(folder)
    (folder / MANIFEST).unlink()
    assert not is_prepared(folder)
    with pytest.raises(UserError, match="manifest.json is missing"):
        open_store(folder)
    (folder / JOURNAL).write_text("{}")
    assert is_prepared(folder)
    with pytest.raises(UserError, match="is not finished"):
        open_store(folder)


def test_an_aborted_shard_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path, 0)
    writer.add(content(0), np.array(LENGTHS[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.tokens.partial"]
    writer.abort()
    assert not list(tmp_path.iterdir())
