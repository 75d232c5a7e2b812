"""A checkpoint saved on one layout goes on, on any other, exactly as if it had never been interrupted."""

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint.training import checkpoint_of, train
from parity.layout import Case
from parity.table import CSV, FOUR_D, FSDP2, HSDP, ONE, PP2, QUARTERS, SCHEDULES, TP2, Degrees, schedule
from ranks import RankError, Ranks

BEFORE, AFTER = 2, 8
EXACT = 5  # steps after the resume whose losses and norms are held to 1e-5; the others to 1e-4
CASES = {
    case.name: case
    for case in (
        Case("one", ONE),
        Case("fsdp2", FSDP2),
        Case("hsdp", HSDP),
        Case("tp2", TP2),
        Case("cp2", Degrees(cp=2)),
        *(Case(f"pp2 {name}", PP2, schedule(name)) for name in SCHEDULES),
        Case("pp2 csv", PP2, QUARTERS, csv=CSV),
        Case("4d", FOUR_D),
    )
}
Curve = list[tuple[float, float]]


@pytest.fixture(scope="module", params=["small", "tied"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(ranks: Ranks, model: str) -> Curve:
    """Losses and norms of the one process that was never interrupted."""
    curve = ranks.run(1, train, case_of("one", model), 0, BEFORE + AFTER)[0]
    assert curve[BEFORE][0] != pytest.approx(curve[-1][0], rel=1e-2), "losses that do not move prove nothing"
    return curve


@pytest.fixture(scope="module")
def saved(ranks: Ranks, model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a 4D run after BEFORE steps."""
    folder = tmp_path_factory.mktemp(model)
    ranks.run(FOUR_D.world, train, case_of("4d", model), 0, BEFORE, "", str(folder))
    return checkpoint_of(folder, BEFORE)


def case_of(name: str, model: str) -> Case:
    return replace(CASES[name], model=model)


def same(got: Curve, expected: Curve) -> None:
    wanted = expected[BEFORE:]
    assert got[:EXACT] == [pytest.approx(pair, rel=1e-5) for pair in wanted[:EXACT]]
    assert got == [pytest.approx(pair, rel=1e-4) for pair in wanted]


@pytest.mark.parametrize("target", CASES)
def test_any_layout_goes_on(ranks: Ranks, model: str, saved: str, expected: Curve, target: str) -> None:
    case = case_of(target, model)
    same(ranks.run(case.degrees.world, train, case, BEFORE, BEFORE + AFTER, saved)[0], expected)


@pytest.mark.parametrize("source", [name for name in CASES if name != "4d"])
def test_any_layout_saves(ranks: Ranks, model: str, tmp_path: Path, expected: Curve, source: str) -> None:
    case = case_of(source, model)
    ranks.run(case.degrees.world, train, case, 0, BEFORE, "", str(tmp_path))
    one = case_of("one", model)
    same(ranks.run(1, train, one, BEFORE, BEFORE + AFTER, checkpoint_of(tmp_path, BEFORE))[0], expected)


@pytest.mark.long
@pytest.mark.parametrize("source", CASES)
def test_every_pair(ranks: Ranks, model: str, tmp_path: Path, expected: Curve, source: str) -> None:
    case = case_of(source, model)
    ranks.run(case.degrees.world, train, case, 0, BEFORE, "", str(tmp_path))
    for target in CASES:
        case = case_of(target, model)
        same(ranks.run(case.degrees.world, train, case, BEFORE, BEFORE + AFTER, str(tmp_path / "step-2"))[0], expected)


def test_the_same_layout_goes_on_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    for case in (CASES["hsdp"], CASES["pp2 ZBVZeroBubble"]):
        folder = tmp_path / case.name
        ranks.run(case.degrees.world, train, case, 0, BEFORE, "", str(folder))
        whole = ranks.run(case.degrees.world, train, case, 0, BEFORE + AFTER)[0]
        got = ranks.run(case.degrees.world, train, case, BEFORE, BEFORE + AFTER, checkpoint_of(folder, BEFORE))[0]
        assert got == whole[BEFORE:]


def test_the_optimizer_state_matters(ranks: Ranks, model: str, saved: str, expected: Curve) -> None:
    """The losses above would differ without AdamW's moments: weights alone are not enough."""
    got = ranks.run(1, train, case_of("one", model), BEFORE, BEFORE + AFTER, saved, "", True)[0]
    assert got[0] == pytest.approx(expected[BEFORE], rel=1e-5)
    assert got[2][0] != pytest.approx(expected[BEFORE + 2][0], rel=1e-3)


def test_names_know_no_layout(model: str, saved: str) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    names = set(FileSystemReader(saved).read_metadata().state_dict_metadata)
    weights = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert "layers.3.self_attn.q_proj.weight" in weights
    assert ("lm_head.weight" in weights) == (model == "small")
    assert {f"optimizer.{name}.{state}" for name in weights for state in ("exp_avg", "exp_avg_sq", "step")} < names


def test_another_model_is_refused_by_name_and_shape(ranks: Ranks, saved: str, model: str) -> None:
    deep = "deep" if model == "small" else "deep_tied"
    with pytest.raises(RankError, match=r"UserError: .*step-2 does not fit this model: it has no model.layers.4"):
        ranks.run(2, train, replace(CASES["pp2 GPipe"], model=deep), 0, 0, saved)
    with pytest.raises(RankError, match=r"embed_tokens.weight is \[96, 32\] there and \[98, 36\] in this model"):
        ranks.run(1, train, replace(CASES["one"], model="uneven"), 0, 0, saved)
