"""A stranger's checkpoint runs no code: a command planted in each place that is read, its checksums put right."""

import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hf.models import save_random
from ranks import Ranks
from tinyrun import quiet_world, tiny_setup, train_tiny
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from dtron import compat
from dtron.__main__ import main
from dtron.checkpoint.files import MANIFEST, read_manifest
from dtron.checkpoint.reader import METADATA, load_tensors, reader_of
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError
from dtron.train.evaluate import Evaluation

TORCHTITAN = Path(__file__).parents[1] / "hf" / "torchtitan" / "step-5"


class Command:
    """Unpickled, it makes the file `flag`."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.flag}",)


def put_right(checkpoint: Path) -> None:
    """The manifest of the files as they are now."""
    manifest = read_manifest(StoragePath.at(checkpoint))
    there = {name: checkpoint / name for name in manifest.files if (checkpoint / name).exists()}
    files = {name: (file.stat().st_size, zlib.crc32(file.read_bytes())) for name, file in there.items()}
    (checkpoint / MANIFEST).write_bytes(replace(manifest, files=files).to_json())


def index_is_a_command(checkpoint: Path, command: Command) -> None:
    (checkpoint / METADATA).write_bytes(pickle.dumps(command))


def command_in_the_index(checkpoint: Path, command: Command) -> None:
    """Beside an index that is right otherwise."""
    index = pickle.loads((checkpoint / METADATA).read_bytes())
    index.planner_data = command
    (checkpoint / METADATA).write_bytes(pickle.dumps(index))


def index_of_one_rank(checkpoint: Path, command: Command) -> None:
    """DCP looks for it where there is no other."""
    (checkpoint / METADATA).unlink()
    (checkpoint / "__0.metadata").write_bytes(pickle.dumps(command))


def tensors_are_commands(checkpoint: Path, command: Command) -> None:
    """Every entry of every file."""
    _move_entries(checkpoint, command)


def tensors_are_objects(checkpoint: Path, command: Command) -> None:
    """And the index says that they are no tensors, which DCP unpickles without asking."""
    index = _move_entries(checkpoint, command)
    index.state_dict_metadata = dict.fromkeys(index.state_dict_metadata, BytesStorageMetadata())
    places = {index.fqn: place for index, place in index.storage_data.items()}
    index.storage_data = {MetadataIndex(name): place for name, place in places.items()}
    (checkpoint / METADATA).write_bytes(pickle.dumps(index))


def one_tensor_is_an_object(checkpoint: Path, command: Command) -> None:
    index = _move_entries(checkpoint, command)
    name = next(name for name in index.state_dict_metadata if "norm" in name)
    index.state_dict_metadata[name] = BytesStorageMetadata()
    (checkpoint / METADATA).write_bytes(pickle.dumps(index))


def _move_entries(checkpoint: Path, command: Command) -> Any:
    """Let every entry be a file of torch.save that holds the command; the index."""
    index = pickle.loads((checkpoint / METADATA).read_bytes())
    (name, *others) = sorted(path.name for path in checkpoint.glob("*.distcp"))
    torch.save(command, checkpoint / name)
    for place in index.storage_data.values():
        place.relative_path, place.offset, place.length = name, 0, (checkpoint / name).stat().st_size
    for other in others:
        (checkpoint / other).unlink()
    (checkpoint / METADATA).write_bytes(pickle.dumps(index))
    return index


PLANTS = [
    index_is_a_command, command_in_the_index, index_of_one_rank, tensors_are_commands, tensors_are_objects,
    one_tensor_is_an_object,
]  # fmt: skip
Plant = Callable[[Path, Command], None]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    assert main(["convert", str(save_random("Qwen3-0.6B", folder / "hf")), str(folder / "checkpoint")]) == 0
    return folder / "checkpoint"


def planted(source: Path, folder: Path, plant: Plant) -> tuple[Path, Path]:
    """A copy of a checkpoint with a command in it, and the file that would tell that it was run."""
    checkpoint, flag = Path(shutil.copytree(source, folder / "checkpoint")), folder / "flag"
    plant(checkpoint, Command(flag))
    if (checkpoint / MANIFEST).exists():
        put_right(checkpoint)
    return checkpoint, flag


# A missing index is damage; what is no tensor in the index is none of the model's.
REASONS = ("nothing of it was run", "is no tensor there", "it has no model.", "has no .metadata")


def one_line(said: str) -> bool:
    return said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said


@pytest.mark.parametrize("plant", PLANTS)
def test_commands_that_read_a_checkpoint_run_nothing(
    plant: Plant, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, flag = planted(converted, tmp_path, plant)
    for command in (["sample", str(checkpoint)], ["convert", str(checkpoint), str(tmp_path / "out")]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert one_line(said) and str(checkpoint) in said, said
        assert any(reason in said for reason in REASONS), said
        assert not flag.exists()
    titan, flag = planted(TORCHTITAN, tmp_path / "titan", plant)
    assert main(["convert", str(titan), str(tmp_path / "out"), "--config", str(converted)]) == 1
    assert one_line(capsys.readouterr().err) and not flag.exists()


def starts_that_are_refused(checkpoint: str, folder: str) -> list[str]:
    """What is said by a training with `checkpoint` as initial weights, one that resumes it, and an evaluation."""
    given = f"--checkpoint.initial_load_path {checkpoint}"
    run = f"{folder}/resumed"
    said = []
    for start in (
        lambda: train_tiny(f"{folder}/fresh", 1, given),
        lambda: train_tiny(f"{folder}/whole", 1, f"{given} --checkpoint.no_initial_load_model_only"),
        lambda: train_tiny(run, 2, ""),
        lambda: Evaluation(
            tiny_setup(f"--validation.only --validation.dataset tiny_counting {given}"), quiet_world()[0]
        ),
    ):
        try:
            start()
            said.append("nothing")
        except UserError as error:
            said.append(str(error))
    return said


def trained(folder: str) -> str:
    trainer, _ = train_tiny(folder, 1, "")
    return str(trainer.run_folder / "checkpoint" / "step-1")


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(ranks.run(1, trained, str(tmp_path_factory.mktemp("run") / "resumed"))[0])


@pytest.mark.parametrize("plant", PLANTS)
def test_a_training_that_reads_a_checkpoint_runs_nothing(
    plant: Plant, saved: Path, ranks: Ranks, tmp_path: Path
) -> None:
    shutil.copytree(saved.parents[2], tmp_path / "resumed")
    checkpoint, flag = tmp_path / "resumed" / saved.relative_to(saved.parents[2]), tmp_path / "flag"
    plant(checkpoint, Command(flag))
    put_right(checkpoint)
    for said in ranks.run(1, starts_that_are_refused, str(checkpoint), str(tmp_path))[0]:
        assert str(checkpoint) in said and "Traceback" not in said and "\n" not in said, said
        assert any(reason in said for reason in REASONS), said
    assert not flag.exists()


def test_files_of_torch_save_run_nothing(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"a": torch.ones(2), "b": Command(tmp_path / "flag")}, tmp_path / "x.bin",
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        with pytest.raises(UserError, match=r"x\.bin holds Python objects besides tensors.* nothing of it was run"):
            load_tensors(tmp_path / "x.bin")
    assert not (tmp_path / "flag").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_an_index_knows_its_own_classes_alone(tmp_path: Path) -> None:
    """Each class that DCP writes is read, by whichever Python wrote it; damage is told from code."""
    dcp.save({"x": {"a": torch.ones(2, dtype=torch.int64)}, "y": 3, "z": torch.ones(2).to(torch.float8_e4m3fn)},
             checkpoint_id=tmp_path / "x", no_dist=True)  # fmt: skip
    folder = StoragePath.at(tmp_path / "x")
    theirs, ours = dcp.FileSystemReader(tmp_path / "x").read_metadata(), reader_of(folder).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    content = (tmp_path / "x" / METADATA).read_bytes()
    # Python 3.11.0 pickled an enumeration's member as getattr(class, name).
    encoding = next(cls for (_, name), cls in compat.DCP_INDEX_CLASSES.items() if name == "_MEM_FORMAT_ENCODING")
    assert compat.DCP_INDEX_CLASSES["builtins", "getattr"](encoding, "TORCH_CHANNELS_LAST").value == 1
    for name in (
        "builtins eval",
        "builtins __import__",
        "os system",
        "torch.distributed.checkpoint.metadata os.system",
    ):
        (tmp_path / "x" / METADATA).write_bytes(f"c{name.replace(' ', chr(10))}\n(S'os'\nS'system'\ntR.".encode())
        with pytest.raises(UserError, match=r"holds the Python object .*nothing of it was run"):
            reader_of(folder).read_metadata()
    no_getattr = b"cbuiltins\ngetattr\n(S'os'\nS'system'\ntR."
    for damaged in (b"", content[:-30], b"\x80\x04N.", pickle.dumps(3), no_getattr):
        (tmp_path / "x" / METADATA).write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot be read: it is damaged"):
            reader_of(folder).read_metadata()
    in_memory = StoragePath("memory://test_code/step-1")
    in_memory.make()
    (in_memory / METADATA).write(pickle.dumps(Command(tmp_path / "flag")))
    with pytest.raises(UserError, match="nothing of it was run"):
        reader_of(in_memory).read_metadata()
    assert not (tmp_path / "flag").exists()
