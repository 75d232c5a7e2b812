"""Which rows travel where in one mixture of experts, as counts of a real run on gloo ranks.

    torchrun --standalone --nproc-per-node 4 scripts/expert_dispatch.py

The layer has the sizes of the Mixtral debugmodel, random weights and 16 random tokens on each rank; the ranks are those
of `ep`. Its dispatch is dtron's own (`dtron/parallel/expert.py`): rows are counted where they leave and, independently,
where they go through the experts, and the two must agree. docs/experts.md shows what this prints.
"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's dtron, also where another copy is installed

from dtron.mesh import Degrees, Mesh  # noqa: E402
from dtron.models.families import FAMILIES  # noqa: E402
from dtron.models.moe import MixtureOfExperts, swiglu_of_experts  # noqa: E402
from dtron.parallel import expert  # noqa: E402

TOKENS = 16  # per rank


def run(world: int) -> tuple[Tensor, Tensor]:
    """Of this rank: rows it sends to each expert [N], rows that its own experts receive [N / world]."""
    model = FAMILIES["mixtral"]["debugmodel"]
    assert model.moe is not None
    torch.manual_seed(0)
    moe = MixtureOfExperts(model.dim, model.moe, None)
    for p in moe.parameters():
        nn.init.normal_(p, std=0.02)
    expert.apply_expert_parallel(moe, Mesh(Degrees(dp_shard=world, ep=world), "cpu", experts=True))
    sent, received = [], []
    dispatch = moe.experts.forward

    def leaving(rows: Tensor, counts: Tensor) -> Tensor:
        sent.append(counts)
        return dispatch(rows, counts)

    def arrived(rows: Tensor, counts: Tensor, *weights: Tensor, **more: Any) -> Tensor:
        received.append(counts)
        return swiglu_of_experts(rows, counts, *weights, **more)

    moe.experts.forward = leaving  # type: ignore[method-assign]
    torch.manual_seed(1 + dist.get_rank())
    with patch.object(expert, "swiglu_of_experts", arrived):
        moe(torch.randn(1, TOKENS, model.dim))
    return sent[0], received[0]


def picture(sent: Tensor, received: Tensor) -> str:
    """sent [ranks, N], received [N] -> a table: a row for each sender, a column for each expert."""
    world, n = sent.shape
    each = n // world
    wide = max(8, 4 * each)  # of a rank's column

    def line(head: str, cells: list[str], end: str = "") -> str:
        return (f"{head:<15}|" + "|".join(f"{cell:^{wide}}" for cell in cells) + f"|{end}").rstrip()

    def by_rank(counts: Tensor) -> list[str]:
        return ["".join(f"{value:>3} " for value in part) for part in counts.view(world, each).tolist()]

    rule = "-" * 15 + "+" + "+".join(["-" * wide] * world) + "+"
    lines = [line("to", [f"rank {r}" for r in range(world)]), line("its experts", by_rank(torch.arange(n))), rule]
    lines += [line(f"from rank {r}", by_rank(sent[r]), f" {int(sent[r].sum())} rows") for r in range(world)]
    totals = received.view(world, each).sum(1).tolist()
    return "\n".join([*lines, rule, line("rows there", by_rank(received), f" {sum(totals)} rows"),
                      line("together", [str(total) for total in totals])])  # fmt: skip


def main() -> None:
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    here = run(world)
    sent, received = ([torch.empty_like(counts) for _ in range(world)] for counts in here)
    dist.all_gather(sent, here[0])
    dist.all_gather(received, here[1])
    table, arrived = torch.stack(sent), torch.cat(received)
    assert torch.equal(table.sum(0), arrived), "rows were lost or invented on the way"
    if dist.get_rank() == 0:
        print(picture(table, arrived))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
