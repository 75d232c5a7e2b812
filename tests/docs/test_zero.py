"""The table of ZeRO stages in docs/parallelism.md, every cell measured on two ranks."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.layout import Case, build, build_config, local_batches
from parity.table import FSDP2
from ranks import Ranks
from torch.distributed.fsdp import FSDPModule

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "parallelism.md").read_text()
ROWS = re.findall(
    r"^\| `(always|never)` \| `(every|last)_microbatch` \| [^|]* \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$",
    PAGE,
    re.MULTILINE,
)


def size(tensors: list[Any]) -> int:
    """Bytes of the tensors' memory on this rank; views of one buffer count once."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().size() for t in local}.values())


def block_parameters(model: torch.nn.Module) -> list[Any]:
    """FSDP's own record of each parameter of the blocks."""
    blocks = [m for name, m in model.named_modules() if isinstance(m, FSDPModule) and "layers." in name]
    return [p for block in blocks for p in block._get_fsdp_state()._fsdp_param_group.fsdp_params]  # type: ignore[attr-defined]


def weights(model: torch.nn.Module) -> int:
    parameters = block_parameters(model)
    gathered = [p._unsharded_param for p in parameters if p.sharded_state.name == "UNSHARDED"]
    return size([p.sharded_param for p in parameters] + gathered)


def gradients(model: torch.nn.Module) -> int:
    parameters = block_parameters(model)
    whole = [p._unsharded_param.grad for p in parameters] + [p.unsharded_accumulated_grad for p in parameters]
    return size([p.sharded_param.grad for p in parameters] + whole)


def measure(reshard: str, reduce: str) -> tuple[float, float, float]:
    """Bytes per parameter of the blocks on this rank: weights after a forward, gradients after it, AdamW's state."""
    keys = {
        "training.mixed_precision_param": "bfloat16",
        "parallelism.fsdp_reshard_after_forward": reshard,
        "parallelism.gradient_reduce": f"{reduce}_microbatch",
    }
    case = Case("zero", FSDP2, keys, batches=2)
    mesh, model = build(case, build_config(case))
    part, held = model.parts[0], []

    def loss(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        held.append(weights(part))
        return compute(hidden, labels)

    compute, model.loss.compute = model.loss.compute, loss
    model.loss.valid_tokens, batches = local_batches(0, case, mesh, True)
    model.forward_backward(*batches[0], last=False)
    between = gradients(part)
    model.forward_backward(*batches[1], last=True)
    blocks = [p for name, p in model.named_parameters() if name.startswith("layers.")]
    optimizer = torch.optim.AdamW(blocks, fused=True)
    optimizer.step()
    state = size([t for s in optimizer.state.values() for name, t in s.items() if name != "step"])
    n = sum(p.numel() for p in blocks)
    return held[0] / n, between / n, state / n


def test_table_has_every_setting() -> None:
    assert len({row[:2] for row in ROWS}) == len(ROWS) == 4


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:2]))
def test_row_is_what_a_rank_holds(row: tuple[str, ...], ranks: Ranks) -> None:
    claimed = [eval(cell, {"N": 2}) for cell in row[2:]]
    for measured in ranks.run(2, measure, *row[:2]):
        assert list(measured) == pytest.approx(claimed)
