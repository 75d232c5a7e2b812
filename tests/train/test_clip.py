"""Clipping inside the optimizer's step: torch's norm, torch's clipped gradients, and no pass of its own."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity.layout import CPU, Case, build, build_config, local, local_batches
from parity.table import FSDP2
from ranks import Ranks
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.config.optimizer import Optimizer
from dtron.train.optimizer import build_optimizers, clip_gradients, squared_gradient_norm

CLIP = 0.1
SECTIONS = {
    "AdamW": Optimizer(lr=1e-2, eps=1e-4),
    "AdamW bf16": Optimizer(lr=1e-2, eps=1e-4, state_dtype="bfloat16"),
    "SGD": Optimizer(name="SGD", lr=1.0),
}


class Passes(TorchDispatchMode):
    """Operators that read any of some tensors, by their storage."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.storages, self.names = {t.untyped_storage().data_ptr() for t in tensors}, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [local(t) for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        if any(t.untyped_storage().data_ptr() in self.storages for t in found) and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def train(section: Optimizer, by_torch: bool) -> tuple[list[Any], list[float], list[str]]:
    """Weights and norms of three steps; the operators that read gradients after the last backward."""
    case = Case("", FSDP2, model="shallow")
    mesh, model = build(case, build_config(case))
    optimizers = build_optimizers(model, section)
    parameters = [p for _, p in model.named_parameters()]
    norms, names = [], list[str]()
    for step in range(3):
        model.loss.valid_tokens, (part,) = local_batches(step, case, mesh, True)
        model.forward_backward(*part, last=True)
        with Passes([local(p.grad) for p in parameters if p.grad is not None]) as passes:
            if by_torch:
                norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP).full_tensor()
            else:
                norm = squared_gradient_norm(model.named_parameters(), model.aliases, 2, CPU)
                dist.all_reduce(norm)
                clip_gradients(optimizers, norm.sqrt_(), CLIP)
            for optimizer in optimizers:
                optimizer.step()
        norms.append(norm.item())
        names = passes.names
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.grad_scale = None
    return [p.full_tensor().detach().numpy() for p in parameters], norms, names  # type: ignore[attr-defined]


def both() -> dict[str, Any]:
    return {name: (train(section, False), train(section, True)) for name, section in SECTIONS.items()}


@pytest.fixture(scope="module")
def trained(ranks: Ranks) -> dict[str, Any]:
    return ranks.run(2, both)[0]


@pytest.mark.parametrize("name", SECTIONS)
def test_norm_and_weights_are_those_of_torchs_clipping(trained: dict[str, Any], name: str) -> None:
    (got, norms, _), (expected, wanted, _) = trained[name]
    assert norms == pytest.approx(wanted, rel=1e-6) and min(norms) > 2 * CLIP
    bound = 1e-4 if name == "AdamW bf16" else 1e-6  # of a moment that is rounded the other way
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-6, atol=bound)


def test_the_norm_is_one_pass_and_clipping_none(trained: dict[str, Any]) -> None:
    names = {name: own[2] for name, (own, _) in trained.items()}
    assert names["AdamW"] == ["_foreach_norm", "_fused_adamw_"]
    assert names["SGD"][:2] == ["_foreach_norm", "_foreach_mul_"]
    assert names["AdamW bf16"][0] == "_foreach_norm" and set(names["AdamW bf16"][1:]) == {"div"}


@pytest.mark.parametrize("fused", [True, False])
def test_a_divisor_inside_equals_scaling_first(fused: bool) -> None:
    """To the last bit or two of a weight, of gradients that are clipped a little and by far."""
    for factor in (1.0, 0.7, 1e-3):
        weights = []
        for inside in (True, False):
            g = torch.Generator().manual_seed(0)
            p = torch.randn(1000, generator=g).requires_grad_()
            optimizer = torch.optim.AdamW([p], lr=1e-2, fused=fused, foreach=not fused)
            for _ in range(3):
                p.grad = torch.randn(1000, generator=g)
                if inside:
                    clip_gradients([optimizer], torch.tensor(1.0, dtype=torch.float64), factor)
                else:
                    p.grad *= min(1.0, factor / (1 + 1e-6))
                optimizer.step()
            weights.append(p.detach())
        assert (weights[0] - weights[1]).abs().max() <= 1e-7 * weights[1].abs().max()
