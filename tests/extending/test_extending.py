"""A model, a data set, an optimizer, a converter, a loss and Trainers from outside, trained by dtron's own loop."""

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from dtron import registry
from dtron.config import load
from dtron.errors import UserError
from dtron.observe.metrics import read_metrics
from dtron.ranks.world import World
from dtron.train.resolve import resolve
from dtron.train.trainer import Trainer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()
FILES = {text.split('"""')[1].split(":")[0]: text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}
CONFIG = """
[job]
custom_import = ["my_parts", "extending.outside_model"]
[metrics]
log_freq = 1
enable_tensorboard = false
[model]
n_layers = 4
dim = 32
n_heads = 4
n_kv_heads = 4
vocab_size = 96
[optimizer]
eps = 1e-4  # see tests/parity/single.py
lr = 1e-2
[lr_scheduler]
warmup_steps = 0
[training]
dataset = "counting"
device = "cpu"
seq_len = 32
local_batch_size = 2
global_batch_size = 8
steps = 3
mixed_precision_param = "float32"
"""
GPT = ["--model.name", "gpt", "--model.flavor", "tiny"]
LAYOUTS = {
    "dp2 x tp2": (4, "--dp 2 --tp 2"),
    "pp2": (2, "--pp 2 --training.local_batch_size 4"),
    "cp2 compiled": (2, "--cp 2 --compile.enable --compile.backend aot_eager"),
}


@dataclass
class Result:
    """A run as rank 0 logged it, and the whole weights of one rank's stages."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    next_tokens: np.ndarray


def work(folder: str, trainer: type[Trainer] | str, arguments: list[str]) -> Result:
    """The job of one rank. trainer: a class, or the name of one in the page's my_train.py."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    rank, size = dist.get_rank(), dist.get_world_size()
    cls = getattr(importlib.import_module("my_train"), trainer) if isinstance(trainer, str) else trainer
    t = cls(resolve(load(arguments), size), World(rank, rank, size, dist.HashStore()))
    t.run()
    weights = {name: p.full_tensor().detach().numpy() for name, p in t.model.named_parameters()}
    rows = read_metrics(t.run_folder / "metrics.jsonl") if rank == 0 else []
    tokens = t.next_batch()[0].numpy()
    return Result([row["loss"] for row in rows], [row["grad_norm"] for row in rows], weights, tokens)


class Runner:
    """Trains with the files that docs/extending.md shows in reach."""

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self.ranks, self.folder, self.runs = ranks, folder, 0

    def __call__(self, *more: str, world: int = 1, trainer: type[Trainer] | str = Trainer) -> Result:
        self.runs += 1
        outputs = str(self.folder / f"outputs-{self.runs}")
        arguments = ["--job.config_file", str(self.folder / "run.toml"), "--job.dump_folder", outputs, *more]
        results = self.ranks.run(world, work, str(self.folder), trainer, arguments)
        for result in results[1:]:
            results[0].weights |= result.weights
        return results[0]


@pytest.fixture(scope="module")
def train(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("extending")
    for name, text in {**FILES, "run.toml": CONFIG}.items():
        (folder / name).write_text(text)
    return Runner(ranks, folder)


@pytest.fixture(scope="module")
def plain(train: Runner) -> Result:
    return train()


@pytest.fixture(scope="module")
def gpt(train: Runner) -> Result:
    return train(*GPT)


def assert_equal(many: Result, one: Result) -> None:
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(many.norms, one.norms, rtol=1e-5)
    assert many.weights.keys() == one.weights.keys()
    for name, weight in one.weights.items():
        np.testing.assert_allclose(many.weights[name], weight, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_from_outside_is_the_same_on_every_layout(layout: str, train: Runner, gpt: Result) -> None:
    world, degrees = LAYOUTS[layout]
    assert len(gpt.losses) == 3 and gpt.losses[-1] < gpt.losses[0] - 0.1
    assert_equal(train(*GPT, *degrees.split(), world=world), gpt)


def test_parts_and_trainer_of_the_page_are_the_same_on_two_layouts(train: Runner) -> None:
    keys = ["--model.converters", "geglu", "--training.loss", "capped"]
    one = train(*keys, trainer="MyTrainer")
    layout = ["--pp", "2", "--tp", "2", "--training.local_batch_size", "4"]
    assert_equal(train(*keys, *layout, world=4, trainer="MyTrainer"), one)


def test_registered_dataset_takes_effect(plain: Result) -> None:
    steps = np.diff(plain.next_tokens, axis=1) % 96
    assert plain.next_tokens.shape == (8, 32) and (steps == 1).all()


def test_registered_optimizer_takes_effect(train: Runner, plain: Result) -> None:
    sign = train("--optimizer.name", "SignDescent", "--optimizer.lr", "1e-3", "--training.steps", "2")
    assert sign.losses[0] == plain.losses[0] and sign.norms[0] == plain.norms[0]
    assert sign.losses[1] != plain.losses[1]


def test_registered_loss_takes_effect(train: Runner, plain: Result) -> None:
    capped = train("--training.loss", "capped")  # the cap is hardly felt: its first logits are near 0
    assert capped.losses[2] != plain.losses[2] and capped.losses == pytest.approx(plain.losses, rel=1e-2)


def test_converter_takes_effect(train: Runner, plain: Result) -> None:
    converted = train("--model.converters", "geglu", "--training.steps", "1")
    assert converted.losses[0] != plain.losses[0]
    assert converted.weights.keys() == plain.weights.keys()


class Doubled(Trainer):
    def build_loss(self) -> Any:
        return lambda logits, labels: 2 * registry.cross_entropy(logits, labels)


class Climbing(Trainer):
    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=1.0, maximize=True) for part in self.model.parts]


class Repeating(Trainer):
    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((8, 32), 5), torch.full((8, 32), 7)


def test_every_joint_of_the_trainer_takes_effect(train: Runner, plain: Result) -> None:
    doubled, repeating = train(trainer=Doubled), train(trainer=Repeating)
    climbing = train("--optimizer.lr", "3", trainer=Climbing)
    assert doubled.losses[0] == pytest.approx(2 * plain.losses[0], rel=1e-6)
    assert doubled.norms[0] == pytest.approx(2 * plain.norms[0], rel=1e-5)
    assert climbing.losses[0] == plain.losses[0] and climbing.losses[2] > plain.losses[0] + 0.1
    assert (repeating.next_tokens == 5).all() and repeating.losses[2] < plain.losses[2]


def test_name_is_registered_once_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="registered already"):
        registry.register("optimizer", "AdamW", torch.optim.AdamW)
    registry.register("optimizer", "SGD", registry.look_up("optimizer", "SGD", "optimizer.name"))  # itself: no change
    with pytest.raises(UserError, match=r"optimizer.name = 'AdanW' is unknown; did you mean 'AdamW'\?"):
        registry.look_up("optimizer", "AdanW", "optimizer.name")
    with pytest.raises(UserError, match="job.custom_import: cannot import 'no_such_module'"):
        registry.import_custom(["no_such_module"])
