"""The order in which a step issues collectives and computes: what overlaps can, whatever the speed of the host."""

from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from parity.layout import Case, build, build_config, local_batches
from parity.single import MODELS
from parity.table import ALWAYS, FSDP2, FSDP2_EP2, HSDP
from ranks import Ranks
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from dtron.compat import planning

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
    for one in planning.fsdp_groups(part):
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
