"""Checkpoints of a mixture of experts: of any layout to any other, whatever their expert parallel degrees."""

from typing import Any

import numpy as np
import pytest
import torch
from checkpoint.training import ADAMW, begin, checkpoint_of, save_all
from parity.layout import CPU, Case, build_config
from parity.single import MODELS, ROWS, batch
from parity.table import CP2_EP2, EP2, FSDP2_EP2, FSDP2_TP2_EP4, FSDP4, ONE, PP2_EP2
from ranks import Ranks
from torch.distributed.tensor import DTensor

from dtron.checkpoint.files import Progress
from dtron.checkpoint.load import load, verify_on_all_ranks
from dtron.checkpoint.save import named_tensors
from dtron.checkpoint.storage import StoragePath
from dtron.config import replace
from dtron.data.loader import Batch
from dtron.parallel.compose import ParallelModel
from dtron.train.balance import Balance
from dtron.train.guard import StepGuard
from dtron.train.step import Step
from dtron.train.tally import Tally

SOURCES = {"ep2": EP2, "fsdp2 tp2 ep4": FSDP2_TP2_EP4, "pp2 ep2": PP2_EP2}
TARGETS = {"one": ONE, "fsdp4": FSDP4, "fsdp2 ep2": FSDP2_EP2, "cp2 ep2": CP2_EP2, **SOURCES}
MODEL, BEFORE = "moe all", 2
State = dict[str, np.ndarray]


def state_of(model: ParallelModel, optimizers: list[torch.optim.Optimizer]) -> State:
    """Weights, the biases that balance the experts, and AdamW's state of what this rank holds, whole, by name."""
    whole: State = {}
    for name, tensor, _ in named_tensors(model, optimizers):
        whole[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().numpy()
    return whole


def steps(case: Case, model: Any, mesh: Any, optimizers: list[torch.optim.Optimizer], first: int, last: int) -> Any:
    """Steps [first, last) as the trainer makes them: loss and norm of each."""
    config = replace(build_config(case), "optimizer.lr", ADAMW.lr)
    dimensions = MODELS[MODEL]
    assert dimensions.moe is not None
    balance = Balance(model, config, dimensions.moe, dimensions.n_layers, CPU)
    guard, progress = StepGuard(config.training, optimizers, Progress(), CPU), Progress(step=first)
    step = Step(config, mesh, CPU, model, optimizers, guard, progress, Tally(CPU), balance)
    mine = slice(mesh.dp_rank * ROWS // case.degrees.dp, (mesh.dp_rank + 1) * ROWS // case.degrees.dp)
    seen = []
    for number in range(first, last):
        tokens, labels = batch(number)
        stats, _ = step(Batch(tokens[mine], labels[mine], None))
        seen.append(tuple(stats[:2].tolist()))
    return seen


def train_and_save(case: Case, folder: str) -> tuple[State, Any]:
    """The state that is saved after BEFORE steps, and the loss and norm of the step after it."""
    mesh, model, optimizers = begin(case)
    steps(case, model, mesh, optimizers, 0, BEFORE)
    state = state_of(model, optimizers)
    (saved,) = save_all(folder, model, optimizers, Progress(step=BEFORE, global_batch_size=ROWS))
    assert not saved.error, saved.error
    return state, steps(case, model, mesh, optimizers, BEFORE, BEFORE + 1)


def load_and_train(case: Case, folder: str) -> tuple[State, Any]:
    mesh, model, optimizers = begin(case)
    verify_on_all_ranks(StoragePath.at(folder))
    load(StoragePath.at(folder), model, optimizers)
    return state_of(model, optimizers), steps(case, model, mesh, optimizers, BEFORE, BEFORE + 1)


def merged(answers: list[tuple[State, Any]]) -> State:
    return {name: tensor for state, _ in answers for name, tensor in state.items()}


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, State, Any]]:
    """source -> its checkpoint, what is in it, and the loss and norm of the next step."""
    found = {}
    for name, degrees in SOURCES.items():
        folder = tmp_path_factory.mktemp("experts")
        answers = ranks.run(degrees.world, train_and_save, Case(name, degrees, model=MODEL), str(folder), share=degrees)
        found[name] = checkpoint_of(folder, BEFORE), merged(answers), answers[0][1]
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_layout_loads_every_other_layouts(
    ranks: Ranks, saved: dict[str, tuple[str, State, Any]], target: str
) -> None:
    """Bit for bit, and the next step is the one that the uninterrupted run made."""
    degrees = TARGETS[target]
    for source, (folder, state, following) in saved.items():
        answers = ranks.run(degrees.world, load_and_train, Case("", degrees, model=MODEL), folder, share=degrees)
        got = merged(answers)
        assert got.keys() == state.keys()
        assert [name for name in got if not np.array_equal(got[name], state[name])] == [], source
        assert answers[0][1] == [pytest.approx(pair, rel=1e-5) for pair in following], source


def test_what_is_saved_has_the_names_of_the_plain_model(saved: dict[str, tuple[str, State, Any]]) -> None:
    for _, state, _ in saved.values():
        experts = state["model.layers.2.mlp.experts.gate_proj"]
        assert experts.shape == (8, 32, 32) and "optimizer.layers.2.mlp.experts.gate_proj.exp_avg" in state
        bias = state["model.layers.2.mlp.gate.e_score_correction_bias"]
        assert np.abs(bias).max() > 0 and not any(name.endswith(".load") for name in state)
