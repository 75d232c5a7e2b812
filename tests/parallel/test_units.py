"""What FSDP gathers together, and when: never the whole of what lies outside the blocks for the whole step."""

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from parity.layout import Case, build, build_config, local_batches
from parity.single import MODELS
from parity.table import ALWAYS, DDP2, FSDP2, FSDP2_TP2, NEVER, ONE, PP2_FSDP2
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.config.sections import Parallelism
from dtron.mesh import Degrees
from dtron.models.llama import Llama
from dtron.parallel.data import reshards_after_forward

LAYERS = MODELS["small"].n_layers
EMBEDDING, HEAD = {"embed_tokens"}, {"norm", "lm_head"}


@dataclass
class Step:
    """What is gathered within each block's forward and backward and at the loss; all-gathers until then and after."""

    forward: dict[int, set[str]] = field(default_factory=dict)
    at_loss: set[str] = field(default_factory=set)
    backward: dict[int, set[str]] = field(default_factory=dict)
    head_is_reduced: bool = False  # in the backward of the first block
    gathers: tuple[int, int] = (0, 0)
    left: set[str] = field(default_factory=set)  # after the step
    left_by_evaluation: set[str] = field(default_factory=set)


def gathered(part: nn.Module) -> set[str]:
    """Children and layers of which a whole parameter is in memory, by FSDP's own record."""
    names = set()
    for module in part.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):  # type: ignore[attr-defined]
            whole = [p for p in group.fsdp_params if p.sharded_state.name == "UNSHARDED"]
            names |= {".".join(p._param_fqn.split(".")[: 2 if "layers" in p._param_fqn else 1]) for p in whole}
    return names


def count(comm: CommDebugMode) -> int:
    """All-gathers by FSDP, which calls c10d, unlike tensor parallel."""
    calls: Counter[str] = Counter({str(op): n for op, n in comm.get_comm_counts().items()})
    return sum(n for op, n in calls.items() if "c10d." in op and "allgather" in op)


def watch(case: Case) -> Step:
    """The last forward and backward of a step without pipeline parallel, after an evaluation."""
    mesh, model = build(case, build_config(case))
    part, seen = model.parts[0], Step()
    model.loss.valid_tokens, (*before, batch) = local_batches(0, case, mesh, True)
    for earlier in before:
        model.forward_backward(*earlier, last=False)
    model.evaluate(*batch)
    seen.left_by_evaluation = gathered(part)

    def loss(hidden: Any, labels: Any) -> Any:
        seen.at_loss, seen.gathers = gathered(part), (count(comm), 0)
        return compute(hidden, labels)

    def see_backward(i: int) -> None:
        seen.backward[i] = gathered(part)
        seen.head_is_reduced = part.get_parameter("lm_head.weight").grad is not None

    for i, block in enumerate(part.layers.values()):  # type: ignore[operator,union-attr]
        block.mlp.register_forward_hook(lambda *_, i=i: seen.forward.update({i: gathered(part)}))
        block.mlp.register_full_backward_hook(lambda *_, i=i: see_backward(i))
    compute, model.loss.compute = model.loss.compute, loss
    with CommDebugMode() as comm:
        model.forward_backward(*batch, last=True)
    seen.gathers = seen.gathers[0], count(comm) - seen.gathers[0]
    seen.left = gathered(part)
    return seen


@pytest.mark.parametrize(("degrees", "batches"), [(FSDP2, 1), (FSDP2, 2), (FSDP2_TP2, 1)], ids=str)
def test_embedding_and_head_are_gathered_when_they_are_used(degrees: Degrees, batches: int, ranks: Ranks):
    for seen in ranks.run(degrees.world, watch, Case("", degrees, ALWAYS, batches=batches)):
        assert seen.forward == {i: {f"layers.{i}"} for i in range(LAYERS)}
        assert seen.at_loss == HEAD
        assert seen.backward == seen.forward  # what is gathered ahead does not count until it is waited for
        assert seen.head_is_reduced
        assert seen.gathers == (LAYERS + 2, LAYERS)  # the backward of a look-up needs no weights
        assert seen.left == seen.left_by_evaluation == set()


def test_without_resharding_all_is_gathered_once(ranks: Ranks):
    for seen in ranks.run(2, watch, Case("", FSDP2, NEVER)):
        assert seen.at_loss == EMBEDDING | HEAD | {f"layers.{i}" for i in range(LAYERS)}
        assert seen.gathers == (LAYERS + 2, 0)
        assert seen.left == seen.left_by_evaluation == set()


class Copies(TorchDispatchMode):
    """Elements of flat tensors, as FSDP gathers and reduces, that are divided out of place, or copied, or cast."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        divides = func.overloadpacket is torch.ops.aten.div and not func._schema.is_mutable
        copies = func.overloadpacket is torch.ops.aten.copy_ and args[0].data_ptr() != args[1].data_ptr()
        casts = func.overloadpacket is torch.ops.aten._to_copy
        if args and (divides or copies or casts) and args[0].ndim == 1:
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def per_microbatch(case: Case) -> list[tuple[int, int, int]]:
    """Of each of a step's two microbatches: units that are gathered, and elements that gathering and reducing copy or
    divide; nothing is left gathered.
    """
    mesh, model = build(case, build_config(case))
    model.loss.valid_tokens, batches = local_batches(0, case, mesh, True)
    seen, gathers, gathering, reducing = [], [], Copies(), Copies()

    def watched(function: Any, copies: Copies) -> Any:
        def call(group: FSDPParamGroup, *args: Any) -> None:
            with copies:
                function(group, *args)

        return call

    original = FSDPParamGroup._to_unsharded
    with (
        patch.object(FSDPParamGroup, "_to_unsharded", lambda group: (gathers.append(group), original(group))),
        patch.object(FSDPParamGroup, "wait_for_unshard", watched(FSDPParamGroup.wait_for_unshard, gathering)),
        patch.object(FSDPParamGroup, "post_backward", watched(FSDPParamGroup.post_backward, reducing)),
    ):
        for i, batch in enumerate(batches):
            gathers.clear()
            gathering.elements = reducing.elements = 0
            model.forward_backward(*batch, last=i == len(batches) - 1)
            seen.append((len(gathers), gathering.elements, reducing.elements))
    assert gathered(model.parts[0]) == set()
    return seen


BF16 = {"training.mixed_precision_param": "bfloat16"}
KEPT, GATHERED_TWICE = (LAYERS + 2, 0), (2 * LAYERS + 2, 2 * LAYERS + 2)


@pytest.mark.parametrize(
    ("degrees", "keys", "gathers"),
    [
        (ONE, {}, KEPT),
        (ONE, BF16, KEPT),
        (FSDP2, NEVER, KEPT),
        (FSDP2, {}, GATHERED_TWICE),
        (ONE, ALWAYS, GATHERED_TWICE),
        (DDP2, {}, KEPT),
        (DDP2, {**BF16, **ALWAYS}, GATHERED_TWICE),
    ],
)
def test_kept_weights_are_gathered_once_per_step(
    degrees: Degrees, keys: Any, gathers: tuple[int, int], ranks: Ranks
) -> None:
    """One rank and replicas keep them by default. Their reductions neither divide nor copy; nor do their weights, but
    for the cast to bf16, which is one copy.
    """
    seen = ranks.run(degrees.world, per_microbatch, Case("", degrees, keys, batches=2))[0]
    assert tuple(n for n, _, _ in seen) == gathers
    if degrees != FSDP2:
        assert [elements for *_, elements in seen] == [0, 0]
        whole = Llama(MODELS["small"])
        parts = [whole, whole.layers] if gathers == GATHERED_TWICE else [whole]
        cast = sum(p.numel() for part in parts for p in part.parameters())
        assert seen[0][1] == (cast if "training.mixed_precision_param" in keys else 0)


@pytest.mark.parametrize(
    ("setting", "mesh", "parameters", "reshards"),
    [
        ("default", (1, 1, 1), 10**9, False),
        ("default", (1, 1, 1), 5 * 10**9, True),
        ("default", (1, 1, 4), 5 * 10**9, False),
        ("default", (1, 2, 1), 10**9, True),
        ("default", (2, 2, 1), 5 * 10**9, False),
        ("always", (1, 1, 1), 10**9, True),
        ("never", (1, 2, 1), 5 * 10**9, False),
    ],
)
def test_weights_are_kept_where_they_fit(
    setting: Any, mesh: tuple[int, int, int], parameters: int, reshards: bool
) -> None:
    """mesh: (pp, dp_shard, tp). 18 bytes per parameter, of a GPU of 80 GB at most half."""
    pp, shards, tp = mesh
    fsdp = SimpleNamespace(ndim=1, size=lambda dim: shards)
    made: Any = SimpleNamespace(fsdp=fsdp, expert_fsdp=None, degrees=Degrees(pp, dp_shard=shards, tp=tp))
    p = Parallelism(fsdp_reshard_after_forward=setting)
    assert reshards_after_forward(p, made, parameters, 80 * 10**9) == reshards
    assert reshards_after_forward(p, made, parameters, None) == (reshards and (shards > 1 or setting == "always"))


def test_tied_embedding_and_head_stay_in_one_unit(ranks: Ranks):
    for seen in ranks.run(2, watch, Case("", FSDP2, ALWAYS, "tied")):
        assert all(EMBEDDING | {"norm"} <= names for names in (*seen.forward.values(), seen.at_loss))
        assert seen.gathers == (LAYERS + 1, LAYERS)
        assert seen.left == seen.left_by_evaluation == set()


def units(part: nn.Module) -> list[list[str]]:
    """What each FSDP unit outside the blocks owns the parameters of, the root left out."""
    modules = [module for module in part.children() if isinstance(module, FSDPModule)]
    groups = {module._get_fsdp_state(): module._get_fsdp_state()._fsdp_param_group for module in modules}  # type: ignore[attr-defined]
    return [sorted({p._param_fqn.split(".")[0] for p in group.fsdp_params}) for group in groups.values()]


def stage_units(case: Case) -> tuple[list[list[str]], set[str]]:
    """This rank's units, and what is gathered after a step of the schedule and an evaluation."""
    mesh, model = build(case, build_config(case))
    model.loss.valid_tokens, (batch,) = local_batches(0, case, mesh, True)
    model.forward_backward(*batch, last=True)
    model.evaluate(*batch)
    (part,) = model.parts
    return units(part), gathered(part)


@pytest.mark.parametrize("model", ["small", "tied"])
def test_a_stage_has_the_units_it_holds(model: str, ranks: Ranks):
    """On stages of their own, tied matrices are copies, so they are units of their own too."""
    first, _, last, _ = ranks.run(4, stage_units, Case("", PP2_FSDP2, model=model))
    assert first == ([["embed_tokens"]], set()) and last == ([["lm_head", "norm"]], set())
