"""The time of a pipeline's step, from the order in which torch's schedules compute."""

import dataclasses
from pathlib import Path

import pytest

from dtron.__main__ import main
from dtron.config import load
from dtron.errors import UserError
from dtron.models.families import FAMILIES
from dtron.parallel.schedules import SCHEDULES
from dtron.plan.hardware import HARDWARE
from dtron.plan.layout import Layout, Sizes, loss_chunk
from dtron.plan.memory import closed_form_peak
from dtron.plan.schedule import StageTimes, actions, in_flight, simulate, stages_of, step_s
from dtron.plan.search import _schedules, layout_keys, layouts, with_keys
from dtron.plan.single import layout_of
from dtron.plan.timemodel import predict
from dtron.train.resolve import resolve

DEBUG = str(Path(__file__).resolve().parents[2] / "configs/debug.toml")


def equal(n_stages: int, virtual: int = 1, hop_s: float = 0.0) -> StageTimes:
    """Forward, inputs and weights each take a third of 3 s for the stages of a rank."""
    one = (1 / virtual,) * n_stages
    return StageTimes(one, one, one, hop_s)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_microbatch_goes_once_through_each_stage(name: str) -> None:
    pp, m = 4, 8
    n_stages = pp * (2 if SCHEDULES[name].multi else 1)
    rows = actions(name, pp, n_stages, m)
    assert len(rows) == pp
    done = [(stage, kind, microbatch) for row in rows for stage, kind, microbatch in row]
    assert len(done) == len(set(done))
    for stage in range(n_stages):
        for microbatch in range(m):
            kinds = "".join(kind for kind in "FBIW" if (stage, kind, microbatch) in done)
            assert kinds in ("FB", "FIW")
    for row, stages in zip(rows, stages_of(name, pp, n_stages), strict=True):
        assert {stage for stage, _, _ in row} == set(stages)


@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (8, 32)])
def test_the_bubble_of_equal_stages_is_the_textbooks(pp: int, m: int) -> None:
    """(pp - 1) / (m + pp - 1), with v * m for v interleaved stages per rank; zero-bubble ones have less."""
    for name in ("GPipe", "1F1B"):
        assert simulate(name, pp, m, equal(pp)).bubble == pytest.approx((pp - 1) / (m + pp - 1))
    for name, virtual in (("LoopedBFS", 2), ("Interleaved1F1B", 2), ("Interleaved1F1B", 4)):
        found = simulate(name, pp, m, equal(pp * virtual, virtual)).bubble
        assert found == pytest.approx((pp - 1) / (virtual * m + pp - 1))
    interleaved = step_s("Interleaved1F1B", pp, m, equal(2 * pp, 2))
    for name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        assert 3 * m <= step_s(name, pp, m, equal(2 * pp, 2)) < interleaved


@pytest.mark.parametrize("name", SCHEDULES)
def test_many_microbatches_are_taken_from_fewer(name: str) -> None:
    """Exactly: with a slower last stage, and messages that take their time."""
    pp, virtual = 4, 2 if SCHEDULES[name].multi else 1
    for n_microbatches in (64, 66) if not SCHEDULES[name].in_rounds else (64,):
        times = equal(pp * virtual, virtual, 0.05)
        times = dataclasses.replace(times, forward=(*times.forward[:-1], 1.3 / virtual))
        whole = simulate(name, pp, n_microbatches, times)
        assert step_s(name, pp, n_microbatches, times) == pytest.approx(whole.end_s, rel=1e-9)
        assert max(end for *_, end in whole.spans) == whole.end_s
        assert step_s(name, pp, n_microbatches, dataclasses.replace(times, hop_s=0.5)) > whole.end_s


def test_a_timeline_has_no_two_actions_at_once() -> None:
    line = simulate("ZBVZeroBubble", 4, 8, equal(8, 2, 0.1))
    for rank in range(4):
        spans = sorted((start, end) for r, _, start, end in line.spans if r == rank)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
        assert sum(end - start for start, end in spans) == pytest.approx(line.busy_s[rank])


def test_a_csv_file_is_a_schedule(tmp_path: Path) -> None:
    file = tmp_path / "schedule.csv"
    file.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    assert step_s(str(file), 2, 2, equal(2)) == step_s("1F1B", 2, 2, equal(2)) == 9
    assert in_flight(str(file), 2, 2, 2, 0) == 2


def test_uneven_stages_wait_for_the_slowest() -> None:
    """30 blocks and the head on 16 ranks: some ranks have 2 blocks, some 1, which the mean of 1.9 does not show."""
    s = dataclasses.replace(Sizes.of(FAMILIES["llama3"]["8B"]), layers=30, vocab=32000)
    layout = Layout(pp=16, microbatches=64, recompute="none", reshard=False)
    time = predict(s, layout, 8192, HARDWARE["h100"])
    busy = time.step_s - time.bubble_s - time.pipeline_s - time.optimizer_s - time.data_s
    assert time.bubble_s > busy * 15 / 64 * 1.05


def test_zero_bubble_schedules_are_looked_at_where_dtron_takes_them() -> None:
    eager, compiled = (load(["--job.config_file", DEBUG, "--compile.enable", flag]) for flag in ("false", "true"))
    assert set(SCHEDULES) - set(_schedules(eager, {})) == {"GPipe", "LoopedBFS"}
    assert _schedules(compiled, {}) == ("1F1B", "Interleaved1F1B")
    assert _schedules(compiled, {"parallelism.pipeline_parallel_schedule": "GPipe"}) == ("GPipe",)
    s = dataclasses.replace(Sizes.of(FAMILIES["llama3"]["8B"]), layers=16)
    found = [a for a in layouts(s, 512, 4, 32, 8, _schedules(eager, {})) if a.pp == 2]
    assert {(a.schedule, a.virtual) for a in found} == {
        ("1F1B", 1), ("Interleaved1F1B", 2), ("Interleaved1F1B", 4), ("InterleavedZeroBubble", 2),
        ("InterleavedZeroBubble", 4), ("ZBVZeroBubble", 2), ("DualPipeV", 2),
    }  # fmt: skip
    assert all(a.recompute != "op" for a in found if SCHEDULES[a.schedule].zero_bubble)
    start = load(["--job.config_file", DEBUG, "--model.n_layers", "16", "--compile.enable", "false"])
    start = dataclasses.replace(start, training=dataclasses.replace(start.training, mixed_precision_param="bfloat16"))
    for a in {(a.schedule, a.virtual): a for a in found if a.tp == 1}.values():
        made = dataclasses.replace(a, loss_chunk=loss_chunk(start, a.schedule))
        assert layout_of(resolve(with_keys(start, a), 4, "cuda")) == made
    with pytest.raises(UserError, match="leave out parallelism.pipeline_parallel_schedule_csv"):
        _schedules(load(["--job.config_file", DEBUG, "--parallelism.pipeline_parallel_schedule_csv", "x.csv"]), {})


def test_a_v_shaped_pipeline_has_both_ends_on_one_rank() -> None:
    s = Sizes.of(FAMILIES["llama3"]["8B"])
    loop = Layout(pp=4, microbatches=8, virtual=2, recompute="none", reshard=False)
    v = dataclasses.replace(loop, schedule="ZBVZeroBubble")
    assert layout_keys(v)["parallelism.pipeline_parallel_schedule"] == "ZBVZeroBubble"
    assert closed_form_peak(s, v, 4096).peak != closed_form_peak(s, loop, 4096).peak
    assert stages_of("ZBVZeroBubble", 4, 8)[0] == (0, 7)


def test_windows_shared_experts_and_ungated_blocks_take_their_own_time() -> None:
    s, layout = Sizes.of(FAMILIES["llama3"]["8B"]), Layout(dp_shard=8)
    base = predict(s, layout, 8192, HARDWARE["h100"])
    whole, narrow = (dataclasses.replace(s, windows=(window, None)) for window in (8192, 1024))
    assert predict(whole, layout, 8192, HARDWARE["h100"]).attention_s == pytest.approx(base.attention_s)
    share = (1024 - 1024**2 / 16384 + 4096) / 8192
    assert predict(narrow, layout, 8192, HARDWARE["h100"]).attention_s == pytest.approx(share * base.attention_s)
    assert predict(dataclasses.replace(s, matrices=2), layout, 8192, HARDWARE["h100"]).matmul_s < base.matmul_s
    assert predict(dataclasses.replace(s, shared=1024), layout, 8192, HARDWARE["h100"]).matmul_s > base.matmul_s


def test_degrees_that_leave_the_node_are_said_and_too_small_a_batch_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone.json"
    alone.write_text('{"name": "h100", "gpus_per_node": 1}')
    arguments = ["plan", DEBUG, "--gpus", "4", "--exact", "0", "--top", "1"]
    assert main([*arguments, "--tp", "2", "--hardware", str(alone)]) == 0
    assert "Where tp or ep is more than 1, it leaves the node; that is in the price." in capsys.readouterr().out
    assert (
        main(
            [
                *arguments,
                "--parallelism.data_parallel_shard_degree",
                "4",
                "--global-batch-tokens",
                "512",
                "--training.seq_len",
                "256",
            ]
        )
        == 1
    )
    message = capsys.readouterr().err
    assert message.count("error") == 1 and "no layout of 4 GPUs makes a global batch of 2 sequences" in message
