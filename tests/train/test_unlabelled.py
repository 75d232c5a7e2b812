"""A step without any label to predict changes nothing; a run that has no others ends."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankError, Ranks
from tinyrun import Counting, train_tiny
from torch.distributed.tensor import DTensor

from dtron import registry
from dtron.data import loader
from dtron.data.loader import IGNORE_INDEX
from dtron.observe.metrics import read_metrics
from dtron.train import step


class Masked(Counting):
    """Of global batches of 4, those from `first` to before `end` have no label; the others as usual."""

    def __init__(self, first: int, end: int) -> None:
        self._rows = range(4 * first, 4 * end)

    def __getitem__(self, i: int) -> Any:
        inputs, labels = super().__getitem__(i)
        return inputs, np.full_like(labels, IGNORE_INDEX) if i in self._rows else labels


def masked(config: Any, section: Any, *_: Any) -> Masked:
    first, end = section.dataset_path.split("-")
    return Masked(int(first), int(end))


def state_of(trainer: Any) -> list[torch.Tensor]:
    tensors = [p for _, p in trainer.model.named_parameters()]
    tensors += [value for o in trainer.optimizers for state in o.state.values() for value in state.values()]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def trained(folder: str, which: str, arguments: str) -> tuple[list[list[torch.Tensor]], list[dict[str, Any]], Any]:
    """Four steps of which those of `which` have no label: the state after each, the rows, what was told."""
    registry.register("dataset", "masked", masked)
    states: list[list[torch.Tensor]] = []
    original = step.Step.__call__

    def noting(self: Any, batch: Any) -> Any:
        states.append(state_of(self))
        return original(self, batch)

    step.Step.__call__ = noting  # type: ignore[method-assign]
    data = f"--training.dataset masked --training.dataset_path {which} --training.global_batch_size 4 "
    data += "--metrics.log_freq 1 --optimizer.lr 0.01 --optimizer.weight_decay 0.5 --lr_scheduler.warmup_steps 0"
    # In the data's own order, so that whole batches are masked.
    shuffled, loader.sample_indices = (
        loader.sample_indices,
        lambda first, count, n, seed, shuffle: np.arange(first, first + count) % n,
    )
    try:
        trainer, said = train_tiny(folder, 4, f"{data} {arguments}")
    finally:
        step.Step.__call__ = original  # type: ignore[method-assign]
        loader.sample_indices = shuffled
    states.append(state_of(trainer))
    return states, read_metrics(trainer.run_folder / "metrics.jsonl"), (said, trainer.progress)


@pytest.mark.parametrize(
    ("world", "arguments"),
    [
        (2, ""),
        (1, "--optimizer.implementation foreach"),
        (2, "--tp 2"),
        (2, "--pp 2 --model.n_layers 2 --parallelism.pipeline_parallel_microbatch_size 1"),
        (2, "--cp 2"),
    ],
)
def test_a_step_without_labels_changes_nothing(ranks: Ranks, tmp_path: Path, world: int, arguments: str) -> None:
    """The second of four: neither weights nor optimizer state, though both have a decay."""
    states, rows, (said, progress) = ranks.run(world, trained, str(tmp_path), "1-2", arguments)[0]
    changed = [any(not torch.equal(a, b) for a, b in zip(states[i], states[i + 1], strict=False)) for i in range(4)]
    assert changed == [True, False, True, True]
    assert ["loss" in row and "grad_norm" in row for row in rows] == [True, False, True, True]
    assert (progress.skipped, progress.skipped_in_a_row, progress.consumed) == (1, 0, 16)
    (line,) = [line for line in said if line.startswith("warning: step 2: no label to predict in the whole global")]
    assert line.endswith("its update is skipped (1 so far)")


def test_a_first_step_without_labels_can_be_saved_and_resumed(ranks: Ranks, tmp_path: Path) -> None:
    schedule = "--lr_scheduler.total_steps 4"
    whole = ranks.run(2, trained, str(tmp_path / "whole"), "0-1", schedule)[0][0][-1]
    saving = f"{schedule} --training.steps 2 --checkpoint.enable_first_step_checkpoint"
    ranks.run(2, trained, str(tmp_path / "parts"), "0-1", saving)
    (later,) = tmp_path.glob("parts/*/checkpoint/step-2")
    shutil.rmtree(later)
    resumed, _, (said, _) = ranks.run(2, trained, str(tmp_path / "parts"), "0-1", schedule)[0]
    assert any(line.endswith("checkpoint/step-1") for line in said)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed[-1], strict=True))


@pytest.mark.parametrize(("which", "steps", "last"), [("0-99", 4, 4), ("0-99", 20, 10), ("2-99", 20, 12)])
def test_a_run_without_labels_ends_in_one_message(
    ranks: Ranks, tmp_path: Path, which: str, steps: int, last: int
) -> None:
    expected = f"UserError: step {last}: no label to predict in the whole global batch: every one is masked"
    with pytest.raises(RankError, match=expected):
        ranks.run(2, trained, str(tmp_path), which, f"--training.steps {steps}")
