"""One rank's training between checkpoints, on any layout: what the tests of saving and loading run."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity.layout import CPU, Case, build, build_config, csv_file, local_batches

from dtron.checkpoint.files import Progress
from dtron.checkpoint.load import load, verify_on_all_ranks
from dtron.checkpoint.save import Saved, Saver
from dtron.checkpoint.storage import StoragePath
from dtron.config.sections import Checkpoint, Optimizer
from dtron.parallel.compose import ParallelModel
from dtron.train.optimizer import build_optimizers, clip_gradients, squared_gradient_norm

ADAMW = Optimizer(lr=1e-2, eps=1e-4)


def begin(case: Case, optimizer: Optimizer = ADAMW) -> tuple[Any, ParallelModel, list[torch.optim.Optimizer]]:
    """Mesh, model and optimizers of a case."""
    config = build_config(case)
    with csv_file(case, config) as config:
        mesh, model = build(case, config)
    return mesh, model, build_optimizers(model, optimizer)


def save_all(
    folder: str, model: ParallelModel, optimizers: Any, progress: Progress, **config: Any
) -> list[Saved]:  # fmt: skip
    """Save into `folder` and wait: how it ended."""
    saver = Saver(StoragePath.at(folder), Checkpoint(**{"keep_latest_k": 0, **config}))
    return [*saver.save(model, optimizers, progress), *saver.wait()]


def train(
    case: Case, first: int, last: int, load_from: str = "", save_to: str = "", model_only: bool = False,
    optimizer: Optimizer = ADAMW,
) -> list[tuple[float, float]]:  # fmt: skip
    """Steps [first, last) on this rank: global losses and gradient norms. save_to: the folder of the checkpoint."""
    mesh, model, optimizers = begin(case, optimizer)
    if load_from:
        verify_on_all_ranks(StoragePath.at(load_from))
        load(StoragePath.at(load_from), model, None if model_only else optimizers)
    head_tail = bool(build_config(case).parallelism.context_parallel_load_balancer)
    seen = []
    for step in range(first, last):
        model.loss.valid_tokens, parts = local_batches(step % 2, case, mesh, head_tail)
        loss = model.forward_backward(*parts[0], last=True)
        model.finish_gradients()
        squares = squared_gradient_norm(model.named_parameters(), model.aliases, case.degrees.stage, CPU)
        stats = torch.stack((loss.double() / case.degrees.tp, squares))
        dist.all_reduce(stats)
        clip_gradients(optimizers, stats[1].sqrt(), 0.5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen.append((stats[0].item(), stats[1].sqrt().item()))
    if save_to:
        (saved,) = save_all(save_to, model, optimizers, Progress(step=last, consumed=8 * last, global_batch_size=8))
        assert not saved.error, saved.error
    return seen


def checkpoint_of(folder: Path, step: int) -> str:
    return str(folder / f"step-{step}")
