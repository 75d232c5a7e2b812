"""AdamW with bf16 moments: the steps of AdamW in float64 within a band, its bytes, clipping, skipping and refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dtron.config import load
from dtron.config.optimizer import Optimizer
from dtron.errors import UserError
from dtron.models.spec import meta_model
from dtron.optim import adamw
from dtron.optim.adamw import AdamW
from dtron.plan.dryrun import dry_run
from dtron.registry import look_up
from dtron.train.resolve import resolve

SHAPES = [(64, 48), (300,), (7, 33), (0, 8)]
STEPS, CLIPPED, SKIPPED = 150, 0.3, 20


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [(0.02 * torch.randn(shape, generator=g)).to(dtype).requires_grad_() for shape in SHAPES]


def train(values: list[Tensor], step: Callable[[Tensor, Tensor], None]) -> list[Tensor]:
    """STEPS steps on noisy gradients that become smaller, some clipped, one skipped.

    step: is given the factor and whether to skip.
    """
    g = torch.Generator().manual_seed(1)
    for i in range(STEPS):
        for p in values:
            p.grad = ((1 if i < STEPS // 3 else 0.5) * (1e-3 * torch.randn(p.shape, generator=g) + 5e-4)).to(p.dtype)
        step(torch.tensor(CLIPPED if i % 3 == 0 else 1.0), torch.tensor(float(i == SKIPPED)))
    return [p.detach().double() for p in values]


def with_own(beta2: float) -> list[Tensor]:
    values = parameters()
    optimizer = AdamW([{"params": values, "weight_decay": 0.1}], 1e-3, (0.9, beta2), 1e-8, torch.bfloat16)

    def step(factor: Tensor, skip: Tensor) -> None:
        optimizer.grad_scale, optimizer.found_inf = 1 / factor, skip
        optimizer.step()

    return train(values, step)


def with_torch(beta2: float, dtype: torch.dtype) -> list[Tensor]:
    values = parameters(dtype)
    optimizer = torch.optim.AdamW(values, 1e-3, (0.9, beta2), 1e-8, 0.1, foreach=False)

    def step(factor: Tensor, skip: Tensor) -> None:
        for p in values:
            assert p.grad is not None
            p.grad *= factor
        if not skip:
            optimizer.step()

    return train(values, step)


def error(got: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference of a tensor as a share of the way that it went."""
    pairs = zip(got, exact, parameters(), strict=True)
    return max(((a - b).norm() / (b - start).norm()).item() for a, b, start in pairs if start.numel())


@pytest.mark.parametrize(("beta2", "band"), [(0.95, 3e-3), (adamw.LARGEST_BETA, 1e-2)])
def test_weights_follow_those_of_float64(beta2: float, band: float) -> None:
    """Clipped and skipped inside."""
    exact = with_torch(beta2, torch.float64)
    assert error(with_torch(beta2, torch.float32), exact) < 1e-5
    assert 1e-4 < error(with_own(beta2), exact) < band


@pytest.mark.parametrize(("beta2", "low", "high"), [(adamw.LARGEST_BETA, 0.97, 1.03), (0.999, 1.2, 2.0)])
def test_the_root_of_the_second_moment_stays_too_large_above_the_largest_beta(
    beta2: float, low: float, high: float
) -> None:
    """Of gradients that become half as large: numbers that rise by rounding and never fall again."""
    g, p, exact = torch.Generator().manual_seed(0), torch.zeros(256, requires_grad=True), 0.0
    optimizer = AdamW([{"params": [p]}], 0.0, (0.9, beta2), 1e-8, torch.bfloat16)
    for i in range(2400):
        p.grad = torch.randn(256, generator=g) * (1.0 if i < 600 else 0.5)
        optimizer.step()
        exact = exact * beta2 + (1 - beta2) * p.grad.double().square()
    assert low < (optimizer.state[p]["exp_avg_sq"] / exact).sqrt().mean() < high


def test_large_tensors_are_updated_in_chunks_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = with_own(0.95)
    monkeypatch.setattr(adamw, "CPU_CHUNK", 50)
    assert all(map(torch.equal, with_own(0.95), whole))


def test_the_state_takes_4_bytes_per_parameter_and_has_the_names_of_torch() -> None:
    values = parameters()
    section = Optimizer(state_dtype="bfloat16")
    optimizer = look_up("optimizer", "AdamW", "")([{"params": values, "weight_decay": 0.1}], section)
    for p in values:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in values:
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == 1
        assert sum(state[name].nbytes for name in ("exp_avg", "exp_avg_sq")) == 4 * p.numel()


def test_a_dry_run_counts_the_bytes() -> None:
    arguments = ["--model.n_layers", "1", "--model.dim", "32", "--training.device", "cpu", "--optimizer.state_dtype"]
    bytes_held, setup = {}, None
    for dtype in ("float32", "bfloat16"):
        setup = resolve(load([*arguments, dtype]), 1)
        bytes_held[dtype] = dry_run(setup, 0).start_bytes
    assert setup is not None
    elements = sum(p.numel() for p in meta_model(setup.spec, setup.model_config).parameters())
    assert bytes_held["float32"] - bytes_held["bfloat16"] == 4 * elements


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizer.name SGD", "state_dtype = bfloat16 is AdamW's and Muon's, and optimizer.name is SGD"),
        ("--optimizer.implementation foreach", "has one implementation, fused"),
        ("--optimizer.beta2 0.999", "beta2 0.999: above 0.99"),
    ],
)
def test_what_16_bits_cannot_hold_is_refused(arguments: str, message: str) -> None:
    given = ["--training.device", "cpu", "--optimizer.state_dtype", "bfloat16", *arguments.split()]
    with pytest.raises(UserError, match=message):
        resolve(load(given), 1)
