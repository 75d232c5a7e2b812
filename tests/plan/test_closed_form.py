"""The closed forms against dry runs and published steps, and what `dtron plan` makes of them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from test_peak import setup_of

from dtron.__main__ import main
from dtron.config import load
from dtron.models.families import FAMILIES
from dtron.models.flops import flops_per_token
from dtron.models.spec import meta_model
from dtron.plan.dryrun import dry_run
from dtron.plan.hardware import HARDWARE
from dtron.plan.layout import Layout, Sizes, in_flight, layers_per_stage
from dtron.plan.memory import closed_form_peak
from dtron.plan.record import KINDS
from dtron.plan.report import draw
from dtron.plan.search import Candidate, Search, layout_keys, layouts, record, with_keys
from dtron.plan.slower import near_batch
from dtron.plan.timemodel import predict
from dtron.registry import look_up
from dtron.train.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "configs/debug.toml")
WIDE = "--model.dim 1024 --model.n_heads 8 --model.n_kv_heads 4 --model.ffn_dim 3584 --model.vocab_size 32000"


@pytest.mark.parametrize("name", ["llama3-8B", "smollm-1.7B", "qwen3_moe-30B-A3B", "mixtral-8x7B"])
def test_sizes_are_those_of_the_model(name: str) -> None:
    family, flavor = name.split("-", 1)
    spec, m = look_up("model", family, ""), FAMILIES[family][flavor]
    model, s = meta_model(spec, m), Sizes.of(m)
    assert s.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-3)
    flops = flops_per_token(model, [12 * m.n_heads * m.head_size * 4096] * m.n_layers)
    assert s.flops_per_token(4096) == pytest.approx(flops, rel=1e-3)


CASES = {
    "fsdp8": Layout(dp_shard=8, microbatch=2, microbatches=2, recompute="op"),
    "fsdp2 tp2": Layout(dp_shard=2, tp=2, microbatch=1, recompute="none"),
    "hsdp cp2": Layout(dp_replicate=2, dp_shard=4, cp=2, microbatch=1, recompute="full", reshard=False),
    "pp2": Layout(pp=2, dp_shard=4, microbatch=1, microbatches=8, recompute="op", reshard=False),
    "fsdp2 tp2 whole logits": Layout(dp_shard=2, tp=2, microbatch=1, recompute="none", loss_chunk=0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_near_the_recorded_one(name: str) -> None:
    layout = CASES[name]
    start = setup_of(f"{WIDE} --training.seq_len 2048 --training.loss_chunk_tokens {layout.loss_chunk}", 1)
    setup = resolve(with_keys(start.config, layout), layout.gpus, "cuda")
    recorded = max(dry_run(setup, rank * setup.degrees.stage).peak.total for rank in range(layout.pp))
    closed = closed_form_peak(Sizes.of(setup.model_config), layout, 2048).peak
    assert closed == pytest.approx(recorded, rel=0.08)


def test_layouts_are_what_dtron_accepts() -> None:
    """Every layout of 8 GPUs passes the checks of train.py, and all degrees are among them."""
    config = load(["--job.config_file", DEBUG])
    s = Sizes.of(setup_of("--model.n_layers 2", 1).model_config)
    found = list(layouts(s, config.training.seq_len, 8, 16, 8))
    assert {layout.gpus for layout in found} == {8}
    for name, values in {"tp": {1, 2}, "pp": {1, 2}, "cp": {1, 2, 4, 8}, "dp_replicate": {1, 2, 4, 8}}.items():
        assert {getattr(layout, name) for layout in found} == values
    for layout in found[::37]:
        resolve(with_keys(config, layout), 8, "cpu")


def test_more_of_a_resource_is_never_slower() -> None:
    s, layout = Sizes.of(FAMILIES["llama3"]["8B"]), Layout(dp_shard=16, microbatch=1, microbatches=4)
    h100, h200 = (predict(s, layout, 8192, HARDWARE[name]) for name in ("h100", "h200"))
    assert h200.step_s < h100.step_s
    assert 0.3 < h100.mfu_causal < h100.mfu_full < 0.8
    parts = [
        getattr(h100, name) for name in vars(h100) if name.endswith("_s") and name not in ("step_s", "tokens_per_s")
    ]
    assert sum(parts) == pytest.approx(h100.step_s)


def test_microbatches_in_flight() -> None:
    assert [in_flight(Layout(pp=4, microbatches=8), rank) for rank in range(4)] == [4, 3, 2, 1]
    assert in_flight(Layout(pp=4, microbatches=2), 0) == 2
    assert in_flight(Layout(), 0) == 1
    assert sorted(layers_per_stage(Sizes.of(FAMILIES["llama3"]["405B"]), 8192, 16)) == [7] * 2 + [8] * 14


def test_the_command_ranks_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.toml"
    arguments = ["plan", DEBUG, "--gpus", "8", "--exact", "1", "--json", "--out", str(out), "--top", "3"]
    assert main([*arguments, "--training.global_batch_size", "16", "--tp", "2"]) == 0
    best, *others = json.loads(capsys.readouterr().out)
    assert best["fits"] and best["exact"] and best["gpus"] == 8 and len(others) == 2
    assert best["tokens_per_s_per_gpu"] >= others[0]["tokens_per_s_per_gpu"] > 0
    assert sum(best["terms_s"].values()) == pytest.approx(best["step_s"])
    config = load(["--job.config_file", str(out)])
    assert config.parallelism.tensor_parallel_degree == 2  # a key that was given
    resolve(config, 8, "cpu")
    text = out.read_text()
    assert main(arguments) == 1 and out.read_text() == text
    assert f"--out {out} exists, and is not overwritten" in capsys.readouterr().err


def test_all_keys_that_are_given_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, keys = tmp_path / "plan.toml", "--training.seq_len 32 --optimizer.name Muon --training.steps 5 --tp 2"
    arguments = ["plan", DEBUG, "--gpus", "2", "--exact", "0"]
    assert main([*arguments, "--out", str(out), *keys.split()]) == 0
    config = load(["--job.config_file", str(out)])
    assert (config.training.seq_len, config.training.steps, config.optimizer.name) == (32, 5, "Muon")
    capsys.readouterr()
    assert main(["plan", str(out), "--gpus", "2", "--as-configured"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tp 2 ") and "fits: needs" in said and "GiB of 79.1" in said
    assert main([*arguments, "--out", str(tmp_path / "no" / "plan.toml")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main([*arguments, "--tp", "3"]) == 1
    assert "tp 3 = 3 does not divide --gpus 2" in capsys.readouterr().err
    assert main([*arguments, "--global-batch-tokens", "1000", "--top", "1"]) == 0
    assert "15 whole sequences of 64 are 960 of the 1,000 tokens given" in capsys.readouterr().out


def test_a_dry_run_that_fails_leaves_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel\nof that")

    monkeypatch.setattr("dtron.plan.search.dry_run", fail)
    assert main(["plan", DEBUG, "--gpus", "2", "--exact", "2", "--top", "2", "--json"]) == 0
    said = capsys.readouterr()
    assert [c["exact"] for c in json.loads(said.out)] == [False, False]
    assert "a dry run of it failed, so that its memory is an estimate: no kernel" in said.err


def test_one_gpu_may_free_its_gathered_weights() -> None:
    """As fsdp_reshard_after_forward says; the closed form and the record know both."""
    peaks = []
    for reshard in (True, False):
        layout = Layout(microbatch=1, recompute="none", reshard=reshard)
        start = setup_of(f"{WIDE} --training.seq_len 2048 --training.loss_chunk_tokens {layout.loss_chunk}", 1)
        setup = resolve(with_keys(start.config, layout), 1, "cuda")
        peaks.append(dry_run(setup, 0).peak.total)
        closed = closed_form_peak(Sizes.of(setup.model_config), layout, 2048).peak
        assert closed == pytest.approx(peaks[-1], rel=0.03)
    assert peaks[0] < peaks[1]


def test_the_table_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"name": "h100", "memory_bytes": 2.2e9, "gpus_per_node": 2}))
    arguments = ["plan", DEBUG, "--gpus", "4", "--exact", "0", "--hardware", str(small), "--explain"]
    assert main([*arguments, "--global-batch-tokens", "1024"]) == 0
    text = capsys.readouterr().out
    assert "Not among them:" in text and "GiB of 2 at least" in text and "a step of" in text
    assert (
        main(["plan", str(ROOT / "configs/llama3-8b.toml"), "--gpus", "64", "--tp", "2", "--exact", "0", "--explain"])
        == 0
    )
    text = capsys.readouterr().out
    peak = re.search(r"the peak is ([0-9.]+) GiB, (at the loss|in the backward of a block)", text)
    parts = [float(size) for size in re.findall(r"^ +([0-9.]+) GiB [a-z]", text, re.MULTILINE)]
    assert peak and len(parts) >= 5 and sum(parts) == pytest.approx(float(peak[1]), abs=0.04)


def test_layouts_that_fit_and_are_slower_have_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(ROOT / "configs/llama3-8b.toml"), "--gpus", "16", "--exact", "0", "--top", "1"]
    # 127 sequences split over one GPU of data parallel at a time; 128 over all.
    assert main([*arguments, "--global-batch-tokens", str(127 * 8192)]) == 0
    text = capsys.readouterr().out
    assert "127 sequences a step have few divisors: 128 would be" in text
    assert "--global-batch-tokens 1048576" in text
    assert main([*arguments, "--global-batch-tokens", str(128 * 8192)]) == 0
    text = capsys.readouterr().out
    assert "few divisors" not in text
    lines = text.split("and what takes longer (estimates):\n")[1].split("\n\n")[0].splitlines()
    by_name = {line.split()[0]: line for line in lines}
    assert set(by_name) == {"tp", "pp", "cp", "dp_replicate", "recompute"}, "experts are not of this model"
    assert re.search(r"tp 1;.* 8 \d\d% \(tensor parallel \+[0-9.]+ s\)", by_name["tp"]), by_name
    assert re.search(r"full \d\d% \(recomputation \+[0-9.]+ s\)", by_name["recompute"]), by_name
    shares = [int(share) for share in re.findall(r"(\d+)%", text.split("estimates):")[1].split("Not among")[0])]
    assert shares and max(shares) <= 100


@pytest.mark.parametrize(
    ("batch", "gpus", "near"), [(128, 64, None), (127, 64, 128), (100, 8, 96), (96, 64, None), (7, 64, None)]
)
def test_a_batch_nearby_that_splits_better(batch: int, gpus: int, near: int | None) -> None:
    assert near_batch(batch, gpus) == near


def test_bad_input_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DEBUG, "--gpus", "8", "--exact", "0", "--training.global_batch_size", "7", "--cp", "1"]) == 1
    assert "makes a global batch of 7 sequences" in capsys.readouterr().err
    tiny = tmp_path / "tiny.json"
    tiny.write_text(json.dumps({"name": "h100", "memory_bytes": 1e6}))
    assert main(["plan", DEBUG, "--gpus", "2", "--exact", "0", "--hardware", str(tiny)]) == 1
    first, *others = capsys.readouterr().err.splitlines()
    assert "no layout of 2 x h100 fits; nor does it on 1,024 times as many. Too big: " in first
    assert 1 <= len(others) <= 3 and "at least" in others[0]


def test_a_model_that_fits_nowhere_is_told_where_it_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The smallest number of GPUs and the term that is too big come first; rejected families are one line."""
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"name": "h100", "memory_bytes": 9e9, "gpus_per_node": 4}))
    arguments = ["plan", str(ROOT / "configs/llama3-8b.toml"), "--hardware", str(small), "--exact", "0", "--gpus"]
    assert main([*arguments, "8"]) == 1
    first, *others = capsys.readouterr().err.splitlines()
    found = re.search(r"it would fit on (\d+) GPUs \((.+)\)\. Too big: parameters and optimizer state, ", first)
    assert found and 8 < int(found[1]) <= 128 and found[2], first
    assert len(others) <= 3 and sum("at least" in line for line in others) == len(others)
    assert any("more of (pp, tp, cp) with too many" in line for line in others)
    assert main([*arguments, found[1]]) == 0


def test_what_fits_but_for_the_margins_of_an_estimate_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """A step of bf16 moments on one GPU, of which the record holds less than the estimate with its margins."""
    keys = "--model.n_layers 12 --model.dim 1024 --training.global_batch_size 8 --training.local_batch_size 2"
    keys += " --activation_checkpoint.mode full --optimizer.state_dtype bfloat16"
    keys += " --parallelism.fsdp_reshard_after_forward never"
    arguments = ["plan", DEBUG, *keys.split(), "--gpus", "1", "--json", "--top", "1"]
    assert main([*arguments, "--exact", "0"]) == 0
    estimate = json.loads(capsys.readouterr().out)[0]["needed_bytes"]
    file = tmp_path / "less.json"
    file.write_text(json.dumps({"name": "h100", "memory_bytes": estimate - 1e6}))
    arguments += ["--hardware", str(file)]
    assert main([*arguments, "--exact", "0"]) == 1
    assert main([*arguments, "--exact", "1"]) == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert found["exact"] and found["fits"] and found["needed_bytes"] < estimate
    parts = found["estimated_peak_parts_bytes"]
    assert "activations" in parts and 0 < sum(parts.values()) < estimate
    # The same beside slower ones that fit by estimate: it is recorded, and comes first.
    free = [word for word in arguments if word not in ("--activation_checkpoint.mode", "full")]
    assert main([*free[:-2], "--exact", "0"]) == 0  # on a whole GPU
    by_estimate = json.loads(capsys.readouterr().out)[0]
    file.write_text(json.dumps({"name": "h100", "memory_bytes": by_estimate["needed_bytes"] - 1e6}))
    slower, first = ((main([*free, "--exact", n]), json.loads(capsys.readouterr().out)[0])[1] for n in ("0", "1"))
    assert slower["tokens_per_s_per_gpu"] < first["tokens_per_s_per_gpu"] == by_estimate["tokens_per_s_per_gpu"]
    assert first["exact"] and not slower["exact"]
    (recorded,) = first["recorded_peak_parts_bytes"]
    total = sum(size for name, size in recorded.items() if name != "stages")
    assert total == pytest.approx(first["peak_bytes"], rel=1e-4)  # the batch of later microbatches is not in it
    # One that does not fit after all takes no row.
    monkeypatch.setattr("dtron.plan.search.record", lambda c, setup, hw: dataclasses.replace(c, exact=True))
    assert main([*free, "--exact", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["exact"] and row["keys"] == slower["keys"] != first["keys"]


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["plan", DEBUG, "--gpus", "4", "--exact", "0", "--picture", str(tmp_path / "pictures"), "--pp", "2"]
    assert main(arguments) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert set(files) == {"time.png", "speed.png", "steps.png"}
    assert all(data.startswith(b"\x89PNG") for data in files.values())


def test_keys_of_a_layout() -> None:
    keys = layout_keys(
        Layout(pp=2, dp_shard=2, microbatch=2, microbatches=4, virtual=2, recompute="full", reshard=False)
    )
    assert keys["training.local_batch_size"] == 8 and keys["training.global_batch_size"] == 16
    assert keys["parallelism.pipeline_parallel_schedule"] == "Interleaved1F1B"
    assert keys["parallelism.fsdp_reshard_after_forward"] == "default"


@pytest.mark.parametrize("layout", [Layout(pp=2, microbatches=24, reshard=False), Layout(dp_shard=2, microbatches=6)])
def test_a_dry_run_of_fewer_microbatches_tells_the_peak_of_all(layout: Layout, tmp_path: Path) -> None:
    """And what is held over the step, which is drawn for each stage, and reserved."""
    s = setup_of(f"{WIDE} --training.seq_len 512", 1)
    setup = resolve(with_keys(s.config, layout), layout.gpus, "cuda")
    memory = closed_form_peak(Sizes.of(setup.model_config), layout, 512)
    time = predict(Sizes.of(setup.model_config), layout, 512, HARDWARE["h100"])
    candidate = record(Candidate(layout, memory, time, 0.0, 0.0, False), setup, HARDWARE["h100"])
    whole = max(dry_run(setup, rank * setup.degrees.stage).peak.total for rank in range(layout.pp))
    assert candidate.exact and candidate.fits
    assert candidate.peak_bytes == pytest.approx(whole, rel=1e-3)
    assert [r.stages for r in candidate.records] == [(stage,) for stage in range(layout.pp)]
    for each in candidate.records:
        held = [moment.total for moment in each.timeline]
        assert max(held) == each.peak.total and 100 < len(held) <= 300 and 0 < held[0] < each.peak.total
        phases = [moment.phase for moment in each.timeline]
        assert phases[0] == "forward" and phases[-1] == "update" and "backward" in phases
        kinds = {kind for moment in each.timeline for kind in moment.parts}
        assert kinds <= set(KINDS) and {"parameters", "gradients", "optimizer state", "activations"} <= kinds
        r = each.reserved
        assert each.peak.total <= r.allocated <= min(r.reserved, r.expandable) < 2 * each.peak.total
    needed = max(each.reserved.expandable for each in candidate.records)
    assert candidate.needed_bytes > candidate.reserved_bytes >= needed
    assert candidate.reserved_plain_bytes and candidate.reserved_plain_bytes > candidate.peak_bytes
    pytest.importorskip("matplotlib")
    draw([candidate], Search([candidate], [], None, 1, {(1, layout.pp): 1.0}, {}), "title", str(tmp_path))
    stages = ["memory.png"] if layout.pp == 1 else ["memory-stage-0.png", "memory-stage-1.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*stages, "speed.png", "time.png"]
