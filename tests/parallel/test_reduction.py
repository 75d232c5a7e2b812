"""When gradients are communicated: gradient_reduce's two settings, and HSDP's replicas at the last microbatch only."""

import pytest
from parity.layout import Case, build, build_config, local_batches
from ranks import Ranks
from torch.distributed.tensor.debug import CommDebugMode

from dtron.mesh import Degrees

MICROBATCHES, UNITS = 2, 6  # the embedding, four blocks, and the last norm with the head


def _count(mode: str) -> list[tuple[int, int]]:
    """(reduce-scatters, all-reduces) of each microbatch of one step under HSDP."""
    case = Case("hsdp", Degrees(1, 2, 2), {"parallelism.gradient_reduce": mode}, batches=MICROBATCHES)
    mesh, model = build(case, build_config(case))
    model.loss.valid_tokens, parts = local_batches(0, case, mesh, True)
    counts = []
    for i, part in enumerate(parts):
        with CommDebugMode() as comm:
            model.forward_backward(*part, last=i == MICROBATCHES - 1)
        by_name = {str(op): n for op, n in comm.get_comm_counts().items()}
        scatters = sum(n for op, n in by_name.items() if "reduce_scatter" in op)
        counts.append((scatters, sum(n for op, n in by_name.items() if "allreduce" in op or "all_reduce" in op)))
    return counts


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("every_microbatch", [(UNITS, 0), (UNITS, UNITS)]),  # gradients stay sharded; replicas are summed once
        ("last_microbatch", [(0, 0), (UNITS, UNITS)]),
    ],
)
def test_replicas_are_reduced_at_the_last_microbatch(ranks: Ranks, mode: str, expected: list[tuple[int, int]]) -> None:
    assert ranks.run(4, _count, mode) == [expected] * 4
