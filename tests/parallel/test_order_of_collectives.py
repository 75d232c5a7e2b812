"""The order in which a step issues collectives and computes: what overlaps can, whatever the speed of the host."""

import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from parity.layout import Case, build, build_config, local_batches
from parity.single import MODELS
from parity.table import ALLTOALL, ALWAYS, CP2, CP4, FSDP2, FSDP2_EP2, HSDP, compiled
from ranks import Ranks
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.compat import cp_impl, units

LAYERS = MODELS["small"].n_layers
Event = tuple[str, int]


def record(case: Case) -> tuple[list[Event], list[Event]]:
    """What the second microbatch's forward and backward issue, and compute: the feed-forward stands for its block.

    Units are numbered: -1 the embedding, then the blocks, last the head.
    """
    mesh, model = build(case, build_config(case))
    part, events = model.parts[0], list[Event]()
    unshard, all_reduce = FSDPParamGroup.unshard, dist.all_reduce
    reducing = FSDPParamGroup.post_backward

    def gather(group: Any, *args: Any, **kwargs: Any) -> None:
        issues = group._all_gather_result is None and not group.is_unsharded
        unshard(group, *args, **kwargs)
        if issues and group._all_gather_result is not None:
            events.append(("gather", numbers[id(group)]))

    def reduce(group: Any, *args: Any) -> None:
        events.append(("reduce", numbers[id(group)]))
        reducing(group, *args)

    def counted(*args: Any, **kwargs: Any) -> Any:
        events.append(("all-reduce", events[-1][1]))
        return all_reduce(*args, **kwargs)

    for i, block in enumerate(part.layers.values()):  # type: ignore[operator,union-attr]
        block.mlp.register_forward_pre_hook(lambda *_, i=i: events.append(("compute", i)))
        block.mlp.register_full_backward_hook(lambda *_, i=i: events.append(("compute", i)))
    model.loss.valid_tokens, batches = local_batches(0, case, mesh, True)
    model.forward_backward(*batches[0], last=False)  # FSDP names its parameters then
    events.clear()
    numbers: dict[int, int] = {}
    for one in units.fsdp_groups(part):
        name = one.fsdp_params[0]._param_fqn or ""
        outside = -1 if name.startswith("embed") else LAYERS
        numbers[id(one)] = int(name.split(".")[1]) if name.startswith("layers.") else outside
    at_loss: list[int] = []
    compute = model.loss.compute
    model.loss.compute = lambda *args: (at_loss.append(len(events)), compute(*args))[1]
    with (
        patch.object(FSDPParamGroup, "unshard", gather),
        patch.object(FSDPParamGroup, "post_backward", reduce),
        patch.object(dist, "all_reduce", counted),
    ):
        model.forward_backward(*batches[1], last=True)
    return events[: at_loss[0]], events[at_loss[0] :]


@pytest.mark.parametrize(
    "case",
    [Case("fsdp2", FSDP2), Case("hsdp2x2", HSDP), Case("fsdp2 ep2", FSDP2_EP2, model="moe")],
    ids=lambda case: case.name,
)
def test_weights_are_gathered_before_the_block_before_computes(case: Case, ranks: Ranks) -> None:
    case = Case(case.name, case.degrees, ALWAYS, case.model, batches=2)
    forward, backward = ranks.run(case.degrees.world, record, case)[0]
    for i in range(LAYERS):
        assert forward.index(("gather", i)) < forward.index(("compute", i - 1 if i else 0))
        assert i == LAYERS - 1 or backward.index(("gather", i)) < backward.index(("compute", i + 1))
    assert forward.index(("gather", LAYERS)) < forward.index(("compute", LAYERS - 1))  # the head
    for i in range(1, LAYERS):  # behind the backward of the block before
        assert backward.index(("reduce", i)) < backward.index(("compute", i - 1))
        if case.degrees.dp_replicate > 1:
            assert backward.index(("all-reduce", i)) < backward.index(("compute", i - 1))


class Overlap(TorchDispatchMode):
    """Of each message of the ring, in the order of their issue: is attention computed before it is waited for?"""

    def __init__(self) -> None:
        super().__init__()
        self.messages, self._sent = list[bool](), dict[int, int]()  # address -> which message

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
            return NotImplemented  # what it does comes here again
        result, name = func(*args, **(kwargs or {})), func._schema.name
        if name.startswith("_c10d_functional::all_"):
            self._sent[result.data_ptr()] = len(self.messages)
            self.messages.append(False)
        elif name == "_c10d_functional::wait_tensor":
            self._sent.pop(args[0].data_ptr())
        elif "flash_attention" in name and FakeTensor not in types:
            for message in self._sent.values():
                self.messages[message] = True
        return result


def record_ring(case: Case, late: bool) -> tuple[list[bool], list[bool]]:
    """Of the messages of a forward and of a backward. late: on purpose, send what is waited for only then."""
    mesh, model = build(case, build_config(case))
    model.loss.valid_tokens, ((tokens, labels, positions),) = local_batches(0, case, mesh, True)
    ring = cp_impl._AllToAllRotater
    send, receive = ring.exchange_buffers, ring.next_buffer
    changed: dict[str, Any] = {"next_buffer": receive}
    if late:
        changed["exchange_buffers"] = lambda self, buffer: setattr(self, "_buffer", buffer)
        changed["next_buffer"] = lambda self: (send(self, self._buffer), receive(self))[1]
    with patch.multiple(ring, **changed):
        with Overlap() as forward:
            loss = model.loss(model.parts[0](tokens, positions), labels)
        with Overlap() as backward:
            loss.backward()
    return forward.messages, backward.messages


def test_each_rotation_of_the_ring_overlaps_with_a_block_of_attention(ranks: Ranks) -> None:
    """But the last gradients of keys and values of a layer, behind which there is nothing to compute.

    alltoall sends keys and values three times among four ranks, allgather gathers them once; gradients are sent four
    times, and between those of keys and values.
    """
    gather, rotate = Case("", CP4), Case("", CP4, ALLTOALL)
    for seen in ranks.run(4, record_ring, rotate, False):
        assert seen == (3 * [True] * LAYERS, (6 * [True] + [False]) * LAYERS)
    assert ranks.run(4, record_ring, gather, False)[0] == ([True] * LAYERS, (4 * [True] + [False]) * LAYERS)
    assert ranks.run(4, record_ring, rotate, True)[0] == (3 * [False] * LAYERS, 7 * [False] * LAYERS)


def inductors_order(case: Case) -> list[str]:
    """What the code of a block's forward and of its backward does, in letters: Send, Attend, wait."""
    mesh, model = build(case, build_config(case))
    model.loss.valid_tokens, (batch,) = local_batches(0, case, mesh, True)
    letters = {".all_to_all_single": "S", ".all_gather_into_tensor": "S", ".wait_tensor": "w", "_flash_attention": "A"}
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        _, codes = run_and_get_code(model.forward_backward, *batch, last=True)
    calls = [re.findall(r"^ +(?:\w+ = )?torch\.ops\.[a-z0-9_]+(\.\w+)", code, re.MULTILINE) for code in codes]
    return ["".join(made for call in of for name, made in letters.items() if name in call) for of in calls]


@pytest.mark.long
def test_the_ring_overlaps_in_compiled_blocks_too(ranks: Ranks) -> None:
    case = Case("", CP2, {**ALLTOALL, **compiled("inductor", "model")}, "shallow")
    assert ranks.run(2, inductors_order, case) == 2 * [["SAwA", "ASAwSw"]]
