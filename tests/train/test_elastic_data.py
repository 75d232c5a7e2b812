"""One run, stopped and resumed on other layouts, sees sample for sample what an uninterrupted single rank sees.

Prepared, mixed and on-the-fly data; and the metrics of each source, which no layout may change.
"""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from ranks import Ranks

from dtron import registry
from dtron.config import load
from dtron.data.loader import Batch
from dtron.data.prepare import prepare
from dtron.data.sources import SourceSpec, open_source
from dtron.data.tokenizer import read_tokenizer, train_bpe
from dtron.errors import UserError
from dtron.observe.metrics import read_metrics
from dtron.ranks.world import World
from dtron.train.resolve import resolve
from dtron.train.trainer import Trainer

G, S = 8, 32
CONFIG = f"""
[metrics]
log_freq = 1
enable_tensorboard = false
[model]
n_layers = 2
dim = 32
n_heads = 4
n_kv_heads = 2
ffn_dim = 64
vocab_size = 512
[training]
device = "cpu"
seq_len = {S}
local_batch_size = 1
global_batch_size = {G}
mixed_precision_param = "float32"
[optimizer]
lr = 1e-3
eps = 1e-4
[lr_scheduler]
warmup_steps = 2
total_steps = 9
[activation_checkpoint]
mode = "none"
[checkpoint]
enable = true
[compile]
enable = false
"""


MASKLESS = dataclasses.replace(registry.look_up("model", "llama3", "model.name"), document_masks=False)


class Recording(Trainer):
    """Keeps every batch it is given."""

    def next_batch(self) -> Any:
        batch = super().next_batch()
        self.seen = [*getattr(self, "seen", []), (self.progress.step + 1, self.mesh.dp_rank, as_arrays(batch))]
        return batch


def as_arrays(batch: Batch) -> list[Any]:
    return [None if t is None else t.numpy().copy() for t in batch]


def work(folder: str, arguments: list[str]) -> tuple[list[Any], list[dict[str, Any]]]:
    """The job of one rank: what it was given, and on rank 0 the metrics of the run so far."""
    rank, size = dist.get_rank(), dist.get_world_size()
    arguments = ["--job.config_file", f"{folder}/run.toml", *arguments]
    trainer = Recording(resolve(load(arguments), size), World(rank, rank, size, dist.HashStore()))
    trainer.run()
    return trainer.seen, read_metrics(trainer.run_folder / "metrics.jsonl") if rank == 0 else []


class Runner:
    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder

    def __call__(self, outputs: str, world: int, *more: str) -> tuple[dict[int, Any], list[dict[str, Any]]]:
        """Global batches by step, each [tokens, labels, documents, sources], and the metrics of the whole run."""
        arguments = ["--job.dump_folder", str(self.folder / outputs), *more]
        results = self.ranks.run(world, work, str(self.folder), arguments)
        by_rank: dict[tuple[int, int], Any] = {}
        for seen, _ in results:
            for step, dp_rank, arrays in seen:
                same = by_rank.setdefault((step, dp_rank), arrays)  # ranks of tp, cp and pp are given the same
                assert all(np.array_equal(a, b) for a, b in zip(arrays, same, strict=True) if a is not None)
        steps = sorted({step for step, _ in by_rank})
        size = 1 + max(dp_rank for _, dp_rank in by_rank)
        joined = {
            step: [
                None if parts[0] is None else np.concatenate(parts)
                for parts in zip(*(by_rank[step, r] for r in range(size)), strict=True)
            ]
            for step in steps
        }
        return joined, results[0][1]


def write_texts(path: Path, seed: int, n_files: int) -> None:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(2, 7))) for _ in range(80)]
    path.mkdir()
    for file in range(n_files):
        texts = [" ".join(rng.choices(words, k=rng.choice([3, 12, 60]))) for _ in range(25)]
        (path / f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of JSON lines, prepared and as they are, one tokenizer, and a configuration."""
    root = tmp_path_factory.mktemp("elastic")
    (root / "tokenizer").mkdir()
    for seed, name in enumerate(("web", "code")):
        write_texts(root / name, seed, 3)
    texts = [json.loads(line)["text"] for path in sorted(root.glob("*/*.jsonl")) for line in path.open()]
    encoder = train_bpe(texts, 400)
    (root / "tokenizer" / "tokenizer.json").write_text(encoder.json)
    for name in ("web", "code"):
        source = open_source(SourceSpec(str(root / name)), root / "cache")
        prepare(source, encoder, root / f"{name}-prepared", processes=1, shard_tokens=1000, log=lambda _: None)
    (root / "run.toml").write_text(CONFIG)
    return root


@pytest.fixture
def run(ranks: Ranks, folder: Path) -> Runner:
    return Runner(ranks, folder)


def mixture(*sources: tuple[Path, float]) -> list[str]:
    tables = [{"dataset": str(path), "weight": weight} for path, weight in sources]
    return ["--training.mixture", json.dumps(tables)]


Arguments = Callable[[Path], list[str]]
KINDS: dict[str, Arguments] = {
    "prepared": lambda f: ["--training.dataset", str(f / "web-prepared")],
    "mixed": lambda f: mixture((f / "web-prepared", 2), (f / "code-prepared", 1)),
    "on the fly": lambda f: [
        *("--training.dataset", str(f / "web"), "--model.hf_assets_path", str(f / "tokenizer")),
        *("--training.shuffle_documents", "10", "--training.attention_mask", "document"),
    ],
    "mixed on the fly": lambda f: [
        *mixture((f / "web", 2), (f / "code-prepared", 1)),
        *("--model.hf_assets_path", str(f / "tokenizer"), "--training.shuffle_documents", "7"),
    ],
}
PP_TP = ["--pp", "2", "--tp", "2", "--training.local_batch_size", "2"]
SEGMENTS = [(4, 3, []), (4, 5, ["--dp", "2", "--cp", "2"]), (4, 7, PP_TP), (8, 9, [])]  # ranks, last step, layout


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "mixed on the fly" else pytest.mark.long) for kind in KINDS]
)
def test_run_on_changing_layouts_sees_what_one_rank_sees(kind: str, run: Runner, folder: Path) -> None:
    arguments = KINDS[kind](folder)
    name = kind.replace(" ", "-")
    whole, expected = run(f"{name}-whole", 1, *arguments, "--training.steps", "9")
    assert sorted(whole) == list(range(1, 10)) and whole[1][0].shape == (G, S)
    seen: dict[int, Any] = {}
    for ranks, last, layout in SEGMENTS:
        batches, rows = run(f"{name}-parts", ranks, *arguments, *layout, "--training.steps", str(last))
        assert not seen.keys() & batches.keys()
        seen |= batches
    assert sorted(seen) == sorted(whole)
    for step, arrays in whole.items():
        for got, want in zip(seen[step], arrays, strict=True):
            assert (got is None) == (want is None) and (want is None or np.array_equal(got, want)), step
    for row, want in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5), row["step"]
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4), row["step"]
        assert (row["lr"], row["tokens"]) == (want["lr"], row["step"] * G * S)  # not times cp, tp or pp
    assert len({arrays[0].tobytes() for arrays in whole.values()}) == 9
    if "mixed" in kind:
        assert all(abs((arrays[3] == 0).sum() - G * 2 / 3) < 2 for arrays in whole.values())


# The schedule with most parts, two stages per rank and both halves of the backward apart; the others are long.
SCHEDULES = ["ZBVZeroBubble"], [
    "1F1B", "Interleaved1F1B", "DualPipeV", "InterleavedZeroBubble", "GPipe", "LoopedBFS",
]  # fmt: skip
LAYOUTS = [(4, "--tp 2 --cp 2"), (2, "--dp-replicate 2 --training.local_batch_size 2")]  # with accumulation
PIPELINES = [[(2, f"--pp 2 --parallelism.pipeline_parallel_schedule {name}") for name in names] for names in SCHEDULES]

ALIKE = ("loss", "grad_norm", "lr", "tokens", "validation_loss", "attended_tokens", "flops_per_token")


@pytest.mark.parametrize(
    "layouts", [[*LAYOUTS, *PIPELINES[0]], pytest.param(PIPELINES[1], marks=pytest.mark.long)], ids=["few", "others"]
)
def test_metrics_of_each_source_are_the_same_on_every_layout(
    layouts: list[tuple[int, str]], run: Runner, folder: Path, tmp_path: Path
) -> None:
    arguments = [*KINDS["mixed"](folder), "--training.steps", "3", "--training.attention_mask", "document"]
    arguments += ["--model.n_layers", "4", "--training.local_batch_size", "4", "--validation.enable"]
    arguments += ["--validation.dataset", str(folder / "code-prepared"), "--validation.freq", "3"]
    arguments += ["--validation.local_batch_size", "4"]
    batches, expected = run(str(tmp_path / "one"), 1, *arguments)
    for step, row in enumerate(expected, 1):
        tokens = [row[f"source_tokens/{name}-prepared"] for name in ("web", "code")]
        assert sum(tokens) == step * G * S == row["tokens"]
        assert tokens == [sum(int((batches[k][3] == s).sum()) for k in range(1, step + 1)) * S for s in (0, 1)]
        shares = [int((batches[step][3] == s).sum()) / G for s in (0, 1)]
        losses = [row[f"source_loss/{name}-prepared"] for name in ("web", "code")]
        assert np.dot(shares, losses) == pytest.approx(row["loss"], rel=1e-5)
        begins = batches[step][2]
        lengths = [np.unique(line, return_counts=True)[1] for line in begins]
        assert row["attended_tokens"] == pytest.approx(sum((n**2).sum() for n in lengths) / begins.size)
    assert "validation_loss" in expected[2]
    for number, (ranks, layout) in enumerate(layouts):
        _, rows = run(str(tmp_path / str(number)), ranks, *arguments, *layout.split())
        for row, want in zip(rows, expected, strict=True):
            for key in want:
                if key in ALIKE or key.startswith("source"):
                    assert row[key] == pytest.approx(want[key], rel=1e-5), (layout, key)


class Bare:
    """A data set that does not say where its documents begin."""

    vocab_size, tokenizer_json = 8, None

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(S, np.int64), np.zeros(S, np.int64)


def bare(*_: Any) -> Bare:
    return Bare()


def build(folder: str, arguments: list[str]) -> str:
    """The message with which a run refuses to start."""
    registry.register("dataset", "bare", bare)
    registry.register("model", "maskless", MASKLESS)
    try:
        work(folder, arguments)
    except UserError as error:
        return str(error)
    return ""


def test_data_that_does_not_fit_is_refused(run: Runner, folder: Path) -> None:
    def refusal(*arguments: str) -> str:
        dump = str(folder / "refused")
        return run.ranks.run(1, build, str(folder), ["--job.dump_folder", dump, "--training.steps", "1", *arguments])[0]

    prepared = ["--training.dataset", str(folder / "web-prepared")]
    assert "model.vocab_size is 300" in refusal(*prepared, "--model.vocab_size", "300")
    (folder / "other").mkdir()
    (folder / "other" / "tokenizer.json").write_text(train_bpe(["another text"] * 9, 300).json)
    assert "another tokenizer" in refusal(*prepared, "--model.hf_assets_path", str(folder / "other"))
    assert "hf_assets_path" in refusal("--training.dataset", str(folder / "web"))
    stdlib = [{"dataset": "stdlib"}, {"dataset": str(folder / "web-prepared")}]
    cache = ["--job.cache_folder", str(folder / "cache"), "--model.vocab_size", "4096"]
    assert "different tokenizers" in refusal("--training.mixture", json.dumps(stdlib), *cache)
    stdlib_beside = refusal(*prepared, "--validation.enable", *cache)
    assert (
        "different tokenizers" in stdlib_beside
        and "around documents: validate on text" in stdlib_beside
        and "--validation.no_enable" in stdlib_beside
    )
    assert "validation.dataset = ..., as `dtron prepare --held-out 1%` makes" in stdlib_beside
    assert not (folder / "cache").exists()  # nothing was tokenized for it
    text_beside = ["--validation.enable", "--validation.dataset", str(folder / "web")]
    assert "validation.dataset = " in refusal("--training.dataset", "stdlib", *text_beside, *cache)
    assert "on_bad_document has no effect" in refusal(*prepared, "--training.on_bad_document", "skip")
    assert "no effect beside training.mixture" in refusal(*prepared, *mixture((folder / "web-prepared", 1)))
    assert "dataset_split has no effect" in refusal(*prepared, "--training.dataset_split", "train")
    masked = ["--training.attention_mask", "document"]
    assert "does not say where its documents begin" in refusal("--training.dataset", "bare", *masked)
    assert "takes no documents" in refusal(*prepared, *masked, "--model.name", "maskless")
    assert "mixture weights 1, 0" in refusal(*mixture((folder / "web-prepared", 1), (folder / "code-prepared", 0)))
    assert "code-prepared) is near" not in (near := refusal("--training.dataset", str(folder / "web-prepare")))
    assert "web-prepared is near" in near
    elsewhere = refusal(*prepared, "--training.dataset_path", str(folder / "nowhere"))
    assert elsewhere.startswith("training.dataset_path") and "nowhere" in elsewhere
    assert "shuffle_documents has no effect" in refusal(*prepared, "--training.shuffle_documents", "5")
    assert "is unknown" in refusal("--training.dataset", "")
    mistyped = refusal("--training.dataset", str(folder / "web"), "--model.hf_assets_path", str(folder / "tokeniser"))
    assert "model.hf_assets_path" in mistyped and "no local file or folder" in mistyped
    assert "did you mean 'stdlib'" in refusal("--training.dataset", "stdlb")


@pytest.mark.parametrize("kind", ["prepared", "on the fly"])
def test_changed_content_is_refused_on_resume(kind: str, run: Runner, folder: Path, tmp_path: Path) -> None:
    """The data lie where they lay, under the same name, and one word of them is another; put back, the run goes on."""
    text, prepared = tmp_path / "text", tmp_path / "prepared"
    encoder = read_tokenizer(str(folder / "tokenizer"), folder / "cache", "model.hf_assets_path")
    data = ["--training.dataset", str(text), "--model.hf_assets_path", str(folder / "tokenizer")]
    if kind == "prepared":
        data = ["--training.dataset", str(prepared)]
    parts = ["--job.dump_folder", str(tmp_path / "outputs"), *data, "--training.steps"]

    def write(first: str) -> None:
        for path in (text, prepared):
            shutil.rmtree(path, ignore_errors=True)
        write_texts(text, 0, 3)
        lines = (text / "0.jsonl").read_text().splitlines()
        (text / "0.jsonl").write_text("\n".join([json.dumps({"text": first}), *lines]))
        if kind == "prepared":
            prepare(open_source(SourceSpec(str(text)), tmp_path), encoder, prepared, processes=1, log=lambda _: None)

    write("abc def")
    run.ranks.run(1, work, str(folder), [*parts, "2"])
    write("abc deg")
    message = run.ranks.run(1, build, str(folder), [*parts, "3"])[0]
    assert "is not the one this run was trained on" in message
    write("abc def")
    assert run.ranks.run(1, build, str(folder), [*parts, "3"])[0] == ""
