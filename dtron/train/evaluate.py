"""`train.py --validation.only`: the loss of a checkpoint on a validation set, on any layout; nothing is trained."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dtron import compat, registry
from dtron.checkpoint.load import check_source
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError
from dtron.mesh import Mesh
from dtron.models.spec import experts_of
from dtron.observe.console import format_evaluation, human_seconds
from dtron.parallel.compose import parallelize
from dtron.ranks.agree import from_rank_0
from dtron.ranks.control import LONG_S
from dtron.ranks.world import World
from dtron.train.data import open_held_out
from dtron.train.forward import mean_loss
from dtron.train.initial import check_vocabulary, load_weights
from dtron.train.setup import Setup, describe

__all__ = ["Evaluation", "Result"]

log = logging.getLogger(__name__)

PROGRESS_S = 10.0  # from one line of progress to the next


@dataclass(frozen=True)
class Result:
    """loss: nats per token, the mean over `tokens`, those that have a label; seconds: without the start-up."""

    loss: float
    tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


class Evaluation:
    """One checkpoint on one rank, from a checked `Setup` inside a started process group.

    It has no run folder and writes nothing, but for a validation set that is tokenized into job.cache_folder. So there
    is no watchdog, which leaves its findings in that folder: ranks that wait for others end by the timeouts of [comm].
    """

    def __init__(self, setup: Setup, world: World) -> None:
        self.setup, self.world, c = setup, world, setup.config
        self.device = setup.device(world.local_rank)
        assert c.checkpoint.initial_load_path is not None
        self.checkpoint = StoragePath.at(c.checkpoint.initial_load_path)
        world.control.start_run(None)
        world.control.heartbeat("evaluating", LONG_S)
        from_rank_0(lambda: check_source(self.checkpoint))
        log.info(describe(setup, self.device))
        self.mesh = Mesh(setup.degrees, setup.device_type, experts_of(setup.model_config) is not None)
        compat.set_timeout(c.comm.init_timeout_seconds)  # torch gives the groups of a mesh 30 minutes
        vocab_size = setup.model_config.vocab_size
        self.held_out = open_held_out(c, vocab_size, setup.degrees, self.mesh.dp_rank, world)
        check_vocabulary(c, self.held_out.dataset)
        self.model = parallelize(
            setup.spec, setup.model_config, c, self.mesh, self.device,
            registry.look_up("loss", c.training.loss, "training.loss"),
            [registry.look_up("converter", name, "model.converters") for name in c.model.converters],
        )  # fmt: skip
        load_weights(setup, self.model, None)

    def run(self) -> Result:
        """Evaluate and log the result. UserError on all ranks if the loss is not finite."""
        config, loader = self.setup.config, self.held_out.loader
        began = time.perf_counter()
        progress = ProgressLines(len(loader), lambda: compat.set_timeout(config.comm.train_timeout_seconds))
        found = mean_loss(self.model, loader, config, self.mesh, self.device, progress)
        assert found is not None  # nothing stops it but a signal, which ends the process
        loss, tokens = found
        result = Result(loss, tokens, time.perf_counter() - began)
        what = config.validation.dataset_path or config.validation.dataset
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of {self.checkpoint} on {what} is {loss}: its weights are not finite, or what is computed "
                "from them; training.mixed_precision_param = float32 shows whether it is the precision"
            )
        log.info(format_evaluation(str(self.checkpoint), what, loss, result.perplexity, tokens, result.seconds))
        self.world.control.done(0)
        return result


class ProgressLines:
    """A line about every 10 s. Called after each batch, on every rank; first_done: called after the first."""

    def __init__(self, batches: int, first_done: Callable[[], None]) -> None:
        self._batches, self._first_done = batches, first_done
        self._done = self._told = 0
        self._next = 1
        self._since = time.perf_counter()

    def __call__(self, total: Tensor) -> bool:
        """False: see `mean_loss`. total: this rank's share of [summed loss, tokens] so far.

        Collective at the same batches everywhere, since all ranks choose the next by the mean of their clocks.
        """
        self._done += 1
        if self._done < self._next or self._done == self._batches:
            return False
        elapsed = torch.full_like(total[:1], time.perf_counter() - self._since)
        whole = torch.cat((total, elapsed))
        dist.all_reduce(whole)
        loss, tokens, seconds = whole.tolist()
        seconds /= dist.get_world_size()
        if self._done == 1:
            self._first_done()
        if seconds > PROGRESS_S / 2 and tokens:
            left_s = seconds / (self._done - self._told) * (self._batches - self._done)
            log.info(
                f"batch {self._done} of {self._batches}: loss so far {loss / tokens:.4f} nats per token; "
                f"{human_seconds(left_s)} left"
            )
        a_line = PROGRESS_S * (self._done - self._told) / max(seconds, 1e-6)  # batches
        self._next = self._done + max(1, min(self._done, round(a_line)))  # at most twice as many: early ones mislead
        self._told, self._since = self._done, time.perf_counter()
        return False
