"""A step never makes the host wait for the device, but where it is to: a stand-in device records what would."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from on_gpu import needs_gpu, run_on_gpu
from parity.layout import Case, build_config, with_keys
from parity.single import MODELS, ROWS, SEQ, batch
from parity.table import ONE
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import TorchDispatchMode

from dtron import registry
from dtron.checkpoint.files import Progress
from dtron.config.optimizer import Optimizer
from dtron.data.loader import Batch
from dtron.data.order import Mixture
from dtron.models.llama import Llama
from dtron.observe.phases import Phases
from dtron.parallel.compose import ParallelModel, TokenMean
from dtron.train import forward
from dtron.train import step as step_module
from dtron.train.balance import Balance
from dtron.train.guard import StepGuard
from dtron.train.optimizer import build_optimizers
from dtron.train.report import StepClock
from dtron.train.slowest import Slowest
from dtron.train.step import Step
from dtron.train.tally import Tally
from dtron.train.trainer import Trainer

SOURCES = ("a", "b")
DEVICE = torch.device("meta")  # it has no values, so that reading one raises


class Waits(TorchDispatchMode):
    """What would wait: values that the host reads, and copies between the CPU and the device, unless without waiting.

    Such a copy has to be non_blocking and, to the device, of pinned memory. Notes pinning, which needs a GPU, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.copies, self._pinned = list[str](), 0, set[int]()

    def pin(self, t: Tensor) -> Tensor:
        pinned = t.clone()
        self._pinned.add(pinned.untyped_storage().data_ptr())
        return pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in ("_local_scalar_dense", "nonzero", "is_pinned", "equal") and tensors[0].device == DEVICE:
            self.seen.append(name)
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], kwargs.get("device")) if name == "_to_copy" else (args[1], args[0].device)
            if target is not None and source.device != target and torch.device("cpu") in (source.device, target):
                self.copies += 1
                pinned = source.device == DEVICE or source.untyped_storage().data_ptr() in self._pinned
                waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
                if waits or not pinned:
                    self.seen.append(f"{name} of {tuple(source.shape)} {source.device} to {target}")
            if source.device == DEVICE and target is not None and target.type == "cpu":
                return torch.zeros(source.shape, dtype=source.dtype)
        return func(*args, **kwargs)


class OnDevice(ParallelModel):
    """The plain model on the stand-in device, whose parameters look as FSDP's do on one rank."""

    def forward_backward(self, tokens: Tensor, labels: Tensor, *extra_inputs: Tensor, last: bool) -> Tensor:
        loss = self.loss(self.parts[0](tokens, *extra_inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def named_parameters(self) -> Any:
        return self.shards.items()  # type: ignore[attr-defined]

    def finish_gradients(self) -> None:
        for (_, shard), p in zip(self.named_parameters(), self.parts[0].parameters(), strict=True):
            shard.grad, p.grad = DTensor.from_local(p.grad, self.mesh, [Replicate()]), None  # type: ignore[attr-defined]


def waits(optimizer: Optimizer, broken: bool, log: bool = False) -> tuple[list[str], int]:
    """What waited in two steps of two batches, and the number of copies.

    broken: copies are made as by default. log: of what comes after the steps when a row is due, with all its parts.
    """
    config = with_keys(
        build_config(Case("", ONE, batches=2)), {"training.spike_factor": 2.0 * (optimizer.name != "SGD")}
    )
    mesh = init_device_mesh("cpu", (1,))
    with DEVICE:
        plain = Llama(MODELS["shallow"])
    model = OnDevice([plain], None, TokenMean(registry.cross_entropy, DEVICE), {}, True, False)
    model.mesh = mesh  # type: ignore[attr-defined]
    model.shards = {  # type: ignore[attr-defined]
        name: nn.Parameter(DTensor.from_local(p.detach(), mesh, [Replicate()])) for name, p in plain.named_parameters()
    }
    plain_parameters, plain.parameters = plain.parameters, lambda: iter(model.shards.values())  # type: ignore[attr-defined, method-assign, assignment]
    optimizers = build_optimizers(model, optimizer)
    plain.parameters = plain_parameters  # type: ignore[method-assign]
    guard = StepGuard(config.training, optimizers, Progress(), DEVICE)
    guard._cuda = True
    degrees: Any = SimpleNamespace(degrees=ONE, cp_rank=0, dp_rank=0, pp_rank=0, tp_rank=0)
    counted: Any = (Mixture([1, 1]), SEQ, [SEQ], sum) if log else ()
    tally = Tally(DEVICE, SOURCES, *counted)
    step = Step(config, degrees, DEVICE, model, optimizers, guard, Progress(), tally)
    seen = Waits()
    copy = forward.to_device if not broken else lambda host, device: host.to(device)
    with (
        patch.object(dist, "all_reduce", lambda *_: None),
        patch.object(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None)),
        patch.object(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda p: None),
        patch.object(Tensor, "pin_memory", lambda t: seen.pin(t)),
        patch.object(step_module, "to_device", copy),
        patch.object(forward, "to_device", copy),
        seen,
    ):
        for number in range(2):
            tokens, labels = batch(number)
            stats, local_loss = step(Batch(tokens, labels, sources=torch.arange(ROWS) % 2))
            guard.watch(number + 1, stats, local_loss)
        if log:
            seen.seen, seen.copies = [], 0
            write_row(step, stats)
    return seen.seen, seen.copies


def write_row(step: Step, stats: Tensor) -> None:
    """What the Trainer does when a row is due: loss and norm, sources, documents, experts, memory and times."""
    dimensions, rows = MODELS["moe"], list[Any]()
    assert dimensions.moe is not None
    with DEVICE:
        parts: Any = SimpleNamespace(parts=[Llama(dimensions)])
    step.balance = Balance(parts, step.config, dimensions.moe, dimensions.n_layers, DEVICE)
    world: Any = SimpleNamespace(rank=0, size=1, store=SimpleNamespace(set=lambda *_: None))
    trainer: Any = SimpleNamespace(
        step=step, progress=step.progress, phases=Phases(torch.device("cpu")),
        slowest=Slowest(world, SimpleNamespace(pp_rank=0), DEVICE),  # type: ignore[arg-type]
        data=SimpleNamespace(metrics=lambda consumed: {}, say_epochs=lambda row: None),
        report=SimpleNamespace(step=lambda row, clock: rows.append(row)),
    )  # fmt: skip
    Trainer._log(trainer, stats, StepClock())
    assert {"loss", "max_memory_bytes", "source_loss/a", "attended_tokens", "expert_load"} <= set(rows[0])


OPTIMIZERS = [Optimizer(), Optimizer(state_dtype="bfloat16"), Optimizer(name="SGD"), Optimizer(name="Muon")]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: f"{o.name} {o.state_dtype}")
def test_a_step_waits_for_nothing(ranks: Ranks, optimizer: Optimizer) -> None:
    seen, copies = ranks.run(1, waits, optimizer, False)[0]
    assert seen == []
    assert copies == 2 * 6  # of tokens, labels, positions, count and sources to the device, of the statistics from it


def test_a_logged_step_waits_once(ranks: Ranks) -> None:
    """For the copy of all that is logged; what the host knows is reduced on the CPU."""
    seen, copies = ranks.run(1, waits, Optimizer(), False, True)[0]
    assert len(seen) == copies == 1, seen


def test_usual_copies_are_seen_to_wait(ranks: Ranks) -> None:
    seen, _ = ranks.run(1, waits, Optimizer(), True)[0]
    assert len(seen) == 2 * 4 and f"_to_copy of ({ROWS}, 32) cpu to meta" in seen


def test_a_value_that_is_read_is_seen() -> None:
    with Waits() as seen, pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device=DEVICE).item()
    assert seen.seen == ["_local_scalar_dense"]


@needs_gpu
def test_a_step_on_a_gpu_synchronises_nothing(tmp_path: Path) -> None:
    """torch's own detector, of whole steps of the Trainer: after the first, which makes memory and streams.

    And once where the step is logged.
    """
    program = f"""
import warnings
import torch
from tinyrun import train_tiny
from dtron.train.step import Step
from dtron.train.trainer import Trainer
torch.cuda.set_device(0)
call, log, watched, waits = Step.__call__, Trainer._log, [], []
def watch(step, batch):
    if not step.progress.step:
        return call(step, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = call(step, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    watched.append(step.progress.step)
    return result
def watch_log(*args):
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        log(*args)
    torch.cuda.set_sync_debug_mode("default")
    waits.append(sum("called a synchronizing" in str(warning.message) for warning in seen))
Step.__call__, Trainer._log = watch, watch_log
torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
arguments = "--metrics.log_freq 1 --training.device cuda --training.mixed_precision_param bfloat16"
train_tiny({str(tmp_path)!r}, 5, arguments)
torch.cuda.set_sync_debug_mode("error")
try:
    torch.ones((), device="cuda").item()
except RuntimeError:
    watched.append("a wait is seen")
print(watched, waits)
"""
    assert run_on_gpu(program).splitlines()[-1] == "[2, 3, 4, 5, 'a wait is seen'] [1, 1, 1, 1, 1]"
