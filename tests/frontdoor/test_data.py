"""Data of a user's own through torchrun and train.py: resumed on other layouts, and damaged."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from frontdoor import CONFIG, torchrun

from dtron.data.prepare import prepare
from dtron.data.sources import SourceSpec, open_source
from dtron.data.tokenizer import train_bpe
from dtron.observe.metrics import read_metrics

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "far", "away"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files, its tokenizer, and the same prepared."""
    root, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    (root / "text").mkdir()
    for i in range(60):
        (root / "text" / f"{i:02d}.txt").write_text(" ".join(rng.choices(WORDS, k=rng.choice([5, 40, 300]))))
    encoder = train_bpe([path.read_text() for path in (root / "text").iterdir()], 290)
    (root / "tokenizer").mkdir()
    encoder.save(root / "tokenizer")
    prepare(open_source(SourceSpec(str(root / "text")), root), encoder, root / "prepared", log=lambda _: None)
    return root


def configured(**training: Any) -> str:
    keys = "".join(f"{key} = {value!r}\n".replace("'", '"') for key, value in training.items())
    kept = CONFIG.replace('dataset = "uneven"\nseq_len', "seq_len").replace("vocab_size = 64", "vocab_size = 320")
    return kept.replace("[training]\n", f"[training]\n{keys}", 1) + "[checkpoint]\nenable = true\n"


def losses(folder: Path) -> list[float]:
    (path,) = folder.glob("outputs/*/metrics.jsonl")
    return [row["loss"] for row in read_metrics(path)]


def test_text_on_the_way_goes_on_on_another_layout(data: Path, tmp_path: Path) -> None:
    config = configured(dataset=str(data / "text"), shuffle_documents=7)
    config = config.replace("[model]\n", f'[model]\nhf_assets_path = "{data / "tokenizer"}"\n')
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    schedule = ["--lr_scheduler.total_steps", "5"]
    assert torchrun(tmp_path / "whole", 1, "--training.steps", "5", *schedule, config=config).code == 0
    for ranks, steps, workers in ((2, 2, 3), (1, 5, 2)):
        arguments = ["--training.steps", str(steps), *schedule]
        arguments += ["--training.local_batch_size", "4", "--training.dataloader.num_workers", str(workers)]
        run = torchrun(tmp_path / "parts", ranks, *arguments, config=config)
        assert run.code == 0, run.everything()
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(whole) == 5 and whole[4] < whole[0]
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("damage", ["a flipped bit", pytest.param("truncated", marks=pytest.mark.long)])
def test_damaged_shard_ends_the_run_with_its_name(damage: str, data: Path, tmp_path: Path) -> None:
    prepared = shutil.copytree(data / "prepared", tmp_path / "prepared")
    (shard,) = prepared.glob("shard-*.tokens")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content if damage == "a flipped bit" else content[:-2])
    run = torchrun(tmp_path, 2, "--training.local_batch_size", "4", config=configured(dataset=str(prepared)))
    said = "".join(run.err)
    assert run.code != 0 and said.count("shard-00000") == 1 and "Traceback" not in said, run.everything()


def test_other_ranks_wait_for_a_validation_set_that_takes_long(data: Path, tmp_path: Path) -> None:
    """Longer than comm.init_timeout_seconds, which bounds everything else before the first step."""
    (tmp_path / "slow.py").write_text(SLOW)
    config = configured(dataset=str(data / "text")).replace('dataset = "uneven"', 'dataset = "slow"')
    config = config.replace("[model]\n", f'[model]\nhf_assets_path = "{data / "tokenizer"}"\n')
    config = config.replace('custom_import = ["frontdoor_parts"]', 'custom_import = ["slow"]')
    arguments = ["--training.local_batch_size", "4", "--training.steps", "1", "--validation.enable"]
    run = torchrun(tmp_path, 2, *arguments, "--comm.init_timeout_seconds", "4", config=config)
    assert run.code == 0, run.everything()


SLOW = """
import dataclasses, os, time
from dtron.data.build import build_by_path
from dtron.registry import register

def slow(config, section, split, seq_len, vocab_size, log):
    if os.environ["LOCAL_RANK"] == "0":
        time.sleep(7)
    return build_by_path(config, dataclasses.replace(section, dataset=config.training.dataset), split, seq_len, 0, log)

register("dataset", "slow", slow)
"""
