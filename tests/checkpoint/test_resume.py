"""A checkpoint saved on one layout goes on, on any other, exactly as if it had never been interrupted."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoint.training import ADAMW, checkpoint_of, train
from parity.layout import Case
from parity.table import CSV, FOUR_D, FSDP2, HSDP, ONE, PP2, PP2_FSDP2, QUARTERS, SCHEDULES, TP2, Degrees, schedule
from ranks import RankError, Ranks

THREE_D = Degrees(2, dp_shard=2, tp=2)
BEFORE = 2
ENOUGH = 3  # steps after the resume in which lost optimizer state shows, see `test_the_optimizer_state_matters`
EXACT = 5  # steps after the resume whose losses and norms are held to 1e-5; the others to 1e-4
CASES = {
    case.name: case
    for case in (
        Case("3d", THREE_D),  # first: it shares the world of the one that saves
        Case("4d", FOUR_D),
        Case("one", ONE),
        Case("fsdp2", FSDP2),
        Case("hsdp", HSDP),
        Case("tp2", TP2),
        Case("cp2", Degrees(cp=2)),
        *(Case(f"pp2 {name}", PP2, schedule(name)) for name in SCHEDULES),
        Case("pp2 csv", PP2, QUARTERS, csv=CSV),
    )
}
# Tied embeddings are two parameters under pipeline parallel and one elsewhere: those three are enough to see it.
TRIED = [("small", name) for name in CASES] + [
    ("tied", name) for name in ("one", "pp2 1F1B", "pp2 ZBVZeroBubble")
]  # fmt: skip
Curve = list[tuple[float, float]]


def case_of(name: str, model: str) -> Case:
    return replace(CASES[name], model=model)


@pytest.fixture(scope="module")
def expected(ranks: Ranks) -> Callable[[str, int], Curve]:
    """(model, steps) -> losses and norms of the one process that was never interrupted."""

    @cache
    def curve(model: str, steps: int) -> Curve:
        whole = ranks.run(1, train, case_of("one", model), 0, steps)[0]
        assert whole[BEFORE][0] != pytest.approx(whole[-1][0], rel=1e-2), "losses that do not move prove nothing"
        return whole

    return curve


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """model -> the checkpoint of a run after BEFORE steps: in 3D, of tied embeddings, a pipeline's matter, in 2D.

    `test_every_pair` has those of 4D, and of all others.
    """

    @cache
    def path(model: str) -> str:
        folder = tmp_path_factory.mktemp(model)
        case = Case("", THREE_D if model == "small" else PP2_FSDP2, model=model)
        ranks.run(case.degrees.world, train, case, 0, BEFORE, "", str(folder), share=case.degrees)
        return checkpoint_of(folder, BEFORE)

    return path


DEAR = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "GPipe")


def check_same(got: Curve, whole: Curve) -> None:
    wanted = whole[BEFORE:]
    assert got[:EXACT] == [pytest.approx(pair, rel=1e-5) for pair in wanted[:EXACT]]
    assert got == [pytest.approx(pair, rel=1e-4) for pair in wanted]


def some_long(pairs: list[tuple[str, str]]) -> list[Any]:
    """The dearest, which others stand for, are long tests."""
    dear = {("small", "4d"), ("small", "hsdp"), *(("small", f"pp2 {name}") for name in DEAR)}
    return [pytest.param(*pair, marks=[pytest.mark.long] if pair in dear else []) for pair in pairs]


@pytest.mark.parametrize(("model", "target"), some_long(TRIED))
def test_any_layout_goes_on(
    ranks: Ranks, saved: Callable[[str], str], expected: Callable[[str, int], Curve], model: str, target: str
) -> None:
    case = case_of(target, model)
    last = BEFORE + (EXACT if case.degrees.world < 16 else ENOUGH)
    arguments = (case, BEFORE, last, saved(model))
    got = ranks.run(case.degrees.world, train, *arguments, share=case.degrees)[0]
    check_same(got, expected(model, last))


@pytest.mark.parametrize(("model", "source"), some_long([pair for pair in TRIED if pair[1] != "3d"]))
def test_any_layout_saves(
    ranks: Ranks, tmp_path: Path, expected: Callable[[str, int], Curve], model: str, source: str
) -> None:
    case, last = case_of(source, model), BEFORE + EXACT
    ranks.run(case.degrees.world, train, case, 0, BEFORE, "", str(tmp_path))
    got = ranks.run(1, train, case_of("one", model), BEFORE, last, checkpoint_of(tmp_path, BEFORE))[0]
    check_same(got, expected(model, last))


@pytest.mark.long
@pytest.mark.parametrize("source", CASES)
@pytest.mark.parametrize("model", ["small", "tied"])
def test_every_pair(
    ranks: Ranks, tmp_path: Path, expected: Callable[[str, int], Curve], model: str, source: str
) -> None:
    case, last = case_of(source, model), BEFORE + 10
    ranks.run(case.degrees.world, train, case, 0, BEFORE, "", str(tmp_path))
    for target in CASES:
        case = case_of(target, model)
        got = ranks.run(case.degrees.world, train, case, BEFORE, last, checkpoint_of(tmp_path, BEFORE))[0]
        check_same(got, expected(model, last))


def test_the_same_layout_goes_on_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    case, last = CASES["hsdp"], BEFORE + EXACT
    ranks.run(case.degrees.world, train, case, 0, BEFORE, "", str(tmp_path))
    whole = ranks.run(case.degrees.world, train, case, 0, last)[0]
    got = ranks.run(case.degrees.world, train, case, BEFORE, last, checkpoint_of(tmp_path, BEFORE))[0]
    assert got == whole[BEFORE:]


@pytest.mark.parametrize(("changes", "others"), [({"state_dtype": "bfloat16"}, 1), ({"name": "Muon"}, 0)], ids=str)
def test_other_optimizers_go_on_bit_for_bit_and_on_another_layout(
    ranks: Ranks, tmp_path: Path, changes: dict[str, Any], others: int
) -> None:
    """bf16 moments go on as fp32 ones too. Muon iterates in bf16, which makes of noise a hundred times as much."""
    optimizer = replace(ADAMW, **changes)
    case = Case("", PP2_FSDP2, schedule("ZBVZeroBubble"), "tied")
    last, world = BEFORE + ENOUGH, case.degrees.world
    ranks.run(world, train, case, 0, BEFORE, "", str(tmp_path), False, optimizer, share=case.degrees)
    whole = ranks.run(world, train, case, 0, last, "", "", False, optimizer, share=case.degrees)[0][BEFORE:]
    checkpoint = checkpoint_of(tmp_path, BEFORE)
    got = ranks.run(world, train, case, BEFORE, last, checkpoint, "", False, optimizer, share=case.degrees)[0]
    assert got == whole
    for other, tolerance in ((optimizer, 1e-4 if others else 1e-3), (ADAMW, 1e-3))[: 1 + others]:
        one = ranks.run(1, train, case_of("one", "tied"), BEFORE, last, checkpoint, "", False, other)[0]
        assert one == [pytest.approx(pair, rel=tolerance) for pair in whole]


def test_the_optimizer_state_matters(
    ranks: Ranks, saved: Callable[[str], str], expected: Callable[[str, int], Curve]
) -> None:
    """The losses above would differ without AdamW's moments: weights alone are not enough."""
    whole = expected("small", BEFORE + EXACT)
    got = ranks.run(1, train, CASES["one"], BEFORE, BEFORE + EXACT, saved("small"), "", True)[0]
    assert got[0] == pytest.approx(whole[BEFORE], rel=1e-5)
    assert got[2][0] != pytest.approx(whole[BEFORE + 2][0], rel=1e-3)


@pytest.mark.parametrize("model", ["small", "tied"])
def test_names_know_no_layout(saved: Callable[[str], str], model: str) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    names = set(FileSystemReader(saved(model)).read_metadata().state_dict_metadata)
    weights = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert "layers.3.self_attn.q_proj.weight" in weights
    assert ("lm_head.weight" in weights) == (model == "small")
    assert {f"optimizer.{name}.{state}" for name in weights for state in ("exp_avg", "exp_avg_sq", "step")} < names


def test_another_model_is_refused_by_name_and_shape(ranks: Ranks, saved: Callable[[str], str]) -> None:
    with pytest.raises(RankError, match=r"UserError: .*step-2 does not fit this model: it has no model.layers.4"):
        ranks.run(2, train, replace(CASES["pp2 GPipe"], model="deep"), 0, 0, saved("small"))
    with pytest.raises(RankError, match=r"embed_tokens.weight is \[96, 32\] there and \[98, 36\] in this model"):
        ranks.run(1, train, replace(CASES["one"], model="uneven"), 0, 0, saved("small"))
