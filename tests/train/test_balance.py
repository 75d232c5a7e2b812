"""Experts kept busy in a run: the bias and the loss that do it, the metrics of it, and the warning of idle experts."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tinyrun import quiet_world, train_tiny
from torch import Tensor

from dtron import registry
from dtron.config import Config
from dtron.config import replace as with_key
from dtron.config.sections import Training
from dtron.models.llama import Llama, LlamaConfig
from dtron.models.moe import MixtureOfExperts, MoEConfig
from dtron.observe.metrics import HEAT_MAP, read_metrics
from dtron.registry import cross_entropy
from dtron.train.balance import IDLE_STEPS, Balance, unread_keys

# A dense layer, then mixtures with the bias that balances; tinyrun gives the other sizes.
EXPERTS = MoEConfig(8, 2, 16, score="sigmoid", balancing_bias=True, n_dense_layers=1)
DIMENSIONS = LlamaConfig(96, 16, 3, 2, 2, 16, init_std=0.2, moe=EXPERTS)
SPEC = replace(
    registry.look_up("model", "qwen3_moe", "model.name"),
    flavors={"debugmodel": DIMENSIONS},
    hf_config=None,  # no type of Hugging Face's that dtron writes has the bias
)
LAYERS = (1, 2)
RATE = 0.0625  # whose multiples are exact
MODEL = (
    "--model.name tiny_experts --model.n_layers 3 --metrics.log_freq 1 --training.mixed_precision_param float32 "
    f"--training.expert_bias_rate {RATE}"
)


class Bad:
    """Cross entropy that is NaN, or a thousand times too large, in one call of one rank."""

    def __init__(self, factor: float, call: int) -> None:
        self.factor, self.call, self.calls = factor, call, 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        bad = self.calls == self.call and dist.get_rank() == 1
        return cross_entropy(logits, labels) * (self.factor if bad else 1.0)


LOSSES = {"nan": Bad(math.nan, 4), "spike": Bad(1000.0, 24)}


def run(folder: str, steps: int, arguments: str, loss: str = "") -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
    """Rows of the metrics; of each step the counts and the biases after it, [2 layers][8 experts]."""
    registry.register("model", "tiny_experts", SPEC)
    counts, biases = [], []

    def update_bias(self: Balance, n: Tensor, applied: Tensor) -> None:
        real(self, n, applied)
        assert not n[0].any()  # of the dense layer
        counts.append(n[1:].tolist())
        biases.append([self._layers[layer].gate.e_score_correction_bias.tolist() for layer in LAYERS])  # type: ignore[union-attr]

    if loss:
        LOSSES[loss].calls = 0
        registry.register("loss", f"bad_{loss}", LOSSES[loss])
        arguments = f"--training.loss bad_{loss} {arguments}"
    real = Balance.update_bias
    with patch.object(Balance, "update_bias", update_bias):
        trainer, _ = train_tiny(folder, steps, f"{MODEL} {arguments}")
    return read_metrics(trainer.run_folder / "metrics.jsonl"), counts, biases


@pytest.mark.parametrize(
    ("loss", "arguments", "bad", "steps"),
    [
        ("nan", "--training.on_nonfinite skip --parallelism.expert_parallel_degree 2", 4, 6),
        ("spike", "--training.spike_factor 20", 24, 26),
    ],
)
def test_a_skipped_step_moves_no_bias(
    ranks: Ranks, tmp_path: Path, loss: str, arguments: str, bad: int, steps: int
) -> None:
    answers = ranks.run(2, run, str(tmp_path), steps, arguments, loss)
    rows, counts, biases = answers[0]
    assert answers[1][1:] == (counts, biases), "counts and biases are equal on all ranks"
    assert [row["step"] for row in rows if row.get("skipped_steps")] == list(range(bad, steps + 1))
    bias = torch.zeros(len(LAYERS), EXPERTS.n_experts)
    for step, (n, after) in enumerate(zip(counts, biases, strict=True), start=1):
        if step != bad:
            rows_of = torch.tensor(n, dtype=torch.float32)
            bias = bias + RATE * torch.sign(rows_of.mean(1, keepdim=True) - rows_of)
        assert after == bias.tolist(), step
    assert all(row["expert_dropped_rows"] == 0 for row in rows)


def test_metrics_and_the_picture_are_of_the_counts_since_the_last_row(ranks: Ranks, tmp_path: Path) -> None:
    arguments = "--metrics.log_freq 2 --metrics.enable_tensorboard --parallelism.expert_parallel_degree 2"
    rows, counts, _ = ranks.run(2, run, str(tmp_path), 6, arguments)[0]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    expected = {1: counts[:1], 2: counts[1:2], 4: counts[2:4], 6: counts[4:6]}
    for row in rows:
        of_steps = torch.tensor(expected[row["step"]], dtype=torch.float64).sum(0)  # [2 layers, 8 experts]
        assert of_steps.sum(1).tolist() == [len(expected[row["step"]]) * 4 * 16 * EXPERTS.top_k] * len(LAYERS)
        for layer, n in zip(LAYERS, of_steps, strict=True):
            assert row[f"expert_busiest/{layer}"] == pytest.approx((n.max() / n.mean()).item())
            shares = [x for x in (n / n.sum()).tolist() if x]
            entropy = -sum(x * math.log(x) for x in shares) / math.log(EXPERTS.n_experts)
            assert row[f"expert_entropy/{layer}"] == pytest.approx(entropy) and 0 < entropy < 1
        assert row["expert_dropped_rows"] == 0
        assert not {"expert_busiest/0", "expert_load"} & row.keys()  # the dense layer, and what is drawn only
    (folder,) = tmp_path.glob("*/tb")
    board = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    images = board.Images(HEAT_MAP)
    assert [image.step for image in images] == [1, 2, 4, 6]
    assert {(image.height, image.width) for image in images} == {(8 * len(LAYERS), 8 * EXPERTS.n_experts)}
    assert {"expert_busiest/1", "expert_entropy/2", "experts/dropped_rows"} <= set(board.Tags()["scalars"])
    dashboard = board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"expert_busiest" in dashboard and b"expert_entropy" in dashboard


def norms_and_bias(folder: str, arguments: str) -> tuple[list[float], list[float], float]:
    rows, _, biases = run(folder, 2, arguments)
    return (
        [row["loss"] for row in rows],
        [row["grad_norm"] for row in rows],
        torch.tensor(biases[-1]).abs().max().item(),
    )


def test_the_keys_of_balance_take_effect(ranks: Ranks, tmp_path: Path) -> None:
    def answer(name: str, arguments: str) -> tuple[list[float], list[float], float]:
        result: tuple[list[float], list[float], float] = ranks.run(
            1, norms_and_bias, str(tmp_path / name), arguments, share=0
        )[0]
        return result

    losses, norms, moved = answer("plain", "--training.expert_balance_loss 0")
    with_loss, other_norms, _ = answer("loss", "--training.expert_balance_loss 0.1")
    assert with_loss[0] == losses[0], "what is logged is the language model's loss"
    assert abs(other_norms[0] / norms[0] - 1) > 1e-4 and with_loss[1] != losses[1]
    assert moved in (RATE, 2 * RATE)
    still = answer("still", "--training.expert_balance_loss 0 --training.expert_bias_rate 0")
    assert still[2] == 0 and still[0][0] == losses[0] and still[0][1] != losses[1]


# --- an idle expert


def warnings_of_idle() -> tuple[list[tuple[int, list[str]]], int]:
    """(step, warnings) where there are any, of counts made up: expert 5 of layer 2 is idle but in steps 30 and 200;
    and what dropped rows would be logged as.
    """
    _, said = quiet_world()
    model = Llama(DIMENSIONS)
    config = with_key(with_key(Config(), "training.global_batch_size", 4), "training.seq_len", 16)
    balance = Balance(SimpleNamespace(parts=[model]), config, EXPERTS, 3, torch.device("cpu"))  # type: ignore[arg-type]
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    seen, dropped = [], 0
    for step in range(1, 331):
        for i, moe in enumerate(mixtures):
            assert moe.load is not None
            moe.load.grad = torch.full((8,), 8.0)  # on each of two ranks: the 128 rows of a step
            if i == 1 and step not in (30, 200):
                moe.load.grad[5], moe.load.grad[4] = 0.0, 16.0
            if step == 7 and i == 0:
                moe.load.grad[0] -= 3
        balance.take_counts()
        row = balance.reduce(balance.counted().double())
        dropped += row["expert_dropped_rows"]
        if said:
            seen.append((step, list(said)))
            said.clear()
    return seen, dropped


def test_an_idle_expert_is_named_once_each_time_it_becomes_so(ranks: Ranks) -> None:
    seen, dropped = ranks.run(2, warnings_of_idle)[0]
    assert [step for step, _ in seen] == [30 + IDLE_STEPS, 200 + IDLE_STEPS]
    for _, lines in seen:
        (line,) = lines
        assert line.startswith(f"warning: layer 2: expert 5 has had no token for {IDLE_STEPS} steps; raise training.")
    assert dropped == 6, "rows that are counted by no expert would be seen"


def test_keys_that_the_model_does_not_read_are_told() -> None:
    loss, rate = Training(expert_balance_loss=0.5), Training(expert_bias_rate=0.5)
    plain = replace(EXPERTS, balancing_bias=False)
    assert unread_keys(loss, None) == ["training.expert_balance_loss has no effect: the model has no experts"]
    assert unread_keys(rate, None) == unread_keys(rate, plain)
    assert "no experts with a bias that balances them" in unread_keys(rate, plain)[0]
    assert unread_keys(Training(), None) == unread_keys(loss, plain) == unread_keys(rate, EXPERTS) == []
