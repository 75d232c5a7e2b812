"""Recording blocks that are alike once gives what recording each of them does."""

import pytest
from test_peak import LAYOUTS, setup_of

from dtron import compat
from dtron.plan.dryrun import dry_run

# In 1F1B the last blocks of stage 1 come first; interleaved has two parts on a rank; "op" keeps what a block is given.
NAMES = (
    "fsdp2 accumulation last never",
    "tp2 recompute op",
    "pp2 accumulation recompute full",
    "pp2 interleaved",
    "ep2",
)


@pytest.mark.parametrize("name", NAMES)
def test_replayed_blocks_change_nothing(name: str) -> None:
    world, arguments = LAYOUTS[name]
    setup = setup_of(f"{arguments} --model.n_layers 6", world)
    rank = world - 1
    replayed, whole = dry_run(setup, rank), dry_run(setup, rank, replay=False)
    assert (replayed.peak, replayed.start_bytes) == (whole.peak, whole.start_bytes)
    assert (replayed.collectives, replayed.flops) == (whole.collectives, whole.flops)
    nested = name == "ep2" and not compat.has_units_of_two_meshes  # blocks with a unit inside are recorded in full
    assert (replayed.replayed > 0) != nested and whole.replayed == 0


def test_what_is_not_alike_is_recorded_in_full() -> None:
    """fp32 adds gradients up in place, and zero-bubble schedules split the backward of a block."""
    world, arguments = LAYOUTS["pp2 interleaved"]
    zero_bubble = arguments.replace("Interleaved1F1B", "InterleavedZeroBubble")
    assert dry_run(setup_of(zero_bubble, world), 0).replayed == 0
    assert dry_run(setup_of(f"{arguments} --training.mixed_precision_param float32", world), 0).replayed == 0


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 7, 15])
def test_a_405b_is_recorded_in_seconds(stage: int) -> None:
    """A stage of 16,384 ranks; in the worst case 15 CPU-seconds."""
    import time

    from dtron.config import load
    from dtron.train.resolve import resolve

    text = "--job.config_file configs/llama3-405b.toml --dp 128 --training.local_batch_size 16"
    text += " --training.global_batch_size 2048 --parallelism.pipeline_parallel_schedule 1F1B"
    setup = resolve(load(text.split()), 16384, "cuda")
    start = time.process_time()
    record = dry_run(setup, stage * setup.degrees.stage)
    assert time.process_time() - start < 15
    assert record.stages == (stage,)
