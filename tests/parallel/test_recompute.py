"""What each recompute policy keeps, found by watching which operations the backward runs once more."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dtron import compat
from dtron.models.families import FAMILIES
from dtron.models.llama import Llama, LlamaConfig
from dtron.parallel import recompute
from dtron.parallel.recompute import apply_recompute

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Forwards(TorchDispatchMode):
    """Names of the projections whose forward product is computed, and `attention`, in order."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        linears = [(name.rpartition(".")[2], m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
        self._names = {m.weight.data_ptr(): name for name, m in linears}
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is compat.cpu_flash_attention:
            self.seen.append("attention")
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            # The forward multiplies by the transposed weight, which begins at the same address and has its strides
            # swapped; the backward multiplies by the weight itself, or by no weight.
            weight = args[-1]
            if weight.data_ptr() in self._names and weight.stride(0) == 1:
                self.seen.append(self._names[weight.data_ptr()])
        return func(*args, **(kwargs or {}))


def watch(config: LlamaConfig, index: int, mode: str, option: str) -> tuple[list[str], list[str]]:
    """What a block computes in its forward, and again in its backward."""
    torch.manual_seed(0)
    block = Llama(config).layers[str(index)]
    x = torch.randn(2, 8, config.dim, requires_grad=True)
    angle = torch.zeros(2, 8, 1, config.head_size // 2)
    wrapped = apply_recompute(block, index, mode, option)
    with Forwards(block) as forward:
        out = wrapped(x, angle.cos(), angle.sin())
    with Forwards(block) as backward:
        out.sum().backward()
    return forward.seen, backward.seen


ALL = [*PROJECTIONS[:3], "attention", *PROJECTIONS[3:]]
# The last product of a block, of which only the sum with the residual is needed, is never computed again.
EXPECTED = {
    ("none", "2", 0): [],
    ("full", "2", 0): ALL[:-1],
    ("full", "2", 1): ALL[:-1],
    ("selective", "2", 0): ALL[:-1],
    ("selective", "2", 1): [],
    ("selective", "op", 0): ["o_proj"],
    ("selective", "op", 1): ["o_proj"],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "option", "index"), EXPECTED)
def test_each_policy_recomputes_what_it_does_not_keep(family: str, mode: str, option: str, index: int):
    assert watch(FAMILIES[family]["debugmodel"], index, mode, option) == (ALL, EXPECTED[mode, option, index])


@pytest.mark.parametrize("family", FAMILIES)
def test_by_operation_keeps_five_products_and_the_attention(family: str, monkeypatch: pytest.MonkeyPatch):
    kept: list[str] = []

    def contexts(policy: Any) -> Any:
        def recorded(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            answer = policy(ctx, op, *args, **kwargs)
            if answer == CheckpointPolicy.MUST_SAVE and not ctx.is_recompute:
                kept.append("attention" if op is compat.cpu_flash_attention else op.overloadpacket.__name__)
            return answer

        return create_selective_checkpoint_contexts(recorded)

    monkeypatch.setattr(recompute, "create_selective_checkpoint_contexts", contexts)
    watch(FAMILIES[family]["debugmodel"], 0, "selective", "op")
    qkv = "addmm" if FAMILIES[family]["debugmodel"].qkv_bias else "mm"
    assert kept == [qkv, qkv, qkv, "attention", "mm", "mm"]  # without o and down
