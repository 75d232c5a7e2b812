"""What a save warns of, and what it refuses to lose."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.training import begin, save_all
from parity.layout import Case
from parity.table import FSDP2
from ranks import Ranks
from tinyrun import train_tiny

from dtron import registry
from dtron.checkpoint import save
from dtron.checkpoint.files import Progress, steps_in
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError


def _retention_fails(folder: str) -> list[tuple[str, tuple[str, ...], list[int]]]:
    def unreadable(*_: Any) -> list[str]:
        raise UserError("dtron.json cannot be read: Input/output error")

    original, save.delete_old = save.delete_old, unreadable
    try:
        _, model, optimizers = begin(Case("", FSDP2))
        ended = save_all(folder, model, optimizers, Progress(step=1))
    finally:
        save.delete_old = original
    return [(saved.error, saved.warnings, steps_in(StoragePath.at(folder))) for saved in ended]


def test_an_error_in_deleting_old_checkpoints_is_no_failed_save(ranks: Ranks, tmp_path: Path) -> None:
    """Else rank 0 alone would believe that the save has failed, and part from the others at the end of the run."""
    first, second = ranks.run(2, _retention_fails, str(tmp_path))
    assert [(error, steps) for error, _, steps in first + second] == [("", [1]), ("", [1])]
    assert first[0][1] == (
        f"old checkpoints in {tmp_path} were not deleted: dtron.json cannot be read: Input/output error",
    )
    assert second[0][1] == ()


class Counting(torch.optim.SGD):
    """Keeps a plain number for each parameter, as many hand-written optimizers do."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["calls"] = self.state[p].get("calls", 0) + 1


def _train(folder: str, arguments: str) -> int:
    registry.register("optimizer", "counting", _counting)
    trainer, _ = train_tiny(folder, 2, f"--optimizer.name counting {arguments}")
    return trainer.progress.step


def _counting(groups: Any, c: Any) -> torch.optim.Optimizer:
    return Counting(groups, lr=c.lr)


def test_state_that_is_no_tensor_is_refused_rather_than_lost(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(
        Exception, match=r"Counting keeps calls = 1 \(int\) for embed_tokens.weight, and checkpoints hold"
    ):
        ranks.run(1, _train, str(tmp_path / "saving"), "")
    assert ranks.run(1, _train, str(tmp_path / "not"), "--checkpoint.no_enable") == [2]
