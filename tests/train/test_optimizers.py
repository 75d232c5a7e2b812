"""Every optimizer by name, in every implementation, on sharded parameters: the steps plain torch makes."""

import pytest
import torch
import torch.nn.functional as F
from parity.layout import Case, build, build_config, local_batches
from parity.single import MODELS, batch, plain_model
from ranks import Ranks

from dtron.config.sections import Optimizer
from dtron.mesh import Degrees
from dtron.train.optimizer import build_optimizers

LAYOUT = Degrees(dp_shard=2, tp=2)
SECTIONS = {
    f"{name} {how}": Optimizer(name=name, implementation=how, lr=1e-2, eps=1e-4, weight_decay=0.1)
    for name in ("AdamW", "Adam", "SGD")
    for how in ("for-loop", "foreach", "fused")
}
PLAIN = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}
WATCHED = ("embed_tokens.weight", "layers.0.mlp.down_proj.weight", "layers.1.input_layernorm.weight")


def _train() -> dict[str, list[list[float]]]:
    """Three steps with each optimizer from the same weights; flattened watched weights by section."""
    case = Case("optimizers", LAYOUT, model="shallow")
    mesh, model = build(case, build_config(case))
    initial = [p.detach().clone() for _, p in model.named_parameters()]
    results = {}
    for key, section in SECTIONS.items():
        with torch.no_grad():
            for (_, p), value in zip(model.named_parameters(), initial, strict=True):
                p.copy_(value)
        optimizers = build_optimizers(model, section)
        for step in range(3):
            model.loss.valid_tokens, parts = local_batches(step, case, mesh, True)
            model.forward_backward(*parts[0], last=True)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        weights = dict(model.named_parameters())
        results[key] = [weights[name].full_tensor().flatten().tolist() for name in WATCHED]  # type: ignore[attr-defined]
    return results


def _plain(name: str) -> list[torch.Tensor]:
    model = plain_model(MODELS["shallow"])
    optimizer = PLAIN[name](model.parameters())
    for step in range(3):
        tokens, labels = batch(step)
        F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = dict(model.named_parameters())
    return [weights[name].detach().flatten() for name in WATCHED]


@pytest.fixture(scope="module")
def trained(ranks: Ranks) -> dict[str, list[list[float]]]:
    return ranks.run(LAYOUT.world, _train)[0]


@pytest.mark.parametrize("key", SECTIONS)
def test_steps_are_those_of_plain_torch(trained: dict[str, list[list[float]]], key: str) -> None:
    for name, got, expected in zip(WATCHED, trained[key], _plain(SECTIONS[key].name), strict=True):
        torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
