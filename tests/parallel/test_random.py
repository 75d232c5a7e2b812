"""Random operations, here dropout: the recomputation repeats them and an evaluation leaves them out."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parallel.random_model import DropoutLlama, build
from parity.layout import Case, local, local_batches
from parity.single import MODELS, batch
from parity.table import FSDP2, FULL, ONE, OP, PP2, SECOND, TP2, compiled, schedule
from ranks import Ranks
from torch import Tensor, nn

from dtron import registry
from dtron.mesh import Degrees
from dtron.models.init import initial_rows, llama_init_std
from dtron.parallel import recompute


def _gradients(case: Case) -> dict[str, np.ndarray]:
    """This rank's shard of every gradient of one batch, drawn from one seed."""
    mesh, model = build(case)
    model.loss.valid_tokens, (part,) = local_batches(0, case, mesh, True)
    torch.manual_seed(7)
    model.forward_backward(*part, last=True)
    return {name: local(p.grad).numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("degrees", "keys"),
    [
        (ONE, FULL),
        (ONE, SECOND),
        (ONE, OP),
        (ONE, {**compiled(), **FULL}),
        (ONE, {**compiled(), **OP}),
        (TP2, FULL),
        (PP2, OP),
        (PP2, {**FULL, **schedule("ZBVZeroBubble")}),
    ],
    ids=str,
)
def test_gradients_with_recompute_equal_those_without(degrees: Degrees, keys: dict[str, Any], ranks: Ranks):
    without = {key: value for key, value in keys.items() if not key.startswith("activation_checkpoint")}
    results = zip(*(ranks.run(degrees.world, _gradients, Case("", degrees, k)) for k in (keys, without)), strict=True)
    for recomputed, kept in results:
        assert recomputed.keys() == kept.keys()
        for name, gradient in kept.items():
            np.testing.assert_allclose(recomputed[name], gradient, rtol=1e-4, atol=1e-7, err_msg=name)


def _evaluate(case: Case) -> tuple[list[float], list[bool]]:
    """The losses of one batch evaluated twice; whether each part trains again afterwards."""
    mesh, model = build(case)
    model.loss.valid_tokens, (part,) = local_batches(0, case, mesh, True)
    losses = [model.evaluate(*part).item() for _ in range(2)]
    return losses, [module.training for part in model.parts for module in part.modules()]


@pytest.mark.parametrize("case", [Case("", ONE), Case("", FSDP2, compiled()), Case("", PP2)], ids=str)
def test_an_evaluation_is_that_of_the_model_in_eval_mode(case: Case, ranks: Ranks):
    plain, (tokens, labels) = DropoutLlama(MODELS["small"]).eval(), batch(0)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(initial_rows(name, p.shape, 0, p.shape[0], llama_init_std(name, plain.config), 0, p.device))
        expected = registry.cross_entropy(plain(tokens), labels).sum() / (labels != -100).sum()
    results = ranks.run(case.degrees.world, _evaluate, case)
    for i in range(2):
        assert sum(losses[i] for losses, _ in results) == pytest.approx(expected.item(), rel=1e-5)
    assert all(all(training) for _, training in results)


@torch.library.custom_op("dtron_test::attention", mutates_args=())
def _attention(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Stands for a fused attention kernel with dropout, which CPUs do not have: the result and what was kept."""
    kept = (torch.rand_like(x) > dropout_p).float()
    return x * kept, kept


_attention.register_autograd(
    lambda ctx, gradient, _: (gradient * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


class AttentionThenDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(_attention(x.exp(), 0.5)[0], 0.5).exp()


def test_attention_with_dropout_is_recomputed_like_the_dropout_after_it(monkeypatch: pytest.MonkeyPatch):
    """If its result were kept, it would not draw again, and the dropout after it would draw its numbers."""
    monkeypatch.setattr(recompute, "_KEPT", {torch.ops.dtron_test.attention.default})
    gradients = []
    for mode in ("none", "selective"):
        torch.manual_seed(7)
        x = torch.linspace(0, 1, 100, requires_grad=True)
        recompute.apply_recompute(AttentionThenDropout(), 0, mode, "op")(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
