"""The folder of checkpoints: what is whole, what is damaged, what is deleted, and what is left alone."""

import json
import os
import zlib
from pathlib import Path

import pytest

from dtron.checkpoint.files import (
    MANIFEST,
    Manifest,
    Progress,
    clean,
    delete_old,
    find_damage,
    holds_checkpoints,
    quarantine,
    read_manifest,
    steps_in,
)
from dtron.checkpoint.load import resumable_steps
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError

DATA = b"tensors" * 100


def write(folder: Path, step: int, model_only: bool = False) -> Path:
    """A checkpoint of one data file."""
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    files = {}
    for name in ("__0_0.distcp", ".metadata"):
        (path / name).write_bytes(DATA)
        files[name] = (len(DATA), zlib.crc32(DATA))
    manifest = Manifest(Progress(step=step, model_only=model_only, streams={"a": [1, 2]}), files)
    (path / MANIFEST).write_bytes(manifest.to_json())
    return path


def test_manifest_round_trip(tmp_path: Path) -> None:
    path = StoragePath.at(write(tmp_path, 5))
    manifest = read_manifest(path)
    assert manifest.progress == Progress(step=5, streams={"a": [1, 2]})
    assert find_damage(path, manifest.files.items()) == []


def test_floats_survive_to_the_last_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, 1 / 3]
    (tmp_path / MANIFEST).write_bytes(Manifest(Progress(streams={"v": values}), {}).to_json())
    assert read_manifest(StoragePath.at(tmp_path)).progress.streams["v"] == values


@pytest.mark.parametrize("bit", [0, 8 * 60 + 3, 8 * 300 + 1])
def test_a_flipped_bit_in_the_manifest_is_seen(tmp_path: Path, bit: int) -> None:
    path = write(tmp_path, 5)
    data = bytearray((path / MANIFEST).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (path / MANIFEST).write_bytes(bytes(data))
    with pytest.raises(UserError, match="dtron.json is damaged or not dtron's"):
        read_manifest(StoragePath.at(path))


def test_every_flipped_bit_of_a_file_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    place, manifest = StoragePath.at(path), read_manifest(StoragePath.at(path))
    for bit in range(0, 8 * len(DATA), 397):
        data = bytearray(DATA)
        data[bit // 8] ^= 1 << bit % 8
        (path / "__0_0.distcp").write_bytes(bytes(data))
        assert find_damage(place, manifest.files.items()) == [
            "__0_0.distcp is not what was written (its checksum differs)"
        ]


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    place, files = StoragePath.at(path), read_manifest(StoragePath.at(path)).files.items()
    (path / "__0_0.distcp").write_bytes(DATA[:-1])
    assert find_damage(place, files) == [f"__0_0.distcp has {len(DATA) - 1} bytes of {len(DATA)}"]
    (path / "__0_0.distcp").unlink()
    assert find_damage(place, files) == ["__0_0.distcp is missing"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"crc32": 0}', '{"crc32": "x", "format": 1}'])
def test_a_file_that_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="damaged or not dtron's"):
        read_manifest(StoragePath.at(tmp_path))


def test_a_manifest_of_another_format(tmp_path: Path) -> None:
    body = {"format": 2, "progress": {}, "files": {}}
    crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    (tmp_path / MANIFEST).write_text(json.dumps({**body, "crc32": crc}))
    with pytest.raises(UserError, match="its format is 2, expected 1"):
        read_manifest(StoragePath.at(tmp_path))


def test_only_finished_names_count(tmp_path: Path) -> None:
    write(tmp_path, 3)
    write(tmp_path, 20, model_only=True)
    for name in ("step-100.partial-1", "step-30.deleting", "step-40.damaged", "step-x", "step-50", "step-0060"):
        (tmp_path / name).mkdir()
    place = StoragePath.at(tmp_path)
    assert steps_in(place) == [3, 20, 50]
    assert resumable_steps(place) == [50, 3], "weights alone cannot be resumed; what is damaged is told in its turn"
    assert resumable_steps(place / "nowhere") == []


def test_clean_takes_what_a_killed_run_left_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 3)
    for name in ("step-4.partial-1", "step-2.deleting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(DATA)
    mine = ("notes", "step-1.damaged", "step-5.partial", "step-7.backup", "my-step-4.partial-1", "step-8.partial-mine")
    for name in (*mine, "step-9.deleting"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-9.deleting" / "thesis.txt").touch()
    mine = (*mine, "step-9.deleting")
    clean(StoragePath.at(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["step-3", *mine])


def test_set_aside_keeps_all(tmp_path: Path) -> None:
    for expected in ("step-5.damaged", "step-5.damaged-2", "step-5.damaged-3"):
        write(tmp_path, 5)
        assert quarantine(StoragePath.at(tmp_path / "step-5")).name == expected
    assert len(list(tmp_path.rglob("*.distcp"))) == 3 and steps_in(StoragePath.at(tmp_path)) == []


# --- retention


def left(tmp_path: Path, latest: int, every: int) -> list[int]:
    assert delete_old(StoragePath.at(tmp_path), latest, every) == []
    return steps_in(StoragePath.at(tmp_path))


@pytest.mark.parametrize(
    ("latest", "every", "expected"),
    [
        (0, 0, [10, 20, 30, 40, 50]),
        (0, 20, [10, 20, 30, 40, 50]),
        (2, 0, [40, 50]),
        (1, 20, [20, 40, 50]),
        (9, 0, [10, 20, 30, 40, 50]),
    ],
)
def test_retention(tmp_path: Path, latest: int, every: int, expected: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    assert left(tmp_path, latest, every) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step}" for step in expected]


def test_weights_alone_and_damaged_ones_are_not_counted(tmp_path: Path) -> None:
    """Else the last that can be resumed would be deleted for the sake of one that cannot."""
    write(tmp_path, 10)
    write(tmp_path, 20)
    (write(tmp_path, 30) / MANIFEST).unlink()
    write(tmp_path, 40, model_only=True)
    assert left(tmp_path, 1, 0) == [20, 30, 40]


def test_what_dtron_did_not_write_stays(tmp_path: Path) -> None:
    (write(tmp_path, 10) / "notes.txt").write_text("mine")
    write(tmp_path, 20)
    (tmp_path / "notes").mkdir()
    (told,) = delete_old(StoragePath.at(tmp_path), 1, 0)
    assert "step-10 is kept: it holds notes.txt, which dtron did not write" in told
    assert sorted(p.name for p in tmp_path.rglob("*.txt")) == ["notes.txt"]
    assert resumable_steps(StoragePath.at(tmp_path)) == [20, 10]


def test_a_link_is_not_followed_to_be_emptied(tmp_path: Path) -> None:
    write(tmp_path, 20)
    archive = write(tmp_path / "archive", 10)
    (tmp_path / "step-10").symlink_to(archive)
    (told,) = delete_old(StoragePath.at(tmp_path), 1, 0)
    assert "step-10 is kept: it is a link" in told
    assert len(list(archive.iterdir())) == 3 and (tmp_path / "step-10").is_symlink()


def test_whether_there_ever_was_a_checkpoint(tmp_path: Path) -> None:
    place = StoragePath.at(tmp_path)
    (tmp_path / "step-4.partial-1").mkdir()
    assert not holds_checkpoints(place)
    write(tmp_path, 3)
    assert holds_checkpoints(place)
    quarantine(place / "step-3")
    assert holds_checkpoints(place) and steps_in(place) == []


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    monkeypatch.setattr(os, "unlink", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("killed")))
    monkeypatch.setattr(os, "remove", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("killed")))
    (told,) = delete_old(StoragePath.at(tmp_path), 1, 0)
    assert "could not be deleted: killed" in told
    monkeypatch.undo()
    assert steps_in(StoragePath.at(tmp_path)) == [20]
    clean(StoragePath.at(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["step-20"]


def test_an_unknown_url_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nosuch"):
        read_manifest(StoragePath.at("nosuch://bucket/step-1"))
