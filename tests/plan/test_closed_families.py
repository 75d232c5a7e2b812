"""The closed form of the peak against dry runs: of every family's blocks, and of random layouts."""

import random

import pytest
from random_layouts import draw
from test_peak import MODEL

from dtron.config import load
from dtron.models.families import FAMILIES
from dtron.plan.dryrun import dry_run
from dtron.plan.layout import Layout, Sizes
from dtron.plan.memory import closed_form_peak
from dtron.plan.report import ESTIMATE_LOW
from dtron.plan.search import FRAGMENTATION, MARGIN, SLACK_BYTES, with_keys
from dtron.plan.single import check_sizes, layout_of
from dtron.train.resolve import resolve

SHORT = {"gemma2", "starcoder2"}  # windows, soft caps and both norms; LayerNorm, biases and no gate
WIDE = "--model.dim 512 --model.n_layers 4 --model.n_heads 8 --model.n_kv_heads 4 --model.ffn_dim 1536"
WIDE += " --model.vocab_size 8192 --training.seq_len 2048 --training.loss_chunk_tokens 512"
WIDE += " --training.mixed_precision_param bfloat16"


@pytest.mark.parametrize("family", [f if f in SHORT else pytest.param(f, marks=pytest.mark.long) for f in FAMILIES])
def test_the_peak_of_a_family_is_near_the_recorded_one(family: str) -> None:
    layout = Layout(dp_shard=4, recompute="none", loss_chunk=512)
    start = load(f"{MODEL} --model.name {family} --model.flavor debugmodel {WIDE}".split())
    setup = resolve(with_keys(start, layout), layout.gpus, "cuda")
    check_sizes(setup)
    closed = closed_form_peak(Sizes.of(setup.model_config), layout, 2048).peak
    recorded = dry_run(setup, 0).peak.total
    assert recorded <= closed * (1 + MARGIN)
    assert closed == pytest.approx(recorded, rel=0.10)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_no_random_layout_holds_more_than_the_closed_form_and_its_margin(seed: int) -> None:
    """What is called fitting fits: on ten layouts."""
    drawn = draw(random.Random(100 + seed))
    for _ in range(10):
        setup, sizes, layout = next(drawn)
        closed = closed_form_peak(sizes, layout, setup.config.training.seq_len).peak
        ranks = sorted({0, min(1, layout.pp - 1), layout.pp - 1})
        records = [dry_run(setup, rank * setup.degrees.stage) for rank in ranks]
        estimate = closed * (1 + MARGIN) + SLACK_BYTES
        assert max(record.peak.total for record in records) <= estimate, (sizes, layout)
        # What the allocator reserves may be more than the estimate with its margins, but not by more than this.
        most = estimate * (1 + FRAGMENTATION) * (1 + ESTIMATE_LOW)
        assert max(record.reserved.expandable for record in records) <= most, (sizes, layout)


@pytest.mark.parametrize(
    ("keys", "n", "budgets"),
    [
        ("", 1, (0.75,)),
        *(
            pytest.param(keys, n, (0.75, 0.5, 0.25, 0.0), marks=pytest.mark.long)
            for keys, n in (("", 4), ("--tp 2", 4), ("--cp 2", 4), ("--model.name qwen3 --model.flavor debugmodel", 4))
        ),
    ],
)
def test_a_memory_budget_is_near_the_recorded_one(keys: str, n: int, budgets: tuple[float, ...]) -> None:
    """Of compiled blocks. The second run of a process is compiled anew, or it would keep what the first one keeps."""
    recorded, again = {}, {}
    for budget in (None, *budgets):
        mode = "none" if budget is None else f"memory_budget --activation_checkpoint.memory_budget {budget}"
        words = f"{MODEL} {keys} {WIDE} --compile.enable --activation_checkpoint.mode {mode}"
        setup = resolve(load(words.split()), n, "cuda")
        layout = layout_of(setup)
        record = dry_run(setup, 0)
        recorded[budget], again[budget] = record.peak.total, record.flops["backward"] / record.flops["forward"]
        closed = closed_form_peak(Sizes.of(setup.model_config), layout, 2048).peak
        assert recorded[budget] <= closed * (1 + MARGIN) + SLACK_BYTES
        assert closed == pytest.approx(recorded[budget], rel=0.15)
    assert recorded[0.75] < 0.95 * recorded[None]
    if "--tp" not in keys:
        assert again[0.75] == again[None], "no product is computed again"


@pytest.mark.long
def test_a_compiled_run_whose_loss_is_the_peak_is_near_the_recorded_one() -> None:
    """Of Llama 3 8B with 8 layers; the loss holds a chunk's logits once in fp32, as inductor would at most."""
    words = "--model.flavor 8B --model.n_layers 8 --compile.enable --activation_checkpoint.mode none"
    setup = resolve(load([*words.split(), "--training.seq_len", "8192", "--training.local_batch_size", "1"]), 8, "cuda")
    layout, peak = layout_of(setup), dry_run(setup, 0).peak
    assert peak.module == "loss" and layout.compiled
    closed = closed_form_peak(Sizes.of(setup.model_config), layout, 8192)
    assert closed.moment == "loss" and closed.peak == pytest.approx(peak.total, rel=0.02)


@pytest.mark.long
def test_moments_in_bf16_halve_their_bytes() -> None:
    """Of the state, 8 bytes of each parameter's 12 are moments; recorded and in closed form."""
    peaks = {}
    for dtype in ("float32", "bfloat16"):
        layout = Layout(dp_shard=2, recompute="full", state_dtype=dtype)
        start = load(f"{MODEL} --training.seq_len 16 --optimizer.beta2 0.95".split())
        setup = resolve(with_keys(start, layout), layout.gpus, "cuda")
        found = dry_run(setup, 0)
        peaks[dtype] = (
            found.peak.parts["optimizer state"],
            closed_form_peak(Sizes.of(setup.model_config), layout, 16).state,
        )
    (full, closed), (half, closed_half) = peaks["float32"], peaks["bfloat16"]
    assert half == pytest.approx(full / 2, rel=0.01)
    assert closed - closed_half == pytest.approx(full / 2, rel=0.02)


@pytest.mark.long
def test_masks_are_recorded_as_on_cuda() -> None:
    """Of documents, FlexAttention's mask of blocks; no scores, which soft caps have on a CPU."""
    keys = f"{MODEL} --training.seq_len 2048 --activation_checkpoint.mode none"
    causal, documents = (
        dry_run(resolve(load(f"{keys} --training.attention_mask {mask}".split()), 1, "cuda"), 0).peak.total
        for mask in ("causal", "document")
    )
    # document_start [2, 2048] of int64, on its way twice, and the mask: int32 [2, 4, 16, 16].
    assert 0 < documents - causal <= 3 * 2 * 2048 * 8 + 2 * 4 * 16 * 16 * 4
    capped = f"{keys} --model.name gemma2 --model.flavor debugmodel --model.n_layers 2"
    peak = dry_run(resolve(load(capped.split()), 1, "cuda"), 0).peak
    scores = 2 * 4 * 2048 * 2048 * 4
    assert peak.parts["activations"] < scores
