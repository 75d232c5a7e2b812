"""NaN and spikes: the step is named, skipped or ends the run, alike on all ranks, without a wait a step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, Ranks
from tinyrun import train_tiny
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dtron import compat, registry
from dtron.checkpoint.files import Progress, read_manifest
from dtron.checkpoint.storage import StoragePath
from dtron.config.sections import Training
from dtron.errors import UserError
from dtron.observe.metrics import read_metrics
from dtron.registry import cross_entropy
from dtron.train.guard import MAX_SKIPPED_IN_A_ROW, NONFINITE, SPIKE, StepGuard

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def make(config: Training, optimizers: Any = (), device: str = "cpu", progress: Progress | None = None) -> StepGuard:
    return StepGuard(config, list(optimizers), progress or Progress(), torch.device(device))


def one(check: StepGuard, step: int, loss: float, norm: float, share: float = 1.0, asked: float = 0.0) -> float:
    """A step's numbers through the guard: its verdict."""
    stats = torch.tensor([loss, norm, asked], dtype=torch.float64)
    judged = check.judge(stats)
    check.watch(step, torch.cat((stats, judged)), torch.tensor(share))
    return judged[0].item()


def watch(loss: float, norm: float, bad_rank: int) -> str:
    check = make(Training())
    one(check, 6, 2.0, 1.0)
    try:
        one(check, 7, loss, norm, NAN if dist.get_rank() == bad_rank else 1.0)
    except FloatingPointError as error:
        return str(error)
    return ""


def test_step_and_rank_are_named(ranks: Ranks) -> None:
    loss = ranks.run(2, watch, NAN, 1.0, 1)
    advice = "; training.on_nonfinite = skip would leave such steps out"
    assert loss[0] == loss[1] == f"step 7: loss nan, gradient norm 1.0: the loss of rank 1 is not finite{advice}"
    norm = ranks.run(2, watch, 2.0, INF, -1)[0]
    assert norm == f"step 7: loss 2.0, gradient norm inf: the loss is finite on every rank, its gradient is not{advice}"
    assert ranks.run(2, watch, 2.0, 1.0, -1) == ["", ""]


def test_on_cuda_the_host_looks_one_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the event: no wait in the step itself, an answer in the next one, and at the end."""
    waited = []
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)

    def cuda() -> StepGuard:
        check = make(Training())
        check._cuda = True
        return check

    check = cuda()
    one(check, 1, 2.0, 1.0, asked=1.0)
    assert not waited and not check.stop_requested
    one(check, 2, NAN, 1.0, NAN)
    assert len(waited) == 1 and check.stop_requested  # step 1's, while step 2 runs
    with pytest.raises(FloatingPointError, match="step 2: loss nan.*rank 0"):
        one(check, 3, 2.0, 1.0)
    check = cuda()
    one(check, 1, 2.0, INF)
    with pytest.raises(FloatingPointError, match="step 1: loss 2.0, gradient norm inf"):
        check.finish()
    check.finish()  # and then nothing is left to look at


# --- skipping


def skipped_steps(kind: str) -> tuple[bool, list[float], int]:
    """Three AdamW steps on a sharded weight, the second bad: (as after the other two alone, verdicts, count)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def train(norms: list[float]) -> tuple[torch.Tensor, list[float], int]:
        p = nn.Parameter(distribute_tensor(torch.arange(8.0).reshape(4, 2), mesh, [Shard(0)], src_data_rank=None))
        optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1, fused=True)
        progress = Progress()
        config = Training(on_nonfinite="skip", spike_factor=3.0) if kind == "nan" else Training(spike_factor=3.0)
        check = make(config, [optimizer], progress=progress)
        check._norm = torch.tensor([0.9, 0.9], dtype=torch.float64)  # as after many steps of norm 1
        verdicts = []
        for step, norm in enumerate(norms):
            gradient = torch.full((4, 2), norm) * torch.arange(1.0, 9.0).reshape(4, 2)
            p.grad = distribute_tensor(gradient, mesh, [Shard(0)], src_data_rank=None)
            verdicts.append(one(check, step, 2.0, norm))
            optimizer.step()
        state = [v.full_tensor() if isinstance(v, DTensor) else v for v in optimizer.state[p].values()]
        return (
            torch.cat([p.full_tensor().flatten(), *(s.detach().flatten() for s in state)]),
            verdicts,
            progress.skipped,
        )

    bad = NAN if kind == "nan" else 50.0
    with_bad, verdicts, count = train([1.0, bad, 0.5])
    without, _, _ = train([1.0, 0.5])
    return torch.equal(with_bad, without), verdicts, count


@pytest.mark.parametrize(("kind", "verdict"), [("nan", NONFINITE), ("spike", SPIKE)])
def test_a_skipped_step_changes_neither_weights_nor_state(ranks: Ranks, kind: str, verdict: float) -> None:
    for equal, verdicts, count in ranks.run(2, skipped_steps, kind):
        assert equal and verdicts == [0.0, verdict, 0.0] and count == 1


def test_without_the_guard_a_nan_spoils_the_weights() -> None:
    """What skip_update_where prevents."""
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], fused=True)
    p.grad = torch.full((3,), NAN)
    optimizer.step()
    assert p.isnan().all()


def spikes(config: Training, norms: list[float]) -> list[float]:
    check = make(config, [torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)])
    return [one(check, step, 2.0, norm) for step, norm in enumerate(norms)]


def test_what_a_spike_is() -> None:
    config = Training(spike_factor=3.0)
    early = [100.0, 1.0] + [1.0] * 17
    assert spikes(config, [*early, 50.0]) == [0.0] * 20, "a run's first 20 steps are not judged"
    calm = [1.0] * 30
    assert spikes(config, [*calm, 2.9, 3.5, 3.5, 2.9]) == [0.0] * 31 + [2.0, 2.0, 0.0], "a spike does not move the mean"
    assert spikes(Training(), [*calm, 1e9]) == [0.0] * 31, "0: none is"


def test_a_spike_can_end_the_run() -> None:
    check = make(Training(spike_factor=3.0, on_spike="stop"))
    for step in range(30):
        one(check, step, 2.0, 1.0)
    with pytest.raises(FloatingPointError, match="step 30: .* a spike, over training.spike_factor 3.0 .* mean 1"):
        one(check, 30, 2.0, 4.0)


def test_decisions_survive_a_resume() -> None:
    """The running mean is in the checkpoint, to the last bit."""
    config, norms = Training(spike_factor=1.5, on_spike="stop"), [1.0 + 0.01 * i for i in range(40)]
    whole, progress = make(config), Progress()
    for step, norm in enumerate(norms):
        one(whole, step, 2.0, norm)
    half = make(config, progress=progress)
    for step, norm in enumerate(norms[:25]):
        one(half, step, 2.0, norm)
    half.finish()
    resumed = make(config, progress=Progress(norm_mean=progress.norm_mean, norm_weight=progress.norm_weight))
    for step, norm in enumerate(norms[25:]):
        one(resumed, step, 2.0, norm)
    assert torch.equal(resumed._norm, whole._norm)


def test_a_run_that_only_skips_ends() -> None:
    dist_free = Training(on_nonfinite="skip")
    check = make(dist_free, [torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)])
    check._whose = lambda share: "its gradient is not"  # type: ignore[method-assign]
    for step in range(MAX_SKIPPED_IN_A_ROW - 1):
        one(check, step, NAN, 1.0)
    one(check, 50, 2.0, 1.0)  # a good one in between
    for step in range(MAX_SKIPPED_IN_A_ROW - 1):
        one(check, step, NAN, 1.0)
    with pytest.raises(FloatingPointError, match=f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped"):
        one(check, 99, NAN, 1.0)


@pytest.mark.parametrize("config", [Training(on_nonfinite="skip"), Training(spike_factor=2.0)])
def test_an_optimizer_that_cannot_skip_is_refused(config: Training) -> None:
    p = nn.Parameter(torch.ones(1))
    for optimizer in (torch.optim.SGD([p], lr=0.1), torch.optim.AdamW([p], foreach=True)):
        assert not compat.takes_scale_and_skip(optimizer)
        with pytest.raises(UserError, match="optimizer.implementation = fused"):
            make(config, [optimizer])
    make(Training(spike_factor=2.0, on_spike="stop"), [torch.optim.SGD([p], lr=0.1)])  # stopping needs nothing


# --- in a run


class BadOnce:
    """Cross entropy that is NaN, or a thousand times too large, in one call of one rank."""

    def __init__(self, what: str) -> None:
        self.what, self.calls = what, 0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        factor = (NAN if self.what == "nan" else 1000.0) if self.calls == 25 and dist.get_rank() == 1 else 1.0
        return cross_entropy(logits, labels) * factor


LOSSES = {what: BadOnce(what) for what in ("nan", "spike")}


def numbers(*_: Any) -> Any:
    """Sequence i: the digits of the square of i."""

    class Numbers:
        vocab_size, tokenizer_json = 96, None

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, i: int) -> Any:
            text = (torch.arange(17) * (i * i + 1) % 96).numpy()
            return text[:-1], text[1:]

    return Numbers()


def run_with(what: str, folder: str, arguments: str) -> tuple[list[dict[str, Any]], list[str], int, bool]:
    """Rows of the metrics, what rank 0 was told, skipped steps and whether the weights are finite."""
    registry.register("dataset", "numbers", numbers)
    LOSSES[what].calls = 0
    registry.register("loss", f"bad_once_{what}", LOSSES[what])
    named = f"--training.dataset numbers --training.loss bad_once_{what} --metrics.log_freq 1"
    trainer, said = train_tiny(folder, 30, f"{named} {arguments}")
    finite = all(bool(p.to_local().isfinite().all()) for _, p in trainer.model.named_parameters())  # type: ignore[operator]
    rows = read_metrics(trainer.run_folder / "metrics.jsonl")
    return rows, said, trainer.progress.skipped, finite


@pytest.mark.parametrize(
    ("what", "arguments", "text"),
    [
        ("nan", "--training.on_nonfinite skip", "step 25: loss nan, gradient norm nan: the loss of rank 1 is not"),
        ("spike", "--training.spike_factor 20", "a spike, over training.spike_factor 20.0 times the running mean"),
    ],
)  # fmt: skip
def test_a_run_goes_on_without_the_bad_step(ranks: Ranks, tmp_path: Path, what: str, arguments: str, text: str) -> None:
    rows, said, skipped, finite = ranks.run(2, run_with, what, str(tmp_path), arguments)[0]
    assert skipped == 1 and finite and len(rows) == 30
    (warning,) = [line for line in said if "its update is skipped (1 so far)" in line]
    assert text in warning
    assert [row["step"] for row in rows if row.get("skipped_steps") == 1] == list(range(25, 31))
    (manifest,) = [read_manifest(StoragePath.at(path)) for path in tmp_path.glob("*/checkpoint/step-30")]
    assert manifest.progress.skipped == 1 and manifest.progress.norm_weight > 0.4


def test_without_skipping_the_run_ends_there(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="FloatingPointError: step 25: loss nan"):
        ranks.run(2, run_with, "nan", str(tmp_path), "")
