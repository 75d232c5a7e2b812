"""A bad document in what is tokenized on the fly: the run saves and ends, goes on when it is mended, or skips it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from tinyrun import train_tiny

from dtron.checkpoint.files import Progress
from dtron.data.prepare import prepare
from dtron.data.sources import SourceSpec, open_source
from dtron.data.tokenizer import train_bpe
from dtron.errors import UserError
from dtron.observe.metrics import read_metrics
from dtron.train.data import _check_same_as_before

TEXTS = [" ".join(random.Random(i).choices(["def", "return", "import", "class"], k=20)) for i in range(120)]
BAD = 60  # of the documents, counted from 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a tokenizer, and a source whose line 61 has no text."""
    (tmp_path / "tokenizer").mkdir()
    train_bpe(TEXTS, 290).save(tmp_path / "tokenizer")
    write(tmp_path, None)
    return tmp_path


def write(folder: Path, text: str | None) -> None:
    rows = [{"text": text if i == BAD else TEXTS[i]} for i in range(len(TEXTS))]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: str, run: str, arguments: str) -> tuple[str, list[str]]:
    """What ended the run, empty: nothing; and what rank 0 was told."""
    data = f"--training.dataset {folder}/data.jsonl --model.hf_assets_path {folder}/tokenizer"
    same = "--model.vocab_size 320 --metrics.log_freq 1 --training.shuffle_documents 8"
    same += " --lr_scheduler.warmup_steps 1 --lr_scheduler.total_steps 40"
    try:
        trainer, said = train_tiny(f"{folder}/{run}", 40, f"{data} {same} {arguments}")
    except UserError as error:
        return str(error), []
    return "", said


def losses(folder: Path, run: str) -> dict[int, float]:
    (path,) = (folder / run).glob("*/metrics.jsonl")
    return {row["step"]: row["loss"] for row in read_metrics(path) if "loss" in row}


def test_a_bad_document_costs_no_step_and_may_be_mended(ranks: Ranks, folder: Path) -> None:
    """Saved before it ends, on all ranks; mended it goes on in the order of a source that was never bad."""
    errors = ranks.run(2, train, str(folder), "run", "--checkpoint.interval 1000")
    for error, _ in errors:
        assert f"{folder}/data.jsonl, line {BAD + 1} holds null" in error and "on_bad_document" in error
        assert "is saved, and when that is put right the same command resumes from there" in error
    before = losses(folder, "run")
    assert list((folder / "run").glob(f"*/checkpoint/step-{len(before)}")) and 3 < len(before) < 40
    write(folder, TEXTS[BAD])
    [(error, _), _] = ranks.run(2, train, str(folder), "run", "")
    assert "is not the one this run was trained on" in error and "checkpoint.allow_changed_data = true" in error
    [(error, said), _] = ranks.run(2, train, str(folder), "run", "--checkpoint.allow_changed_data")
    assert error == "" and any("changed since the checkpoint" in line and "same file and byte" in line for line in said)
    assert [ranks.run(2, train, str(folder), "whole", "")[0][0]] == [""]
    whole, resumed = losses(folder, "whole"), losses(folder, "run")
    assert resumed == pytest.approx(whole, rel=1e-6) and len(whole) == 40
    assert {step: resumed[step] for step in before} == pytest.approx(before, rel=1e-6)


def test_bad_documents_are_skipped_named_once_and_counted(ranks: Ranks, folder: Path) -> None:
    """A run that ended for one resumes with the key set; what is trained on is as if the document were not there."""
    [(error, _), _] = ranks.run(2, train, str(folder), "run", "")
    assert f"line {BAD + 1} holds" in error
    [(error, said), (_, other)] = ranks.run(2, train, str(folder), "run", "--training.on_bad_document skip")
    assert error == ""
    skipped = [line for line in said + other if "skipped: " in line]
    assert skipped == [
        f"warning: skipped: {folder}/data.jsonl, line {BAD + 1} holds null, not a string: give it a "
        "text, or leave it out"
    ]
    rows = read_metrics(next((folder / "run").glob("*/metrics.jsonl")))
    assert rows[-1]["skipped_documents"] == 1 and "skipped_documents" not in rows[1]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for i, t in enumerate(TEXTS) if i != BAD))
    ranks.run(2, train, str(folder), "without", "")
    assert losses(folder, "run") == pytest.approx(losses(folder, "without"), rel=1e-6)


def test_an_epoch_is_told_and_counted(ranks: Ranks, folder: Path) -> None:
    """Of streamed data whole epochs, of prepared data and each source of a mixture with the fraction."""
    write(folder, "short")
    encoder = train_bpe(TEXTS, 290)
    store = prepare(open_source(SourceSpec(f"{folder}/data.jsonl"), folder), encoder, folder / "p", log=lambda _: None)
    sequences = (store.n_tokens - 1) // 16
    mixture = json.dumps([{"dataset": f"{folder}/p", "weight": 3}, {"dataset": f"{folder}/data.jsonl"}]).replace(
        " ", ""
    )
    per_step = -(-sequences // 16)
    [(rows, said), (mixed, _)] = ranks.run(1, epochs, str(folder), mixture, per_step)[0]
    assert rows[-1]["epochs"] == pytest.approx(40 * per_step / sequences)
    told = [line for line in said if "all of it was trained on already" in line]
    assert [line.split(" of ")[0] for line in told][:2] == [
        f"step {1 + sequences // per_step}: epoch 2", f"step {1 + 2 * sequences // per_step}: epoch 3"
    ]  # fmt: skip
    assert mixed[-1]["source_epochs/p"] == pytest.approx(0.75 * 40 * per_step / sequences, rel=0.02)
    assert mixed[0]["source_epochs/data.jsonl"] == 0 and "epochs" not in mixed[-1]


def epochs(folder: str, mixture: str, per_step: int) -> list[tuple[list[dict[str, Any]], list[str]]]:
    same = f"--model.vocab_size 320 --metrics.log_freq 1 --training.local_batch_size {per_step}"
    both = (
        f"--training.dataset {folder}/p",
        f"--training.dataset stdlib --training.mixture {mixture} --model.hf_assets_path {folder}/p",
    )
    found = []
    for i, data in enumerate(both):
        _, said = train_tiny(f"{folder}/e{i}", 40, f"{same} {data}")
        (path,) = Path(folder, f"e{i}").glob("*/metrics.jsonl")
        found.append(([row for row in read_metrics(path) if "loss" in row], said))
    return found


def test_changed_data_with_another_tokenizer_is_refused_even_then() -> None:
    progress = Progress(data_fingerprint="a", tokenizer_fingerprint="t")
    with pytest.raises(UserError, match="another tokenizer .u. than the one this run was trained with"):
        _check_same_as_before("b", "u", "data", progress, may_change=True)
    _check_same_as_before("b", "t", "data", progress, may_change=True)
    assert (progress.data_fingerprint, progress.tokenizer_fingerprint) == ("b", "t")
