"""The same configuration and seed on 1 to 16 ranks, through torchrun: the same training, step by step."""

import sys
from pathlib import Path
from typing import Any

import pytest
import warm
from frontdoor import CONFIG, ROOT, Run, environment, torchrun

from dtron.config.keys import KEYS
from dtron.observe.metrics import read_metrics

VALIDATION = ("--validation.enable", "--validation.freq", "20")
LAYOUTS = {"tp2, two data workers": (2, "--tp 2 --training.dataloader.num_workers 2")}
# Every process costs seconds to start: tests/train/test_elastic_data.py holds the same columns on forked ranks.
LONG = {
    "hsdp2, accumulation": (2, "--dp-replicate 2 --training.local_batch_size 2"),
    "dp2 x pp2": (4, "--dp 2 --pp 2 --training.local_batch_size 4"),
    "dp2 x tp2 x cp2": (8, "--dp 2 --tp 2 --cp 2 --training.local_batch_size 4"),
    "pp2 x dp2 x tp2 x cp2, accumulation": (16, "--pp 2 --dp 2 --tp 2 --cp 2 --training.local_batch_size 2"),
}


def passed(run: Run) -> list[dict[str, Any]]:
    """The rows of a run that went well, of one step each."""
    assert run.code == 0, run.everything()
    assert "Traceback" not in "".join(run.err) and "Warning" not in "".join(run.err), run.everything()
    (path,) = run.folder.glob("outputs/*/metrics.jsonl")
    return read_metrics(path)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return passed(torchrun(tmp_path_factory.mktemp("single"), 1, *VALIDATION))


def test_one_rank_learns(single: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in single] == list(range(1, 21))
    assert single[-1]["loss"] < single[0]["loss"] - 0.3


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_layout_trains_like_one_rank(layout: str, single: list[dict[str, Any]], tmp_path: Path) -> None:
    ranks, arguments = (LAYOUTS | LONG)[layout]
    rows = passed(torchrun(tmp_path, ranks, *VALIDATION, *arguments.split(), warnings=layout in LAYOUTS))
    assert [row["step"] for row in rows] == [row["step"] for row in single]
    for row, expected in zip(rows, single, strict=True):
        for column in ("loss", "grad_norm"):
            assert row[column] == pytest.approx(expected[column], rel=1e-4), (row["step"], column)
        assert (row["lr"], row["tokens"]) == (expected["lr"], row["step"] * 8 * 32)  # not times cp, tp or pp
    assert rows[-1]["validation_loss"] == pytest.approx(single[-1]["validation_loss"], rel=1e-4)


def test_module_is_the_script(single: list[dict[str, Any]], tmp_path: Path) -> None:
    """`torchrun -m dtron.train` gives exactly what train.py gives."""
    rows = passed(torchrun(tmp_path, 1, *VALIDATION, program=("-m", "dtron.train")))
    exact = ("loss", "grad_norm", "lr", "tokens", "validation_loss")
    assert [[row.get(name) for name in exact] for row in rows] == [[row.get(name) for name in exact] for row in single]


def test_embedded_corpus(tmp_path: Path) -> None:
    """configs/debug.toml as it stands, on two ranks: real text, in the cache that `make train` uses."""
    base = f'base = "{ROOT / "configs/debug.toml"}"\n[job]\ncache_folder = "{ROOT / ".cache"}"\nprint_config = true\n'
    rows = passed(run := torchrun(tmp_path, 2, "--training.device", "cpu", config=base, cold=True))
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "job: debug" in run.out[0] and "\n[lr_scheduler]\nwarmup_steps = 2\n" in run.out[0]
    assert run.out[1] == ""


@pytest.mark.long
def test_rerun_resumes_on_another_layout(tmp_path: Path) -> None:
    """The same command on one rank goes on where two ranks ended, with their global batch.

    `test_global_batch_is_resolved_once_and_holds` sees it on forked ranks.
    """
    config = CONFIG.replace("global_batch_size = 8", "") + "[checkpoint]\nenable = true\n"
    passed(torchrun(tmp_path, 2, "--training.local_batch_size", "2", "--training.steps", "2", config=config))
    rows = passed(
        run := torchrun(tmp_path, 1, "--training.local_batch_size", "2", "--training.steps", "3", config=config)
    )
    assert "resuming from" in run.out[-1]
    assert [(row["step"], row["tokens"], row["attempt"]) for row in rows] == [(1, 128, 1), (2, 256, 1), (3, 384, 2)]


def test_without_torchrun(single: list[dict[str, Any]], tmp_path: Path) -> None:
    """One process needs no launcher."""
    (tmp_path / "x.toml").write_text(CONFIG)
    command = [sys.executable, str(ROOT / "train.py"), "--job.config_file", "x.toml", "--training.steps", "1"]
    done = warm.run(command, tmp_path, environment())
    assert (done.returncode, done.stderr) == (0, "")
    (path,) = tmp_path.glob("outputs/*/metrics.jsonl")
    assert read_metrics(path)[0]["loss"] == single[0]["loss"]


def test_help_lists_every_key(tmp_path: Path) -> None:
    printed = warm.run([sys.executable, str(ROOT / "train.py"), "--help"], tmp_path, environment()).stdout
    assert [name for name in KEYS if f"  {name.rpartition('.')[2]}: " not in printed] == []
    assert printed.startswith("Usage: train.py") and not list(tmp_path.iterdir())
