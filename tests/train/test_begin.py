"""Where a run begins: what it warns of, what it refuses, and what is said of a changed length."""

from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import RankError, Ranks

from dtron.config import load
from dtron.train import begin as beginning
from dtron.train.launch import World
from dtron.train.setup import resolve


def said_at_begin(folder: str, arguments: str) -> list[str]:
    """What rank 0 is told while the folder and the checkpoint are chosen."""
    said: list[str] = []

    class Quiet(World):
        def say(self, text: str) -> None:
            said.append(text)

    rank, size = dist.get_rank(), dist.get_world_size()
    config = load(["--training.device", "cpu", "--job.dump_folder", folder, *arguments.split()])
    begun = beginning.begin(resolve(config, size), Quiet(rank, rank, size, dist.HashStore()))
    assert begun.resume_from is None and begun.progress.step == 0
    return said


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        ("--training.steps 1001", True),
        ("--training.steps 1000", False),
        ("--training.steps 1001 --checkpoint.enable", False),
    ],
)
def test_a_long_run_without_checkpoints_is_warned_of_in_one_line(
    ranks: Ranks, tmp_path: Path, arguments: str, warned: bool
) -> None:
    said = ranks.run(2, said_at_begin, str(tmp_path), arguments)[0]
    assert len(said) == warned
    if warned:
        assert said[0].startswith("warning: 1001 steps without checkpoints") and "\n" not in said[0]


def test_what_rank_0_finds_is_an_error_on_all(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments in ("--checkpoint.enable", ""):
        with pytest.raises(RankError, match="UserError: job.dump_folder .*file/x: .*Not a directory"):
            ranks.run(2, said_at_begin, str(tmp_path / "file" / "x"), arguments)


def one_rank_cannot_write(folder: str) -> str:
    """Local rank 0 of the second machine has a disk that is read-only."""
    original = beginning.check_writable

    def check(place: object, rank: int) -> None:
        if rank == 1:
            raise beginning.UserError("no checkpoint can be written here: read-only")
        original(place, rank)  # type: ignore[arg-type]

    beginning.check_writable = check  # type: ignore[assignment]
    rank, size = dist.get_rank(), dist.get_world_size()
    config = load(["--training.device", "cpu", "--job.dump_folder", folder, "--checkpoint.enable"])
    try:
        beginning.begin(resolve(config, size), World(rank, 0, size, dist.HashStore()))
    except beginning.UserError as error:
        return str(error)
    finally:
        beginning.check_writable = original
    return ""


def test_a_machine_that_cannot_write_is_found_before_the_first_step(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, one_rank_cannot_write, str(tmp_path)) == ["no checkpoint can be written here: read-only"] * 2
