"""validation.only: the loss that the training itself told, on any layout, and nothing left behind."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import RankError, Ranks
from tinyrun import quiet_world, tiny_setup, train_tiny

from dtron import registry
from dtron.__main__ import main
from dtron.config import load
from dtron.data.loader import IGNORE_INDEX
from dtron.errors import UserError
from dtron.observe.metrics import read_metrics
from dtron.registry import cross_entropy
from dtron.train import evaluate
from dtron.train.evaluate import Evaluation, ProgressLines
from dtron.train.launch import _what_runs
from dtron.train.resolve import resolve
from dtron.train.trainer import Trainer

MODEL = (
    "--model.n_layers 4 --model.n_heads 4 --training.mixed_precision_param float32 --validation.dataset uneven_rows "
    "--validation.local_batch_size 4"
)
# Of a training, and without meaning for an evaluation: each would end a run that looks at it.
MEANINGLESS = (
    "--training.dataset no/such/data --training.global_batch_size 7 --training.local_batch_size 1 "
    "--training.dataloader.pin_memory --training.max_norm 0 --optimizer.name none_such --optimizer.beta1 2 "
    "--lr_scheduler.warmup_steps 9 --lr_scheduler.total_steps 3 --checkpoint.enable --checkpoint.load_step 77 "
    "--profiling.enable_profiling --profiling.profile_freq 1"
)
WHOLE_LOGITS = "--training.loss_chunk_tokens 0"  # as a registered loss, such as `without_graph`, is given them
IN_HF = "--checkpoint.initial_load_in_hf --model.hf_assets_path {0}"
LAYOUTS = {
    "one rank": (1, ""),
    "fsdp4": (4, ""),
    "hsdp": (4, "--dp_replicate 2"),
    "tp2": (2, "--tp 2"),
    "cp2": (2, "--cp 2"),
    "pp2 1F1B": (2, "--pp 2"),
    "pp2 ZBV, as only a training must not": (
        2,
        "--pp 2 --parallelism.pipeline_parallel_schedule ZBVZeroBubble --activation_checkpoint.selective_ac_option op "
        "--parallelism.gradient_reduce last_microbatch --parallelism.fsdp_reshard_after_forward always",
    ),
}  # fmt: skip


class Uneven:
    """19 sequences of random tokens, a random share of them without a label, and two documents each."""

    vocab_size, tokenizer_json = 96, None

    def __init__(self, seq_len: int, documents: bool) -> None:
        self.seq_len, self.documents, self.fingerprint = seq_len, documents, "uneven"

    def __len__(self) -> int:
        return 19

    def __getitem__(self, i: int) -> Any:
        random = np.random.default_rng(i)
        text = random.integers(0, 96, self.seq_len + 1)
        labels = text[1:].copy()
        labels[: random.integers(self.seq_len)] = IGNORE_INDEX
        begins = np.where(np.arange(self.seq_len) < 5 + i % 5, 0, 5 + i % 5)
        return (text[:-1], labels, begins) if self.documents else (text[:-1], labels)


def uneven(config: Any, section: Any, split: str, seq_len: int, vocab_size: int, log: Any) -> Uneven:
    data = Uneven(seq_len, config.training.attention_mask == "document")
    if section.dataset_path == "unlike":
        data.fingerprint = f"of rank {dist.get_rank()}"
    return data


class Unlabelled(Uneven):
    def __getitem__(self, i: int) -> Any:
        tokens, labels = super().__getitem__(i)
        return tokens, np.full_like(labels, IGNORE_INDEX)


def unlabelled(config: Any, section: Any, split: str, seq_len: int, vocab_size: int, log: Any) -> Unlabelled:
    return Unlabelled(seq_len, False)


def without_graph(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert not logits.requires_grad and not torch.is_grad_enabled()
    return cross_entropy(logits, labels)


def not_a_number(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits, labels) * math.nan


def register_parts() -> None:
    registry.register("dataset", "uneven_rows", uneven)
    registry.register("dataset", "unlabelled", unlabelled)
    registry.register("loss", "without_graph", without_graph)
    registry.register("loss", "not_a_number", not_a_number)


def trained(folder: str, arguments: str) -> tuple[str, float]:
    """Train three steps: the checkpoint, and the loss of the last validation as metrics.jsonl has it."""
    register_parts()
    usual = "--training.dataset uneven_rows --validation.enable --optimizer.lr 0.01 --lr_scheduler.warmup_steps 0"
    trainer, _ = train_tiny(folder, 3, f"{MODEL} {usual} {arguments}")
    dist.barrier()
    losses = [row["validation_loss"] for row in read_metrics(trainer.run_folder / "metrics.jsonl") if row["step"] == 3]
    return str(trainer.start.checkpoints / "step-3"), losses[-1]


def evaluated(checkpoint: str, arguments: str) -> tuple[evaluate.Result, list[str]]:
    """What an evaluation finds, and what rank 0 is told."""
    register_parts()
    world, said = quiet_world()
    only = "--validation.only" + (f" --checkpoint.initial_load_path {checkpoint}" if checkpoint else "")
    return Evaluation(tiny_setup(f"{MODEL} {only} {arguments}"), world).run(), said


def everything_in(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file, time of every folder."""
    paths = [folder, *folder.rglob("*")]
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths}


@pytest.fixture(scope="module")
def causal(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    return ranks.run(2, trained, str(tmp_path_factory.mktemp("causal")), WHOLE_LOGITS)[0]


@pytest.fixture(scope="module")
def documents(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    masks = "--training.attention_mask document"
    return ranks.run(2, trained, str(tmp_path_factory.mktemp("documents")), masks)[0]


def elsewhere(folder: str, checkpoint: str, arguments: str) -> tuple[evaluate.Result, list[str]]:
    """An evaluation whose working directory is `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return evaluated(checkpoint, arguments)


def test_the_same_layout_gives_the_same_bits_and_leaves_nothing(
    ranks: Ranks, causal: tuple[str, float], tmp_path: Path
) -> None:
    """Nor does it look at what a training would need, or keep a graph."""
    checkpoint, loss = causal
    run_folder = Path(checkpoint).parents[1]
    before = everything_in(run_folder.parent)
    more = f"{MEANINGLESS} --job.dump_folder {run_folder.parent} --training.loss without_graph"
    results = ranks.run(2, elsewhere, str(tmp_path), checkpoint, more)
    assert [result.loss for result, _ in results] == [loss, loss]
    assert everything_in(run_folder.parent) == before
    assert ranks.run(2, elsewhere, str(tmp_path), checkpoint, WHOLE_LOGITS)[0][0].loss == loss
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["--checkpoint.initial_load_path {0}", IN_HF])
def test_a_hugging_face_folder_gives_the_same_loss(
    ranks: Ranks, causal: tuple[str, float], tmp_path: Path, given: str
) -> None:
    checkpoint, loss = causal
    assert main(["convert", checkpoint, str(tmp_path / "hf")]) == 0
    arguments = f"{given.format(tmp_path / 'hf')} --model.hf_config_path {tmp_path / 'hf'} --pp 2"
    result, said = ranks.run(2, evaluated, "", arguments)[0]
    assert result.loss == pytest.approx(loss, rel=1e-5) and said[-2] == f"weights from {tmp_path / 'hf'}"


def test_what_is_told(ranks: Ranks, causal: tuple[str, float]) -> None:
    checkpoint, loss = causal
    result, said = ranks.run(2, evaluated, checkpoint, "")[0]
    assert said[0].startswith("dtron ") and "dp_shard 2, on 2 x cpu\nllama3 debugmodel: 0.0M parameters" in said[0]
    assert said[1:-1] == [f"weights from {checkpoint}"]
    labels = [np.count_nonzero(Uneven(16, False)[i][1] != IGNORE_INDEX) for i in range(19)]
    assert result.tokens == sum(labels) and result.perplexity == math.exp(loss)
    told = dict(line.split(maxsplit=1) for line in said[-1].replace("evaluated on", "evaluated_on").splitlines())
    assert told == {
        "checkpoint": checkpoint,
        "evaluated_on": "uneven_rows",
        "loss": f"{loss:.6f} nats per token",
        "perplexity": f"{math.exp(loss):.6g}",
        "tokens": str(sum(labels)),
        "seconds": f"{result.seconds:.1f}",
        "tokens/s": told["tokens/s"],
    }
    first = ranks.run(1, evaluated, checkpoint, "--validation.steps 2")[0][0]
    assert first.tokens == sum(labels[:8])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_loss(ranks: Ranks, causal: tuple[str, float], layout: str) -> None:
    checkpoint, loss = causal
    world, arguments = LAYOUTS[layout]
    results = [result for result, _ in ranks.run(world, evaluated, checkpoint, f"{arguments} {MEANINGLESS}")]
    assert [result.loss for result in results] == [pytest.approx(loss, rel=1e-5)] * world
    assert {result.tokens for result in results} == {ranks.run(1, evaluated, checkpoint, "")[0][0].tokens}


def test_document_masks(ranks: Ranks, documents: tuple[str, float]) -> None:
    checkpoint, loss = documents
    masks = "--training.attention_mask document"
    assert ranks.run(2, evaluated, checkpoint, masks)[0][0].loss == loss
    for layout in ("cp2", "pp2 1F1B"):
        world, arguments = LAYOUTS[layout]
        there = ranks.run(world, evaluated, checkpoint, f"{masks} {arguments}")[0][0].loss
        assert there == pytest.approx(loss, rel=1e-5), layout
    assert ranks.run(2, evaluated, checkpoint, "")[0][0].loss != pytest.approx(loss, rel=1e-5)


# --- refusals

ONLY = "--training.device cpu --validation.only"
CHECKPOINT = f"{ONLY} --checkpoint.initial_load_path x"
PP = "--pp 4 --parallelism.pipeline_parallel_schedule"


@pytest.mark.parametrize(
    ("world", "arguments", "message"),
    [
        (1, ONLY, "none is named: set checkpoint.initial_load_path to outputs/RUN/checkpoint/step-N of a run, or to a "
                  "Hugging Face folder"),
        (1, f"{CHECKPOINT} --checkpoint.exclude_from_loading lm_head.*", "no meaning with validation.only"),
        (1, f"{CHECKPOINT} --validation.dataset c4", "validation.dataset = 'c4' is unknown"),
        (2, f"{CHECKPOINT} --cp 2 --validation.seq_len 66", "validation.seq_len 66 is not divisible by 4"),
        (2, f"{CHECKPOINT} --cp 2 --training.seq_len 66", "training.seq_len 66 is not divisible by 4"),
        (4, f"{CHECKPOINT} {PP} 1F1B --validation.local_batch_size 3", "validation.local_batch_size 3 / .* = 3 micro"),
        (1, f"{CHECKPOINT} --validation.dataloader.persistent_workers", "dataloader.persistent_workers = True"),
        (1, f"{CHECKPOINT} --validation.steps 0", "validation.steps = 0"),
    ],
)  # fmt: skip
def test_refused_before_there_is_a_group(world: int, arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(load(arguments.split()), world)


@pytest.mark.parametrize(
    ("world", "arguments"),
    [
        (1, MEANINGLESS),
        (2, "--cp 2 --training.seq_len 66 --validation.seq_len 64"),
        (4, f"{PP} 1F1B --training.local_batch_size 3"),
    ],
)
def test_accepted_though_no_training_would_be(world: int, arguments: str) -> None:
    """And what runs is the evaluation, whatever the Trainer."""
    setup = resolve(load(f"{CHECKPOINT} {arguments}".split()), world)
    assert setup.config.validation.enable and _what_runs(setup, None) is _what_runs(setup, Trainer) is Evaluation
    with pytest.raises(UserError):
        resolve(load(f"--training.device cpu --validation.enable {arguments}".split()), world)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--checkpoint.initial_load_path nowhere", "initial_load_path: there is no folder nowhere, or it is empty"),
        ("--model.vocab_size 97", "does not fit this model: .* is .* there and .* in this model"),
        ("--validation.dataset_path unlike", "rank 1 has other tokens of dataset unlike than rank 0"),
        ("--validation.dataset unlabelled", "validation.dataset unlabelled has no label to predict"),
        ("--training.loss not_a_number", "the loss of .* on uneven_rows is nan: its weights are not finite, or what"),
    ],
)
def test_found_later(ranks: Ranks, causal: tuple[str, float], arguments: str, message: str) -> None:
    with pytest.raises(RankError, match=f"UserError: .*{message}"):
        ranks.run(2, evaluated, causal[0], arguments)


def test_a_damaged_checkpoint_is_named(ranks: Ranks, tmp_path: Path) -> None:
    checkpoint, _ = ranks.run(1, trained, str(tmp_path), "")[0]
    shard = Path(checkpoint) / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RankError, match=r"step-3 is damaged: __0_0.distcp"):
        ranks.run(1, evaluated, checkpoint, "")


# --- progress


def lines_of_progress(seconds_of_rank: list[float], batches: int) -> tuple[list[str], int]:
    """What is told where a batch takes each rank so long and has a loss of its number, and calls of first_done."""
    _, said = quiet_world()
    started: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        now = [0.0]
        patch.setattr(evaluate.time, "perf_counter", lambda: now[0])
        progress = ProgressLines(batches, lambda: started.append(progress._done))
        for done in range(1, batches + 1):
            now[0] += seconds_of_rank[dist.get_rank()]
            progress(torch.tensor([8.0 * done * (done + 1) / 2, 8.0 * done], dtype=torch.float64))
    assert started == [1]
    return said, progress._told


def test_a_line_every_ten_seconds_at_the_same_batches_everywhere(ranks: Ranks) -> None:
    results = ranks.run(2, lines_of_progress, [1.0, 3.0], 40)  # 2 s a batch on average
    assert results[0] == results[1]
    said, _ = results[0]
    assert [line.partition(":")[0] for line in said] == [f"batch {done} of 40" for done in (8, 13, 18, 23, 28, 33, 38)]
    assert said[0] == "batch 8 of 40: loss so far 4.5000 nats per token; 1m04s left"
    assert said[1].endswith("7.0000 nats per token; 54s left")


def test_short_evaluations_and_single_batches_tell_nothing(ranks: Ranks) -> None:
    assert ranks.run(1, lines_of_progress, [0.001], 40)[0][0] == []
    assert ranks.run(1, lines_of_progress, [20.0], 2)[0][0] == [
        "batch 1 of 2: loss so far 1.0000 nats per token; 20s left"
    ]
