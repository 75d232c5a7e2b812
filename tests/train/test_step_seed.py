"""The random numbers of a training step."""

import numpy as np
import pytest
from parallel.random_model import register
from ranks import Ranks
from tinyrun import quiet_world, tiny_setup
from torch import Tensor, nn

from dtron.train.trainer import Trainer


def _dropped(layout: str) -> list[np.ndarray]:
    """What a rank's dropout layers drop in each of two training steps."""
    register()
    trainer = Trainer(tiny_setup(f"--model.name dropout --training.steps 2 {layout}"), quiet_world()[0])
    dropped: list[np.ndarray] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dropped.append((output == 0).numpy())

    for module in trainer.model.parts[0].modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(record)
    trainer.run()
    return dropped


@pytest.mark.parametrize("layout", ["--tp 2", "--cp 2", "--dp 2", "--dp-replicate 2 --dp 1"])
def test_ranks_with_other_activations_drop_others(layout: str, ranks: Ranks, tmp_path):
    arguments = f"{layout} --activation_checkpoint.mode none --job.dump_folder {tmp_path}"
    one, other = ranks.run(2, _dropped, arguments)
    assert len(one) == len(other) == 2
    masks = [*one, *other]
    assert all(0.1 < mask.mean() < 0.5 for mask in masks)
    assert all((mask != before).any() for i, mask in enumerate(masks) for before in masks[:i])
