"""The console log: who logs what, where, with which prefix; and that no line can disturb a training."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dtron.ranks.logs import setup_logging

ROOT = Path(__file__).resolve().parents[2]
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
log = logging.getLogger("dtron.train.somewhere")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    setup_logging()


class Stream(io.StringIO):
    """A terminal, or none; broken: every write fails, as on a pipe without reader."""

    def __init__(self, terminal: bool = True, broken: type[Exception] | None = None) -> None:
        super().__init__()
        self.terminal, self.broken = terminal, broken

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        if self.broken:
            raise self.broken()
        return super().write(text)


def say(monkeypatch: pytest.MonkeyPatch, rank: int, level: str = "info", **stream: Any) -> tuple[str, str]:
    """What reaches stdout and stderr of a record of each level."""
    out, err = Stream(**stream), Stream(**stream)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    setup_logging(rank, level)
    log.info("step 7\nand more")
    log.warning("a full disk")
    log.error("the end")
    return out.getvalue(), err.getvalue()


def test_rank_0_logs_from_info_and_the_others_from_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert say(monkeypatch, 0) == ("step 7\nand more\nwarning: a full disk\n", "error: the end\n")
    assert say(monkeypatch, 3) == ("warning on rank 3: a full disk\n", "error on rank 3: the end\n")


def test_the_level_is_of_rank_0_and_never_below_warning_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert say(monkeypatch, 0, "warning") == ("warning: a full disk\n", "error: the end\n")
    assert say(monkeypatch, 0, "error") == ("", "error: the end\n")
    assert say(monkeypatch, 3, "info") == ("warning on rank 3: a full disk\n", "error on rank 3: the end\n")
    assert say(monkeypatch, 3, "error") == ("", "error on rank 3: the end\n")


def test_each_line_has_a_time_where_nobody_looks_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = say(monkeypatch, 0, terminal=False)
    lines = (out + err).splitlines()
    assert len(lines) == 4 and all(STAMP.match(line) for line in lines)
    assert [STAMP.sub("", line) for line in lines] == ["step 7", "and more", "warning: a full disk", "error: the end"]


def test_the_cause_is_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Stream()
    monkeypatch.setattr(sys, "stderr", err)
    setup_logging(0)
    try:
        raise ArithmeticError("on fire")
    except ArithmeticError as error:
        log.error("ArithmeticError: %s", error, exc_info=error)
    assert err.getvalue().startswith("Traceback") and err.getvalue().endswith(
        "error on rank 0: ArithmeticError: on fire\n"
    )


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError])
def test_a_line_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """A pipe without reader; a closed terminal (EIO); a stream that was closed."""
    assert say(monkeypatch, 0, broken=error) == ("", "")


def test_an_encoding_that_lacks_a_character_gets_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    setup_logging(0)
    log.info("mü = 3")
    assert STAMP.sub("", raw.getvalue().decode("ascii")) == "m\\xfc = 3\n"


def training(folder: Path, *more: str) -> list[str]:
    """A command that trains a tiny model for 3 steps."""
    command = [sys.executable, str(ROOT / "train.py"), "--job.config_file", str(ROOT / "configs/debug.toml")]
    command += ["--job.dump_folder", str(folder), "--job.cache_folder", str(folder / "cache")]
    command += ["--training.steps", "3", "--training.seq_len", "32", "--training.local_batch_size", "1"]
    return [*command, "--metrics.log_freq", "1", "--model.n_layers", "1", *more]


def few_threads() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_a_training_outlives_the_reader_of_its_log(tmp_path: Path) -> None:
    """As with `| head -1`: it trains on, saves and says DONE."""
    command = training(tmp_path, "--job.control_folder", str(tmp_path / "control"), "--checkpoint.enable")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=few_threads(), cwd=ROOT
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 0 and "Traceback" not in said and "rror" not in said, said
    assert json.loads((tmp_path / "control" / "DONE").read_text())["step"] == 3
    assert list(tmp_path.glob("*/checkpoint/step-3/dtron.json"))


def test_the_configured_level_is_that_of_the_training(tmp_path: Path) -> None:
    command = training(tmp_path, "--metrics.log_level", "warning")
    done = subprocess.run(command, capture_output=True, text=True, env=few_threads(), cwd=ROOT)
    assert done.returncode == 0 and "step" not in done.stdout, done.stdout + done.stderr
    (rows,) = tmp_path.glob("*/metrics.jsonl")
    assert len(rows.read_text().splitlines()) >= 3, "the metrics are written all the same"
