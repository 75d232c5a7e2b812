"""One rank's work in the parity matrix: train as dtron does and compare every weight with the single process."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from parity.single import (
    ATOL,
    ATOLS,
    BALANCE_LOSS,
    BIAS_RATE,
    CLIP,
    MODELS,
    OPTIMIZERS,
    ROWS,
    SECTIONS,
    SEQ,
    STEPS,
    Run,
    batch,
    document_starts,
    fp32_iteration,
    off,
)
from ranks import kept
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dtron import registry
from dtron.checkpoint.files import Progress
from dtron.config import Config, replace
from dtron.data.loader import Batch
from dtron.mesh import Degrees, Mesh
from dtron.parallel.compose import ParallelModel, parallelize
from dtron.parallel.context import gathered_positions, local_positions
from dtron.train.balance import Balance
from dtron.train.guard import StepGuard
from dtron.train.optimizer import build_optimizers
from dtron.train.step import Step
from dtron.train.tally import Tally

CPU = torch.device("cpu")
Weights = dict[str, np.ndarray]  # arrays, because tensors travel between processes by file descriptors


@dataclass(frozen=True)
class Case:
    """A layout, a model and the configuration keys that differ from `base_config`.

    batches: forward_backward calls an optimizer step. evaluate: an evaluation before each of them and
    another before the optimizer. csv: the text of a pipeline schedule.
    """

    name: str
    degrees: Degrees = field(default_factory=Degrees)
    keys: Mapping[str, Any] = field(default_factory=dict)
    model: str = "small"
    batches: int = 1
    evaluate: bool = False
    csv: str = ""
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    long: bool = False

    @property
    def masked(self) -> bool:
        return self.keys.get("training.attention_mask") == "document"


@dataclass
class Trained:
    """What a rank saw: whole-world losses and norms, and its own weights against the single process."""

    losses: list[float]
    norms: list[float]
    evaluated: list[float]
    wrong: dict[str, float]  # name -> largest difference in multiples of the tolerance, where above 1
    elements: dict[str, int]  # name -> elements compared on this rank
    counts: list[list[list[int]]]  # of each step, rows of each expert


def build_config(case: Case) -> Config:
    """The configuration of a case: fp32, no recomputation, then its own keys."""
    d = case.degrees
    keys = {
        "parallelism.pipeline_parallel_degree": d.pp,
        "parallelism.tensor_parallel_degree": d.tp,
        "parallelism.context_parallel_degree": d.cp,
        "parallelism.data_parallel_replicate_degree": d.dp_replicate,
        "parallelism.data_parallel_shard_degree": d.dp_shard,
        "parallelism.expert_parallel_degree": d.ep,
        "training.expert_balance_loss": BALANCE_LOSS,
        "training.expert_bias_rate": BIAS_RATE,
        "training.mixed_precision_param": "float32",
        "training.local_batch_size": ROWS // d.dp // case.batches,
        "training.global_batch_size": ROWS,
        "training.seq_len": SEQ,
        "training.loss_chunk_tokens": 40,  # several chunks, and unequal ones
        "training.steps": STEPS,
        "training.max_norm": CLIP,
        "lr_scheduler.warmup_steps": 0,
        "lr_scheduler.decay_ratio": 0.0,
        "activation_checkpoint.mode": "none",
    }
    return with_keys(Config(), keys | dict(case.keys))


def with_keys(config: Config, keys: Mapping[str, Any]) -> Config:
    """The configuration with other values, by dotted name."""
    for name, value in keys.items():
        config = replace(config, name, value)
    return config


def build(case: Case, config: Config) -> tuple[Mesh, ParallelModel]:
    """The mesh and this rank's part of the case's model."""
    dimensions = MODELS[case.model]
    mesh = kept(Mesh, case.degrees, "cpu", dimensions.moe is not None)
    spec = registry.look_up("model", "llama3", "model.name")
    converters = [registry.look_up("converter", name, "model.converters") for name in config.model.converters]
    return mesh, parallelize(spec, dimensions, config, mesh, CPU, registry.cross_entropy, converters)


@contextlib.contextmanager
def csv_file(case: Case, config: Config) -> Iterator[Config]:
    """The configuration with the case's CSV schedule in a file, for as long as the model is built."""
    with tempfile.TemporaryDirectory() as folder:
        if case.csv:
            path = os.path.join(folder, "schedule.csv")
            with open(path, "w") as file:
                file.write(case.csv)
            config = replace(config, "parallelism.pipeline_parallel_schedule_csv", path)
        yield config


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_batches(step: int, case: Case, mesh: Mesh, head_tail: bool) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """The valid tokens of the global batch; tokens, labels and positions of each of this rank's batches.

    For tests of parts of a step; the matrix itself runs `Step`.
    """
    tokens, labels = batch(step)
    positions = local_positions(SEQ, mesh.cp_rank, case.degrees.cp, head_tail)
    everywhere = gathered_positions(SEQ, case.degrees.cp, head_tail)
    mine = slice(mesh.dp_rank * ROWS // case.degrees.dp, (mesh.dp_rank + 1) * ROWS // case.degrees.dp)
    pairs = zip(tokens[mine].chunk(case.batches), labels[mine].chunk(case.batches), strict=True)
    parts = [(x[:, positions], y[:, positions], positions.expand(len(x), -1)) for x, y in pairs]
    if case.masked:
        starts = document_starts(step)[mine].chunk(case.batches)
        keys = [torch.stack((d[:, everywhere], everywhere.expand(len(d), -1)), 1) for d in starts]
        parts = [(*part, d[:, positions], k) for part, d, k in zip(parts, starts, keys, strict=True)]
    return (labels != -100).sum().float(), parts


def train(case: Case, references: Mapping[str, Weights], prepare: Callable[[ParallelModel], None] | None = None) -> Any:
    """The job of one rank: optimizer name -> Trained. prepare: changes the built model, to break it on purpose."""
    with csv_file(case, build_config(case)) as config:
        mesh, model = build(case, config)
    if prepare:
        prepare(model)
    named = list(model.named_parameters())
    initial = [local(p).detach().clone() for _, p in named]
    answers = {}
    for optimizer, expected in references.items():
        with torch.no_grad():
            for (_, p), value in zip(named, initial, strict=True):
                local(p).copy_(value)
        answers[optimizer] = _train_once(case, config, mesh, model, optimizer)
        _compare(named, model.aliases, expected, answers[optimizer], ATOLS.get(optimizer, ATOL))
    return answers


def _train_once(case: Case, config: Config, mesh: Mesh, model: ParallelModel, optimizer_name: str) -> Trained:
    """STEPS of dtron's own Step, on this rank's rows."""
    parameters = [p for _, p in model.named_parameters()]
    # SGD sees plain shards, to save a third of the matrix's time, AdamW the DTensors themselves, as in training.
    shards = [local(p).detach() for p in parameters]
    if section := SECTIONS.get(optimizer_name):
        optimizers, lr = build_optimizers(model, section, config.compile), section.lr
    else:
        optimizers = [OPTIMIZERS[optimizer_name](shards if optimizer_name == "SGD" else parameters)]
        lr = optimizers[0].param_groups[0]["lr"]

    def hand_over() -> None:
        for shard, p in zip(shards, parameters, strict=True):
            shard.grad = None if p.grad is None else local(p.grad)

    config = with_keys(config, {"optimizer.lr": lr})
    guard = StepGuard(config.training, optimizers, Progress(), CPU)
    dimensions, balance = MODELS[case.model], None
    if dimensions.moe:
        balance = Balance(model, config, dimensions.moe, dimensions.n_layers, CPU)
    step = Step(config, mesh, CPU, model, optimizers, guard, Progress(), Tally(CPU), balance, before_update=hand_over)
    trained = Trained([], [], [], {}, {}, [])
    mine = slice(mesh.dp_rank * ROWS // case.degrees.dp, (mesh.dp_rank + 1) * ROWS // case.degrees.dp)
    for number in range(STEPS):
        tokens, labels = batch(number)
        begins = document_starts(number)[mine] if case.masked else None
        with _evaluations(case, model) as evaluated, _counts(balance, trained.counts), fp32_iteration():
            stats, _ = step(Batch(tokens[mine], labels[mine], begins))
        for p in parameters:
            p.grad = None
        dist.all_reduce(evaluated)
        trained.losses.append(stats[0].item())
        trained.norms.append(stats[1].item())
        trained.evaluated.append(evaluated.item() / case.degrees.tp)
    return trained


@contextlib.contextmanager
def _counts(balance: Balance | None, counts: list[list[list[int]]]) -> Iterator[None]:
    """Note the counts of each step, of the layers with experts."""
    if balance is None:
        yield
        return

    def update_bias(n: Tensor, applied: Tensor) -> None:
        counts.append(n[balance._first :].tolist())
        Balance.update_bias(balance, n, applied)

    with patch.object(balance, "update_bias", update_bias):
        yield


@contextlib.contextmanager
def _evaluations(case: Case, model: ParallelModel) -> Iterator[Tensor]:
    """With case.evaluate, an evaluation before each forward_backward of a step, and one before its optimizer.

    Gives the sum of the losses of the former on this rank.
    """
    total = torch.zeros((), dtype=torch.float64)
    if not case.evaluate:
        yield total
        return
    first: list[tuple[Tensor, ...]] = []

    def forward_backward(*arguments: Tensor, last: bool) -> Tensor:
        first.append(arguments)
        total.add_(model.evaluate(*arguments))
        return ParallelModel.forward_backward(model, *arguments, last=last)

    def finish_gradients() -> None:
        model.evaluate(*first[0])
        ParallelModel.finish_gradients(model)

    with (
        patch.object(model, "forward_backward", forward_backward),
        patch.object(model, "finish_gradients", finish_gradients),
    ):
        yield total


@torch.no_grad()
def _compare(
    named: list[tuple[str, torch.nn.Parameter]], aliases: dict[str, str], expected: Weights, trained: Trained,
    atol: float,
) -> None:  # fmt: skip
    """Compare this rank's shard of every parameter with the same shard of the expected one."""
    for name, p in named:
        whole = torch.from_numpy(expected[aliases.get(name, name)])
        shard = whole  # a frozen parameter is whole on every rank
        if isinstance(p, DTensor):
            shard = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()
        trained.elements[name] = shard.numel()
        if (worst := off(local(p), shard, atol)) > 1:
            trained.wrong[name] = worst


def problems(case: Case, results: list[dict[str, Trained]], references: Mapping[str, Run]) -> list[str]:
    """Every way in which the ranks' results differ from the single process; empty where they are equal."""
    found = []
    for optimizer, expected in references.items():
        ranks = [result[optimizer] for result in results]
        if any(rank.counts != expected.counts for rank in ranks if expected.counts[0]):
            found.append(f"{optimizer}: rows of experts {ranks[0].counts}, expected {expected.counts}")
        pairs = [("loss", ranks[0].losses, expected.losses), ("norm", ranks[0].norms, expected.norms)]
        if case.evaluate:
            pairs.append(("evaluated loss", ranks[0].evaluated, expected.losses))
        for what, got, want in pairs:
            if not all(abs(g - w) <= 1e-5 * abs(w) for g, w in zip(got, want, strict=True)):
                found.append(f"{optimizer}: {what} {got}, expected {want}")
        wrong = {(rank, name): value for rank, r in enumerate(ranks) for name, value in r.wrong.items()}
        if wrong:
            rank, name = max(wrong, key=wrong.get)  # type: ignore[arg-type]
            found.append(f"{optimizer}: {len(wrong)} weights, worst {name} on rank {rank}: {wrong[rank, name]:.3g} x")
        found += _missing(case, ranks, expected, optimizer)
    return found


def _missing(case: Case, ranks: list[Trained], expected: Run, optimizer: str) -> list[str]:
    """Parameters that no rank compared, or of which some rank's copies lack a part."""
    compared: dict[str, int] = {}
    for r in ranks:
        for name, count in r.elements.items():
            compared[name] = compared.get(name, 0) + count
    copy_of = {"lm_head.weight": "embed_tokens.weight"} if MODELS[case.model].tie_embeddings else {}
    names = {copy_of.get(name, name) for name in compared}
    lost = [name for name in expected.weights if name not in names]
    partly = [name for name, n in compared.items() if not n or n % expected.weights[copy_of.get(name, name)].numel()]
    return [f"{optimizer}: not compared: {lost + partly}"] if lost + partly else []
