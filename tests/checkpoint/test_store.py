"""A checkpoint saved on one layout goes on, on any other, exactly as if it had never been interrupted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parity.layout import CPU, Case, build, build_config, local_batches
from ranks import RankError, Ranks

from dtron.checkpoint import store
from dtron.config.sections import Optimizer
from dtron.errors import UserError
from dtron.mesh import Degrees
from dtron.train.optimizer import build_optimizers, scale_gradients, squared_gradient_norm

BEFORE, AFTER = 2, 3
SOURCE = Degrees(dp_shard=2, tp=2)
TARGETS = {
    "one rank": (Degrees(), {}),
    "pp2": (Degrees(pp=2), {}),
    "the same layout": (SOURCE, {}),
    "V-shaped pp2": (Degrees(pp=2), {"parallelism.pipeline_parallel_schedule": "ZBVZeroBubble"}),
}
ADAMW = Optimizer(lr=1e-2, eps=1e-4)


def _train(case: Case, first: int, last: int, load: str = "", save: str = "") -> list[float]:
    """Steps [first, last) on this rank; returns the global losses."""
    mesh, model = build(case, build_config(case))
    optimizers = build_optimizers(model, ADAMW)
    if load:
        store.load(Path(load), model, optimizers)
    losses = []
    for step in range(first, last):
        model.loss.valid_tokens, parts = local_batches(step % 2, case, mesh, True)
        loss = model.forward_backward(*parts[0], last=True)
        model.finish_gradients()
        squares = squared_gradient_norm(model.named_parameters(), model.aliases, case.degrees.stage, CPU)
        stats = torch.stack((loss.double() / case.degrees.tp, squares))
        dist.all_reduce(stats)
        scale_gradients([p for _, p in model.named_parameters()], stats[1].sqrt(), 0.5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(stats[0].item())
    if save:
        store.save(Path(save), model, optimizers, store.Progress(step=last, consumed=8 * last, global_batch_size=8))
    return losses


@pytest.fixture(scope="module", params=["small", "tied"])
def saved(
    request: pytest.FixtureRequest, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[float]]:
    """(model, checkpoint after BEFORE steps on dp2 x tp2, the losses of the AFTER steps that followed there)."""
    path = tmp_path_factory.mktemp(request.param) / "step-2"
    case = Case("source", SOURCE, model=request.param)
    ranks.run(SOURCE.world, _train, case, 0, BEFORE, "", str(path))
    whole = ranks.run(SOURCE.world, _train, case, 0, BEFORE + AFTER)[0]
    return request.param, path, whole[BEFORE:]


@pytest.mark.parametrize("target", TARGETS)
def test_any_layout_goes_on_with_the_same_losses(
    ranks: Ranks, saved: tuple[str, Path, list[float]], target: str
) -> None:
    model, path, expected = saved
    degrees, keys = TARGETS[target]
    got = ranks.run(degrees.world, _train, Case(target, degrees, keys, model=model), BEFORE, BEFORE + AFTER, str(path))[
        0
    ]
    assert got == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(expected[1], rel=1e-4), "losses that do not move prove nothing"


def test_the_optimizer_state_matters(ranks: Ranks, saved: tuple[str, Path, list[float]]) -> None:
    """The losses above would differ without AdamW's moments: weights alone are not enough."""
    model, path, expected = saved
    got = ranks.run(1, _weights_only, Case("one", model=model), str(path))[0]
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    assert got[2] != pytest.approx(expected[2], rel=1e-3)


def _weights_only(case: Case, path: str) -> list[float]:
    original = store.load
    store.load = lambda where, model, optimizers: original(where, model, None)  # type: ignore[assignment]
    try:
        return _train(case, BEFORE, BEFORE + AFTER, path)
    finally:
        store.load = original


def test_names_know_no_layout(saved: tuple[str, Path, list[float]]) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    model, path, _ = saved
    names = set(FileSystemReader(str(path)).read_metadata().state_dict_metadata)
    weights = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert "layers.3.self_attn.q_proj.weight" in weights
    assert ("lm_head.weight" in weights) == (model == "small")
    assert {f"optimizer.{name}.{state}" for name in weights for state in ("exp_avg", "exp_avg_sq", "step")} < names


def test_a_checkpoint_is_never_overwritten(ranks: Ranks, saved: tuple[str, Path, list[float]]) -> None:
    model, path, _ = saved
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    with pytest.raises(RankError, match="nothing is overwritten"):
        ranks.run(1, _train, Case("one", model=model), 0, 0, "", str(path))
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_another_model_is_refused_by_name(ranks: Ranks, saved: tuple[str, Path, list[float]]) -> None:
    model, path, _ = saved
    with pytest.raises(RankError, match="UserError: .*step-2 cannot be loaded into this model"):
        ranks.run(1, _train, Case("one", model="deep" if model == "small" else "deep_tied"), 0, 0, str(path))


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for name, text in {
        "step-3": json.dumps({"step": 3}),
        "step-20": json.dumps({"step": 20, "model_only": True}),
        "step-100.partial": json.dumps({"step": 100}),
        "step-x": json.dumps({"step": 7}),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / store.PROGRESS_FILE).write_text(text)
    (tmp_path / "step-50").mkdir()  # no progress file: a save that was killed
    assert store.steps_in(tmp_path) == [3, 20]
    assert store.newest(tmp_path) == tmp_path / "step-3", "weights alone cannot be resumed"
    with pytest.raises(UserError, match="no dtron checkpoint"):
        store.read_progress(tmp_path / "step-50")


def _delete(folder: str, keep: int) -> None:
    store.delete_old(Path(folder), keep)


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3]), (2, [2, 3]), (5, [1, 2, 3])])
def test_retention_deletes_only_our_oldest(ranks: Ranks, tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / store.PROGRESS_FILE).write_text(json.dumps({"step": step}))
    (tmp_path / "notes").mkdir()
    ranks.run(1, _delete, str(tmp_path), keep)
    assert store.steps_in(tmp_path) == left
    assert (tmp_path / "notes").is_dir()


def test_progress_round_trip(tmp_path: Path) -> None:
    progress = store.Progress(step=5, consumed=40, tokens=1280, global_batch_size=8, attempt=2)
    (tmp_path / store.PROGRESS_FILE).write_text(json.dumps(replace(progress).__dict__))
    assert store.read_progress(tmp_path) == progress
