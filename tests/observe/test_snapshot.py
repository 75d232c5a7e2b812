"""Memory snapshots: when they are written and what of, with stand-ins for CUDA's record."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dtron.compat import tracing
from dtron.config.sections import Profiling
from dtron.observe.snapshot import MAX_ENTRIES, MemorySnapshots

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of torch, whose snapshots are empty files here."""
    asked: list[Any] = []

    def history(enabled: str | None = "all", max_entries: int = 0) -> None:
        asked.append(max_entries if enabled else "off")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", history)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: Path(file).touch())
    return asked


def snapshots(folder: Path, device: torch.device = CUDA, on: bool = True, done: int = 0) -> MemorySnapshots:
    return MemorySnapshots(Profiling(enable_memory_snapshot=on, profile_freq=2), folder, 3, device, steps_done=done)


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.pickle"))


def test_one_every_profile_freq_steps_of_the_run(tmp_path: Path, recorded: list[Any]) -> None:
    with snapshots(tmp_path, done=3) as made:
        for _ in range(4):
            made.step()
    assert written(tmp_path) == [f"memory_snapshot/iteration_{n}/rank_3.pickle" for n in (4, 6)]
    assert recorded == [MAX_ENTRIES, "off"]


def test_one_when_a_step_runs_out_of_memory(tmp_path: Path, recorded: list[Any]) -> None:
    with pytest.raises(torch.OutOfMemoryError), snapshots(tmp_path) as made:
        made.step()
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert written(tmp_path) == ["memory_snapshot/iteration_2_oom/rank_3.pickle"] and recorded[-1] == "off"
    with pytest.raises(ValueError), snapshots(tmp_path / "other"):
        raise ValueError
    assert written(tmp_path / "other") == []


def test_off_and_on_a_cpu_nothing_is_recorded(
    tmp_path: Path, recorded: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with snapshots(tmp_path, on=False) as off, snapshots(tmp_path, CPU) as on_cpu:
        for _ in range(2):
            off.step()
            on_cpu.step()
    assert written(tmp_path) == recorded == []
    assert capsys.readouterr().out == "", "rank 3 is silent"
    MemorySnapshots(Profiling(enable_memory_snapshot=True), tmp_path, 0, CPU)
    assert "enable_memory_snapshot = true has no effect: snapshots are of CUDA memory" in capsys.readouterr().out


def test_a_full_disk_does_not_end_the_training(
    tmp_path: Path, recorded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(file: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracing, "dump_memory_snapshot", full)
    with snapshots(tmp_path, done=1) as made:
        made.step()
    assert "No space left on device; the training continues" in capsys.readouterr().out
