"""Blocks that are alike are compiled once, on every layout: else Dynamo gives up at the ninth."""

import pytest
from test_peak import setup_of
from torch._dynamo.utils import counters

from dtron import compat
from dtron.plan.dryrun import dry_run

LAYOUTS = {
    "experts ep4 tp2": (4, "--model.name qwen3_moe --tp 2 --dp 2 --ep 4"),
    "documents cp2": (2, "--cp 2 --training.attention_mask document"),
    "experts ep2": (2, "--model.name qwen3_moe --ep 2 --dp 2"),
    "llama tp2": (2, "--tp 2"),
    "norm over all heads tp2": (2, "--model.name olmo2 --tp 2"),
    "attention sinks tp2": (2, "--model.name gpt_oss --tp 2"),
    "learned activation tp2": (2, "--model.name apertus --tp 2"),
}
SHORT = {"experts ep4 tp2", "documents cp2"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SHORT else pytest.mark.long) for n in LAYOUTS])
def test_blocks_share_their_code(name: str) -> None:
    world, arguments = LAYOUTS[name]
    if "qwen3_moe" in arguments and not compat.has_units_of_two_meshes:
        pytest.skip("refused: compiled blocks with experts that are sharded otherwise than the rest need torch 2.13")
    keys = "--compile.enable --training.mixed_precision_param bfloat16 --activation_checkpoint.mode none"
    before = counters["stats"]["unique_graphs"]
    dry_run(setup_of(f"{arguments} --model.n_layers 3 {keys}", world), 0, replay=False)
    assert counters["stats"]["unique_graphs"] - before == 1
