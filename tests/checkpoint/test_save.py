"""Saving and loading by forked ranks: beside the training, whole or not at all, damaged, behind URLs, and in bytes."""

import contextlib
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint.training import ADAMW, begin
from parity.layout import CPU, Case, build_config, local
from parity.table import FSDP2, ONE
from ranks import Ranks
from tinyrun import quiet_world
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from dtron import registry
from dtron.checkpoint import save as saving
from dtron.checkpoint.files import MANIFEST, Progress, steps_in
from dtron.checkpoint.load import find_good, load, load_initial, verify_on_all_ranks
from dtron.checkpoint.save import Saved, Saver, named_tensors
from dtron.checkpoint.storage import StoragePath
from dtron.config.sections import Checkpoint
from dtron.errors import UserError
from dtron.mesh import Degrees, Mesh
from dtron.models.llama import LlamaConfig
from dtron.parallel.compose import ParallelModel, parallelize
from dtron.ranks.agree import from_rank_0
from dtron.train.optimizer import build_optimizers

MODES = ("disabled", "async", "async_with_pinned_mem")
BESIDE = MODES[1:]
NO_SPACE = "OSError: [Errno 28] No space left on device"
WIDE = LlamaConfig(vocab_size=512, dim=128, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=256)  # 5.1 MB with AdamW

State = dict[str, Tensor]  # this rank's own shards, by layout-free names


def begin_with_state(
    degrees: Degrees = FSDP2, config: LlamaConfig | None = None
) -> tuple[ParallelModel, list[torch.optim.Optimizer]]:
    """Model and AdamW after one update, so that there is something to save. config: another model than the small."""
    case = Case("saved", degrees)
    if config is None:
        _, model, optimizers = begin(case)
    else:
        spec = registry.look_up("model", "llama3", "model.name")
        run = build_config(case)
        model = parallelize(spec, config, run, Mesh(degrees, "cpu"), CPU, registry.cross_entropy, [])
        optimizers = build_optimizers(model, ADAMW)
    update(model, optimizers, 1.0)
    return model, optimizers


def update(model: ParallelModel, optimizers: list[torch.optim.Optimizer], gradient: float) -> None:
    """One optimizer step: it changes every weight and all of AdamW's state."""
    for _, p in model.named_parameters():
        p.grad = torch.full_like(p, gradient)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: ParallelModel, optimizers: list[torch.optim.Optimizer] | None) -> State:
    return {name: local(tensor).detach().clone() for name, tensor, _ in named_tensors(model, optimizers)}


def differing(got: State, expected: State) -> list[str]:
    assert got.keys() == expected.keys()
    return [name for name in expected if not torch.equal(got[name], expected[name])]


def saver_of(folder: str, mode: str = "async", **more: Any) -> Saver:
    return Saver(StoragePath.at(folder), Checkpoint(**{"async_mode": mode, "keep_latest_k": 0, **more}))


def save_and_wait(saver: Saver, model: ParallelModel, optimizers: Any, step: int) -> Saved:
    (saved,) = [*saver.save(model, optimizers, Progress(step=step)), *saver.wait()]
    return saved


@contextlib.contextmanager
def slow_disk(seconds: float) -> Iterator[None]:
    """Every rank's file takes so much longer, and is read from the tensors only at the end of that time."""
    write = saving._LocalWriter.write_data

    def late(self: Any, *args: Any) -> Any:
        time.sleep(seconds)
        return write(self, *args)

    with patch.object(saving._LocalWriter, "write_data", late):
        yield


def entries(folder: str | Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- beside the training


def train_on_while_saving(folder: str, mode: str) -> tuple[bool, list[str], list[str]]:
    """A rank's job: was it still being written; tensors changed since; tensors that are not those of the save."""
    model, optimizers = begin_with_state()
    saver, expected = saver_of(folder, mode), state_of(model, optimizers)
    with slow_disk(0.3):
        ended = saver.save(model, optimizers, Progress(step=1))
        busy = saver.busy
        update(model, optimizers, -3.0)
        ended += saver.wait()
    assert [saved.error for saved in ended] == [""]
    changed = differing(state_of(model, optimizers), expected)
    load(StoragePath.at(folder) / "step-1", model, optimizers)
    return busy, changed, differing(state_of(model, optimizers), expected)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_trained_during_a_save_is_not_in_it(ranks: Ranks, tmp_path: Path, mode: str) -> None:
    for busy, changed, wrong in ranks.run(2, train_on_while_saving, str(tmp_path), mode):
        assert busy == (mode in BESIDE)
        assert len(changed) == 4 * 39, "an update that leaves tensors as they were proves nothing"
        assert wrong == []


def test_the_copies_matter(ranks: Ranks, tmp_path: Path) -> None:
    for _, _, wrong in ranks.run(2, train_on_the_saved_tensors, str(tmp_path)):
        assert wrong, "the test above could not fail"


def train_on_the_saved_tensors(folder: str) -> Any:
    with patch.object(saving._Copies, "take", lambda self, tensors: tensors):
        return train_on_while_saving(folder, "async")


def save_thrice_at_once(folder: str, mode: str) -> tuple[list[list[int]], list[Saved], list[list[str]]]:
    """A rank's job: steps that each of three saves, and two waits, said were over; how they ended; wrong tensors."""
    model, optimizers = begin_with_state()
    saver, states, ended = saver_of(folder, mode), [], []
    with slow_disk(0.2):
        for step in (1, 2, 3):
            ended.append(saver.save(model, optimizers, Progress(step=step)))
            states.append(state_of(model, optimizers))
            update(model, optimizers, float(step))
        ended += [saver.wait(), saver.wait()]
    wrong = []
    for step, expected in enumerate(states, 1):
        place = StoragePath.at(folder) / f"step-{step}"
        assert verify_on_all_ranks(place).progress.step == step
        load(place, model, optimizers)
        wrong.append(differing(state_of(model, optimizers), expected))
    return [[saved.step for saved in part] for part in ended], [saved for part in ended for saved in part], wrong


@pytest.mark.parametrize("mode", MODES)
def test_a_save_still_running_is_waited_for_and_none_is_dropped(ranks: Ranks, tmp_path: Path, mode: str) -> None:
    for order, ended, wrong in ranks.run(2, save_thrice_at_once, str(tmp_path), mode):
        assert order == ([[], [1], [2], [3], []] if mode in BESIDE else [[1], [2], [3], [], []])
        assert wrong == [[], [], []]
        assert [saved.error for saved in ended] == [""] * 3
        assert all(saved.stall_s > 0.1 for saved in ended), "training stood still for each, if only later"
    assert entries(tmp_path) == ["step-1", "step-2", "step-3"]


def stall_of(folder: str, mode: str) -> Saved:
    """A rank's job: a save during which the training has other things to do."""
    model, optimizers = begin_with_state()
    saver = saver_of(folder, mode)
    with slow_disk(1.0):
        ended = saver.save(model, optimizers, Progress(step=1))
        while not ended:
            time.sleep(0.05)
            ended = saver.poll()
    assert saver.poll() == saver.wait() == []
    return ended[0]


@pytest.mark.parametrize("mode", MODES)
def test_the_stall_is_what_the_training_waited(ranks: Ranks, tmp_path: Path, mode: str) -> None:
    for saved in ranks.run(2, stall_of, str(tmp_path), mode):
        assert saved.save_s > 1.0
        assert saved.stall_s < 0.5 if mode in BESIDE else saved.stall_s >= saved.save_s


# --- a save that fails leaves nothing behind, and what was there


@contextlib.contextmanager
def full_after(spare: int, suffix: str) -> Iterator[None]:
    """The disk takes `spare` bytes of a file of DCP's whose name ends in `suffix`, no more."""
    create = FileSystem.create_stream

    class Full:
        def __init__(self, stream: Any) -> None:
            self._stream, self._left = stream, spare

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

        def write(self, data: Any) -> int:
            self._left -= memoryview(data).nbytes
            if self._left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._stream.write(data)

    @contextlib.contextmanager
    def limited(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with create(self, path, mode) as stream:
            yield Full(stream) if str(path).endswith(suffix) else stream

    with patch.object(FileSystem, "create_stream", limited):
        yield


@contextlib.contextmanager
def no_manifest() -> Iterator[None]:
    def write(self: StoragePath, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.object(StoragePath, "write", write):
        yield


FULL = {
    "rank 1's tensors": (1, lambda: full_after(20_000, "distcp")),
    "rank 0's tensors": (0, lambda: full_after(20_000, "distcp")),
    "the index": (0, lambda: full_after(100, ".metadata.tmp")),
    "the manifest": (0, no_manifest),
}


def fail_in_between(folder: str, mode: str, case: str) -> tuple[str, list[str], list[str]]:
    """A rank's job, three saves of which the second fails: its error, the folder after it, wrong tensors of the first.

    On rank 1 the folder may still hold what rank 0 is about to delete.
    """
    culprit, full = FULL[case]
    model, optimizers = begin_with_state()
    saver, first = saver_of(folder, mode), state_of(model, optimizers)
    assert not save_and_wait(saver, model, optimizers, 1).error
    update(model, optimizers, 2.0)
    with full() if dist.get_rank() == culprit else contextlib.nullcontext():
        failed = save_and_wait(saver, model, optimizers, 2)
    dist.barrier()
    left = entries(folder)
    assert failed.bytes == 0 and failed.step == 2
    verify_on_all_ranks(StoragePath.at(folder) / "step-1")
    assert not save_and_wait(saver, model, optimizers, 3).error
    verify_on_all_ranks(StoragePath.at(folder) / "step-3")
    load(StoragePath.at(folder) / "step-1", model, optimizers)
    return failed.error, left, differing(state_of(model, optimizers), first)


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_fills_up_on_one_rank(ranks: Ranks, tmp_path: Path, mode: str, case: str) -> None:
    for error, left, wrong in ranks.run(2, fail_in_between, str(tmp_path), mode, case):
        assert error == f"rank {FULL[case][0]}: {NO_SPACE}"
        assert left == ["step-1"] and wrong == []
    assert entries(tmp_path) == ["step-1", "step-3"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB: room for two checkpoints of WIDE."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no small disk can be made: {error}")
    if mounted.returncode:
        pytest.skip(f"no small disk can be made: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_the_disk(disk: str, mode: str) -> tuple[str, list[str], int]:
    """A rank's job: error and folder of the save for which there was no room, bytes it did not give back."""
    model, optimizers = begin_with_state(FSDP2, WIDE)
    folder, ballast = os.path.join(disk, "checkpoint"), Path(disk, "ballast")
    saver = saver_of(folder, mode)
    assert not save_and_wait(saver, model, optimizers, 1).error
    if dist.get_rank() == 0:
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - (1 << 20)))
    dist.barrier()
    before = shutil.disk_usage(disk).free
    assert before <= 1 << 20
    failed = save_and_wait(saver, model, optimizers, 2)
    dist.barrier()
    left, lost = entries(folder), before - shutil.disk_usage(disk).free
    verify_on_all_ranks(StoragePath.at(folder) / "step-1")
    if dist.get_rank() == 0:
        ballast.unlink()
    dist.barrier()
    assert not save_and_wait(saver, model, optimizers, 3).error
    verify_on_all_ranks(StoragePath.at(folder) / "step-3")
    return failed.error, left, lost


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_disk_that_is_really_full(ranks: Ranks, small_disk: Path, mode: str) -> None:
    for error, left, lost in ranks.run(2, fill_the_disk, str(small_disk), mode):
        assert error in (f"rank 0: {NO_SPACE}", f"rank 1: {NO_SPACE}")
        assert left == ["step-1"] and lost == 0
    assert entries(small_disk / "checkpoint") == ["step-1", "step-3"]


def save_into(folders: list[str]) -> str:
    """A rank's job: a save into the folder of its rank; its error."""
    model, optimizers = begin_with_state()
    return save_and_wait(saver_of(folders[dist.get_rank()]), model, optimizers, 1).error


def test_a_folder_that_the_ranks_do_not_share(ranks: Ranks, tmp_path: Path) -> None:
    folders = [str(tmp_path / machine / "checkpoint") for machine in ("a", "b")]
    for error in ranks.run(2, save_into, folders):
        assert error == (
            "rank 0: OSError: __1_0.distcp, which another rank has written, cannot be seen from rank 0: checkpoints "
            "need a folder that all machines share"
        )
    assert entries(folders[0]) == [] and "step-1" not in entries(folders[1])
    assert ranks.run(2, save_into, folders[:1] * 2) == ["", ""]


# --- which checkpoint a run goes on from


def save_two(folder: str) -> None:
    model, optimizers = begin_with_state()
    saver = saver_of(folder, "disabled")
    for step in (1, 2):
        assert not save_and_wait(saver, model, optimizers, step).error
        update(model, optimizers, 2.0)


@pytest.fixture(scope="module")
def two(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of steps 1 and 2, by two ranks."""
    folder = tmp_path_factory.mktemp("two")
    ranks.run(2, save_two, str(folder))
    return folder


@pytest.fixture
def damaged(two: Path, tmp_path: Path) -> Path:
    """A copy of them to damage."""
    return Path(shutil.copytree(two, tmp_path / "checkpoint"))


def go_on(folder: str, load_step: int = -1, keep: bool = False) -> tuple[int | None, str, list[str], list[str]]:
    """A rank's job: step, error, what was said, and tensors that are not those of the step that was found."""
    _, said = quiet_world()
    model, optimizers = begin_with_state()
    expected = [state_of(model, optimizers)]
    update(model, optimizers, 2.0)
    expected.append(state_of(model, optimizers))
    try:
        manifest = find_good(StoragePath.at(folder), load_step, keep)
    except UserError as error:
        return None, str(error), from_rank_0(lambda: said), []
    said = from_rank_0(lambda: said)  # it alone warns
    if manifest is None:
        return None, "", said, []
    step = manifest.progress.step
    load(StoragePath.at(folder) / f"step-{step}", model, optimizers)
    return step, "", said, differing(state_of(model, optimizers), expected[step - 1])


def alike(answers: list[Any]) -> Any:
    assert all(answer == answers[0] for answer in answers), answers
    return answers[0]


def truncate(step: Path) -> str:
    file = step / "__1_0.distcp"
    size = file.stat().st_size
    os.truncate(file, size - 7)
    return f"is damaged: __1_0.distcp has {size - 7} bytes of {size}"


def flip(step: Path, name: str = "__0_0.distcp") -> str:
    data = bytearray((step / name).read_bytes())
    data[len(data) // 2] ^= 4
    (step / name).write_bytes(data)
    return f"is damaged: {name} is not what was written (its checksum differs)"


def remove(step: Path) -> str:
    (step / "__1_0.distcp").unlink()
    return "is damaged: __1_0.distcp is missing"


def flip_the_index(step: Path) -> str:
    return flip(step, ".metadata")


def remove_the_manifest(step: Path) -> str:
    (step / MANIFEST).unlink()
    return f"is no whole checkpoint: it has no {MANIFEST}"


def cut_the_manifest(step: Path) -> str:
    os.truncate(step / MANIFEST, 100)
    return "is damaged or not dtron's"


DAMAGES = [truncate, flip, remove, flip_the_index, remove_the_manifest, cut_the_manifest]


def test_the_newest_is_taken(ranks: Ranks, two: Path) -> None:
    before = entries(two)
    assert alike(ranks.run(2, go_on, str(two))) == (2, "", [], [])
    assert alike(ranks.run(2, go_on, str(two), 1)) == (1, "", [], [])
    assert alike(ranks.run(2, go_on, str(two / "nothing"))) == (None, "", [], [])
    assert entries(two) == before
    _, error, _, _ = alike(ranks.run(2, go_on, str(two), 7))
    assert "has no checkpoint of step 7 with optimizer state" in error and "(1, 2)" in error


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    ranks: Ranks, damaged: Path, damage: Callable[[Path], str]
) -> None:
    what = damage(damaged / "step-2")
    contents = entries(damaged / "step-2")
    step, error, said, wrong = alike(ranks.run(2, go_on, str(damaged), -1, True))
    assert (step, error, wrong) == (1, "", []) and len(said) == 1
    assert entries(damaged) == ["step-1", "step-2"], "keep moves nothing"
    step, error, said, wrong = alike(ranks.run(2, go_on, str(damaged)))
    assert (step, error, wrong) == (1, "", [])
    first, second = said
    assert first.startswith("warning: ") and "step-2" in first and what in first
    assert first.endswith("; going back to the checkpoint before it")
    assert second == f"warning: {damaged}/step-2 is kept as step-2.damaged"
    assert entries(damaged) == ["step-1", "step-2.damaged"] and entries(damaged / "step-2.damaged") == contents
    assert alike(ranks.run(2, go_on, str(damaged))) == (1, "", [], []), "and is not looked at again"


def test_nothing_starts_from_scratch_where_all_are_damaged(ranks: Ranks, damaged: Path) -> None:
    remove(damaged / "step-1"), flip(damaged / "step-2")
    for keep in (True, False, False):  # --max-restarts tries again
        step, error, said, _ = alike(ranks.run(2, go_on, str(damaged), -1, keep))
        assert step is None and len(said) == 2
        assert error.startswith(f"no checkpoint in {damaged} is as it was written; nothing starts from scratch")
        assert entries(damaged) == ["step-1", "step-2"]
    for name in ("step-1", "step-2"):
        (damaged / name).rename(damaged / f"{name}.damaged")
    step, error, said, _ = alike(ranks.run(2, go_on, str(damaged)))
    assert step is None and "nothing starts from scratch" in error


def test_a_file_that_cannot_be_read_now_is_no_damage(ranks: Ranks, damaged: Path) -> None:
    """A storage that fails for a moment must not put the newest checkpoint out of use."""
    for name in ("__1_0.distcp", "dtron.json"):
        file = damaged / "step-2" / name
        file.rename(damaged / "kept")
        file.symlink_to(file)
        step, error, said, _ = alike(ranks.run(2, go_on, str(damaged)))
        assert step is None and said == [] and name in error and "cannot be read" in error
        assert "symbolic links" in error
        (damaged / "kept").rename(file)
        assert entries(damaged) == ["step-1", "step-2"]
    assert alike(ranks.run(2, go_on, str(damaged))) == (2, "", [], [])


def test_a_damaged_one_that_was_asked_for_is_an_error(ranks: Ranks, damaged: Path) -> None:
    what = truncate(damaged / "step-2")
    step, error, said, _ = alike(ranks.run(2, go_on, str(damaged), 2))
    assert (step, said) == (None, []) and error == f"{damaged}/step-2 {what}"
    assert entries(damaged) == ["step-1", "step-2"]
    assert alike(ranks.run(2, go_on, str(damaged), 1)) == (1, "", [], [])


# --- behind a URL


def through_a_url(url: str) -> dict[str, Any]:
    """A rank's job, in one process whose memory is the store: save, retain, find, load."""
    folder, (_, said) = StoragePath.at(url), quiet_world()
    model, optimizers = begin_with_state(ONE)
    saver = saver_of(url, keep_latest_k=2)
    states, seen = {}, {}
    for step in (1, 2, 3):
        update(model, optimizers, float(step))
        states[step] = state_of(model, optimizers)
        saved = save_and_wait(saver, model, optimizers, step)
        assert not saved.error and not saved.warnings, saved
    seen["files of step 1"] = (folder / "step-1").names()
    seen["retained"] = steps_in(folder)
    for name in ("__0_0.distcp", ".metadata"):
        (folder / "step-9" / name).write((folder / "step-3" / name).read())
    seen["whole"] = steps_in(folder)
    manifest = find_good(folder, -1, False)
    assert manifest and manifest.progress.step == 3 and not said
    load(folder / "step-3", model, optimizers)
    seen["wrong"] = differing(state_of(model, optimizers), states[3])
    data = (folder / "step-3" / "__0_0.distcp").read()
    (folder / "step-3" / "__0_0.distcp").write(data[:-1])
    manifest = find_good(folder, -1, False)
    assert manifest and manifest.progress.step == 2
    load(folder / "step-2", model, optimizers)
    seen["wrong before"] = differing(state_of(model, optimizers), states[2])
    return {**seen, "said": said, "aside": len((folder / "step-3.damaged").names())}


def test_a_url(ranks: Ranks) -> None:
    url = "memory://bucket/run/checkpoint"
    (seen,) = ranks.run(1, through_a_url, url)
    assert seen["files of step 1"] == [] and seen["retained"] == [2, 3]
    assert seen["whole"] == [2, 3], "what has no manifest yet is no checkpoint"
    assert seen["wrong"] == seen["wrong before"] == []
    assert len(seen["said"]) == 2 and "step-3 is damaged: __0_0.distcp has" in seen["said"][0]
    assert seen["said"][1] == f"warning: {url}/step-3 is kept as step-3.damaged"
    assert seen["aside"] == 3


# --- parts of a checkpoint, and other people's


def load_without(checkpoint: str, exclude: list[str], with_optimizer: bool) -> dict[str, str]:
    """A rank's job: what became of each tensor: loaded, initial, zero or something else."""
    saved_model, saved_optimizers = begin_with_state()
    load(StoragePath.at(checkpoint), saved_model, saved_optimizers)
    expected = state_of(saved_model, saved_optimizers)
    _, model, optimizers = begin(Case("fresh", FSDP2))
    initial = state_of(model, None)
    load(StoragePath.at(checkpoint), model, optimizers if with_optimizer else None, exclude)
    fates = {}
    for name, tensor in state_of(model, optimizers).items():
        kinds = {"loaded": expected[name], "initial": initial.get(name), "zero": torch.zeros_like(tensor)}
        fates[name] = next((kind for kind, value in kinds.items() if value is not None and value.equal(tensor)), "odd")
    return fates


@pytest.mark.parametrize("with_optimizer", [False, True], ids=["weights only", "with the optimizer"])
def test_parts_that_are_not_loaded(ranks: Ranks, two: Path, with_optimizer: bool) -> None:
    exclude = ["layers.2.*", "lm_head.weight"]
    fates = alike(ranks.run(2, load_without, str(two / "step-2"), exclude, with_optimizer))
    assert len(fates) == 39 * (4 if with_optimizer else 1)
    for name, fate in fates.items():
        if "layers.2." not in name and "lm_head" not in name:
            assert fate == "loaded", name
        else:
            assert fate == ("initial" if name.startswith("model.") else "zero"), name


def refused(folder: str) -> str:
    model, _ = begin_with_state()
    try:
        load_initial(StoragePath.at(folder), model, None, [], model.parts[0])
    except UserError as error:
        return str(error)
    return "loaded"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_folder_that_is_no_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    assert alike(ranks.run(2, refused, str(tmp_path))) == f"{tmp_path} is no whole checkpoint: it has no {MANIFEST}"
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=str(tmp_path / "other"))
    error = alike(ranks.run(2, refused, str(tmp_path / "other")))
    assert error == (f"{tmp_path}/other is neither a checkpoint of dtron (it has no {MANIFEST}) nor one of torchtitan")
    (tmp_path / "other" / ".metadata").write_bytes(b"something else")
    assert ".metadata cannot be read" in alike(ranks.run(2, refused, str(tmp_path / "other")))


# --- bytes a rank

WORLDS = (1, 2, 4, 8)
# Measured: torch.save's frame of a piece has 1,577 bytes, the index 321 a piece at most, on 2 ranks, and 193 on 8.
PIECE_BYTES, INDEX_BYTES = 1600, 350


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Bytes this rank reads: of tensors as DCP asks for them, and of whole files to verify them."""
    read, verified = dcp.FileSystemReader.read_data, StoragePath.crc32
    counts = {"loaded": 0, "verified": 0}

    def counted_read(self: Any, plan: Any, planner: Any) -> Any:
        counts["loaded"] += sum(self.storage_data[item.storage_index].length for item in plan.items)
        return read(self, plan, planner)

    def counted_crc32(self: StoragePath) -> int:
        counts["verified"] += self.size()
        return verified(self)

    with (
        patch.object(dcp.FileSystemReader, "read_data", counted_read),
        patch.object(StoragePath, "crc32", counted_crc32),
    ):
        yield counts


def bytes_of(folder: str, degrees: Degrees) -> tuple[int, int, dict[str, int]]:
    """A rank's job: bytes and pieces of the state, each counted once, and the bytes this rank reads to go on."""
    model, optimizers = begin_with_state(degrees, WIDE)
    assert not save_and_wait(saver_of(folder), model, optimizers, 1).error
    tensors = [tensor for _, tensor, _ in named_tensors(model, optimizers)]
    state = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    pieces = sum(degrees.dp_shard if tensor.dim() else 1 for tensor in tensors)
    with counting() as counts:
        verify_on_all_ranks(StoragePath.at(folder) / "step-1")
        load(StoragePath.at(folder) / "step-1", model, optimizers)
    return state, pieces, counts


@pytest.mark.parametrize("replicas", [1, 2], ids=["fsdp", "hsdp"])
def test_bytes_a_rank_do_not_grow_with_the_world(ranks: Ranks, tmp_path: Path, replicas: int) -> None:
    """Each rank writes, and verifies, its part of one copy of the state, and reads the shards that it holds."""
    for world in (world for world in WORLDS if world >= replicas):
        degrees, folder = Degrees(dp_replicate=replicas, dp_shard=world // replicas), tmp_path / str(world)
        answers = ranks.run(world, bytes_of, str(folder), degrees)
        state, pieces, _ = answers[0]
        sizes = [file.stat().st_size for file in (folder / "step-1").glob("*.distcp")]
        index = (folder / "step-1" / ".metadata").stat().st_size
        assert len(sizes) == world
        assert state < sum(sizes) <= state + pieces * PIECE_BYTES, "one copy, and what torch.save puts around a piece"
        assert max(sizes) <= 1.1 * sum(sizes) / world
        for *_, counts in answers:
            # Scalars, which nothing can shard, lie in one rank's file and are read by all: 1.6 KB each.
            assert 0.9 < counts["loaded"] / (sum(sizes) / degrees.dp_shard) < 1.1
            assert counts["verified"] <= max(sizes) + index
        # The one thing that does grow: DCP's list of all pieces, which every rank reads.
        assert index <= pieces * INDEX_BYTES
