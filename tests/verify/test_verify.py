"""`dtron verify` finds right layouts equal to one process, and names the parameter of each planted fault."""

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from extending import outside_model
from parallel.random_model import DropoutLlama
from parity.test_rules import BROKEN
from ranks import RankError, Ranks

import dtron.__main__
from dtron import registry
from dtron.config import Config, replace
from dtron.mesh import fewest_ranks
from dtron.models.families import FAMILIES
from dtron.train.step import Step
from dtron.verify import report
from dtron.verify.draws import Draw, alike
from dtron.verify.layout import Seen, train_layout
from dtron.verify.outputs import first_that_differs
from dtron.verify.plain import Truth, train_plain
from dtron.verify.report import StepSeen, compare, table
from dtron.verify.small import make_proof

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = {"pp": "pipeline", "tp": "tensor", "cp": "context", "ep": "expert"}


def run_config(name: str = "llama3", keys: Mapping[str, Any] | None = None, **degrees: int) -> Config:
    """A run of a family's small model, in bf16 and by AdamW, as users have them; degrees: pp, tp, cp, ep, dp."""
    config = Config()
    values = {"model.name": name, "training.seq_len": 256}
    for short, degree in degrees.items():
        key = "data_parallel_shard" if short == "dp" else f"{LAYOUT[short]}_parallel"
        values[f"parallelism.{key}_degree"] = degree
    for key, value in (values | dict(keys or {})).items():
        config = replace(config, key, value)
    return config


def job(rule: str, config: Config, truth: Truth) -> Seen:
    """A rank's part of the command, without a rule."""
    with BROKEN[rule]():
        return train_layout(make_proof(config, None, 16, False), truth)


def verify(ranks: Ranks, config: Config, rule: str = "nothing") -> tuple[list[StepSeen], list[str]]:
    """What the command finds."""
    proof = make_proof(config, None, 16, False)
    truth = train_plain(proof, 2)
    try:
        results = ranks.run(proof.setup.degrees.world, job, rule, config, truth)
    except RankError as error:
        return [], [str(error)]
    if rule == "nothing":  # and is not said where all is equal
        outputs = [seen.outputs for seen in results]
        assert first_that_differs(truth.outputs, outputs, proof.setup.degrees.tp) == ""
        seen = {name for of_rank in outputs for name in of_rank}
        assert sum(name in seen for name in truth.outputs) > len(truth.outputs) / 2 > 5
    return compare(truth, results, proof.setup.degrees)


DOCUMENTS = {"training.attention_mask": "document"}
RIGHT = {
    "fsdp2 and tp2": run_config(dp=2, tp=2),
    "documents under cp2, accumulated": run_config(
        keys={**DOCUMENTS, "training.local_batch_size": 2, "training.global_batch_size": 8}, dp=1, cp=2
    ),
    "interleaved": run_config(
        keys={"parallelism.pipeline_parallel_schedule": "Interleaved1F1B"}, dp=1, pp=2
    ),
    "experts": run_config("qwen3_moe", dp=2, ep=2),
    "windows and sinks under tp2": run_config("gpt_oss", dp=1, tp=2),
    "Gemma's windows under cp2": run_config("gemma3", dp=1, cp=2),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_layout_is_equal(name: str, ranks: Ranks):
    steps, wrong = verify(ranks, RIGHT[name])
    assert not wrong and len(steps) == 2 and all(step.equal for step in steps)
    # A tenth of the tolerance is the most that rounding was seen to make.
    assert max(off for step in steps for off in step.off.values()) < report.WAY_RTOL / 10
    assert all(step.norm[0] > 0.05 for step in steps)


@contextlib.contextmanager
def dropout_alike() -> Iterator[None]:
    """Ranks of tensor parallel draw the same numbers."""

    def seed(step: Step, number: int) -> None:
        m = step.mesh
        key = f"{number} {m.dp_rank} {m.cp_rank} {m.pp_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))

    with patch.object(Step, "_seed_random", seed):
        yield


BROKEN["dropout_alike"] = dropout_alike

# Fault -> the layout that shows it, and what names the place.
FAULTS = {
    "divide_factor": (run_config(dp=2), "lm_head.weight"),
    "norms_in_the_plan": (run_config(dp=1, tp=2), "input_layernorm.weight"),
    "unscaled_gradients": (run_config(dp=1, pp=2), "lm_head.weight"),
    "bias_of_o_added_once": (run_config("gpt_oss", dp=1, tp=2), "o_proj.bias"),
    "router_gradients_summed": (run_config("qwen3_moe", dp=1, tp=2), "mlp.gate.weight"),
    "global_positions": (run_config(dp=1, cp=2), "k_proj.weight"),
}


# Fault -> the module whose output is the first that differs; the others make a right forward, or none.
FIRST = {"bias_of_o_added_once": "layers.0.self_attn.o_proj", "global_positions": "layers.0.self_attn.core"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_its_parameter_named(fault: str, ranks: Ranks):
    config, place = FAULTS[fault]
    steps, wrong = verify(ranks, config, fault)
    assert wrong if not steps else not steps[0].equal and max(steps[0].off.values()) > 10 * report.WAY_RTOL
    first = [name for name, off in steps[0].off.items() if off > report.WAY_RTOL] if steps else []
    assert any(place in name for name in [*first, *wrong]), (first, wrong)
    said = table(steps, wrong, color=False)
    assert said[-1] == ("The layout does not train as one process does." if steps else "Nothing was compared.")
    if fault in FIRST:
        assert f"is that of {FIRST[fault]}: look at" in wrong[-1]
    if fault == "router_gradients_summed":  # and nothing else is wrong yet
        assert all("mlp.gate" in name for name in first)


class GPTOfFaults:
    """Tensor-parallel plans of a user's own model."""

    @staticmethod
    def plan(change: dict[str, Any]) -> Any:
        plan = {k: v for k, v in {**outside_model.tensor_plan(True), **change}.items() if v is not None}
        return replaced(outside_model.SPEC, tensor_plan=lambda _: plan)


def _outside(change: dict[str, Any]) -> Any:
    return patch.dict(registry._REGISTRY["model"], {"gpt": GPTOfFaults.plan(change)})


BROKEN["outside"] = lambda: _outside({})
BROKEN["outside_norm"] = lambda: _outside({"layers.*.norm": None})


@pytest.mark.parametrize(("fault", "place"), [("outside", ""), ("outside_norm", "layers.0.norm.weight")])
def test_a_model_and_plan_from_outside(fault: str, place: str, ranks: Ranks):
    config = run_config("gpt", {"model.flavor": "tiny", "training.seq_len": 64}, dp=1, tp=2)
    with BROKEN["outside"]():
        steps, wrong = verify(ranks, config, fault)
    if place:
        assert any(place in line for line in wrong)
    else:
        assert not wrong and all(step.equal for step in steps)


BROKEN["dropout"] = lambda: _dropout()
BROKEN["dropout_drawn_alike"] = lambda: _both(_dropout(), dropout_alike())


@contextlib.contextmanager
def _both(*managers: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield


def _dropout() -> Any:
    spec = registry.look_up("model", "llama3", "")
    return patch.dict(registry._REGISTRY["model"], {"llama3": replaced(spec, build=DropoutLlama)})


@pytest.mark.parametrize(("fault", "right"), [("dropout", True), ("dropout_drawn_alike", False)])
def test_dropout_is_compared_by_its_draws(fault: str, right: bool, ranks: Ranks):
    with BROKEN["dropout"]():
        steps, wrong = verify(ranks, run_config(dp=1, tp=2), fault)
    assert all(step.equal for step in steps)
    assert (not wrong) if right else ("ranks 0 and 1" in wrong[0] and "layers." in wrong[0])


def test_draws_of_equal_values_must_be_equal_and_others_not():
    a, b = Draw("x", "1", "m"), Draw("x", "2", "n")
    assert alike([[a], [a]]) is None and alike([[a], [b]]) is None
    assert alike([[a], [Draw("x", "2", "m")]]) == (0, 1, "x")
    assert alike([[a], [Draw("x", "1", "n")]]) == (0, 1, "x")


def test_what_no_rank_holds_is_said():
    truth = Truth(1.0, 0, [1.0], [1.0], {"a": torch.zeros(2), "b": torch.zeros(2)}, [{}])
    seen = Seen([1.0], [1.0], [{"a": 0.0, "b": float("nan")}], {"a": 2, "b": 1})
    (step,), wrong = compare(truth, [seen], make_proof(run_config(dp=1), 1, 1, False).setup.degrees)
    assert wrong == ["no rank trains b, or not the whole of it"]
    assert step.off["b"] == float("inf") and not step.equal


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_made_small_for_every_dimension(name: str):
    config = run_config(name, {"model.flavor": list(FAMILIES[name])[-1]}, dp=4, pp=2, cp=2)
    proof = make_proof(config, None, 8, False)
    m = proof.setup.model_config
    assert proof.setup.degrees.world == 8 and m.dim <= 128 and m.n_layers <= 8
    assert proof.asked.model_config.variant == m.variant


def test_a_degree_of_three_is_made_small_too():
    """SmolLM 135M has 9 heads and 3 for keys and values."""
    m = make_proof(
        run_config("smollm", {"model.flavor": "135M", "training.seq_len": 192}, dp=1, tp=3), None, 16, False
    ).setup.model_config
    assert (m.n_kv_heads, m.vocab_size % 3, m.n_layers) == (3, 0, 2) and m.dim <= 128


def test_degrees_are_lowered_and_stay_above_one():
    config = run_config(dp=8, tp=4, keys={"parallelism.data_parallel_replicate_degree": 4, "model.flavor": "8B"})
    assert fewest_ranks(config.parallelism, 2) == 128
    degrees = make_proof(config, None, 8, False).setup.degrees
    assert (degrees.dp_replicate, degrees.dp_shard, degrees.tp) == (2, 2, 2)
    assert make_proof(config, None, 8, True).setup.degrees.world == 128


def test_the_command_prints_a_table_and_its_exit_code_tells(capsys: pytest.CaptureFixture[str], tmp_path: Any):
    (tmp_path / "run.toml").write_text("[training]\nseq_len = 256\n")
    command = ["verify", str(tmp_path / "run.toml"), "--dp", "2", "--steps", "1"]
    # In a process of its own, which has started no other yet, as a user's has not.
    run = subprocess.run([sys.executable, "-m", "dtron", *command], capture_output=True, text=True, cwd=ROOT)
    text = run.stdout
    assert (run.returncode, run.stderr) == (0, "")
    assert "dp_shard 2: 2 ranks on this machine" in text and "Equal: loss within 1e-05" in text
    assert "not here  bfloat16, AdamW (SGD instead), clipping" in text
    said = "\n".join(report.describe(make_proof(run_config(dp=1, pp=2, tp=2), None, 1, False), 1))
    assert "4 microbatches of 1 in each pass of 1F1B" in said and "more than --ranks 1" in said
    small = [
        "--model.n_layers",
        "2",
        "--model.dim",
        "64",
        "--model.ffn_dim",
        "128",
        "--model.vocab_size",
        "256",
        "--training.seq_len",
        "64",
    ]
    assert dtron.__main__.main([*command, "--full", *small]) == 0
    assert "batch     16 sequences of 64 random tokens, 8 in a forward" in capsys.readouterr().out
    with patch.object(report, "WAY_RTOL", 0.0):
        assert dtron.__main__.main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["equal"] and found["degrees"]["dp_shard"] == 2 and len(found["steps"]) == 1


def test_a_plain_model_that_fails_is_told_from_a_layout_that_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "failing_model.py").write_text(
        "from dataclasses import replace\nfrom extending import outside_model\nfrom dtron import registry\n"
        "class Failing(outside_model.GPT):\n"
        "    def forward(self, x, positions):\n        raise RuntimeError('no such shape')\n"
        "registry.register('model', 'failing', replace(outside_model.SPEC, build=Failing))\n"
    )
    model = "[model]\nname = 'failing'\nflavor = 'tiny'\n[training]\nseq_len = 64\n"
    (tmp_path / "run.toml").write_text(f"[job]\ncustom_import = ['failing_model']\n{model}")
    monkeypatch.syspath_prepend(tmp_path)
    assert dtron.__main__.main(["verify", str(tmp_path / "run.toml"), "--dp", "2"]) == 1
    out, err = capsys.readouterr()
    assert "one process with the plain model: rank 0 failed: RuntimeError: no such shape" in out
    assert "Nothing was compared." in out and "in forward" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.toml"], "nowhere.toml"),
        (["configs/debug.toml", "--gpus", "3", "--tp", "2"], "does not divide the world size 3"),
        (["configs/debug.toml", "--tp", "3"], "tensor_parallel_degree 3 does not divide"),
        (["configs/debug.toml", "--steps", "0"], "--steps"),
        (["configs/debug.toml", "--training.nothing", "0"], "training.nothing"),
    ],
)
def test_mistakes_are_said_before_anything_starts(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert dtron.__main__.main(["verify", *arguments]) == 1
    assert said in capsys.readouterr().err
