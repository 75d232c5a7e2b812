"""A training of seconds on the ranks of the pool, with a model of one layer, and what rank 0 is told by it."""

import logging
from typing import Any

import torch
import torch.distributed as dist

from dtron import registry
from dtron.config import load
from dtron.ranks.world import World
from dtron.train.resolve import resolve
from dtron.train.setup import Setup
from dtron.train.trainer import Trainer

MODEL = (
    "--model.n_layers 1 --model.dim 16 --model.n_heads 2 --model.n_kv_heads 2 --model.ffn_dim 16 "
    "--model.vocab_size 96 --training.dataset tiny_counting --training.seq_len 16 --training.local_batch_size 2 "
    "--training.device cpu --metrics.no_enable_tensorboard"
)


class Counting:
    """Sequence i counts from i."""

    vocab_size, tokenizer_json = 96, None

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> Any:
        text = torch.arange(i, i + 17).numpy() % 96
        return text[:-1], text[1:]


def counting(*_: Any) -> Counting:
    return Counting()


class Collecting(logging.Handler):
    """Keeps what dtron logs: the level in front of what is more than information."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self.lines.append(level + record.getMessage())


def quiet_world() -> tuple[World, list[str]]:
    """This rank of the pool's running group, and the list that what it logs goes to."""
    log, collecting = logging.getLogger("dtron"), Collecting()
    log.handlers, log.propagate = [collecting], False
    log.setLevel(logging.INFO)
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, rank, size, dist.HashStore()), collecting.lines


def tiny_setup(arguments: str) -> Setup:
    """The tiny model's configuration, in which `arguments` come last."""
    registry.register("dataset", "tiny_counting", counting)
    return resolve(load(f"{MODEL} {arguments}".split()), dist.get_world_size())


def train_tiny(folder: str, steps: int, arguments: str) -> tuple[Trainer, list[str]]:
    """Train for `steps` in job.dump_folder `folder`, with checkpoints: the trainer, and what rank 0 was told."""
    world, said = quiet_world()
    begin = f"--checkpoint.enable --training.steps {steps} --job.dump_folder {folder}"
    trainer = Trainer(tiny_setup(f"{begin} {arguments}"), world)
    trainer.run()
    return trainer, said
