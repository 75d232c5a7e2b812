"""Traces land where they are promised and hold the steps they are named after."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from dtron.config.sections import Profiling
from dtron.errors import UserError
from dtron.observe.profiler import profiler


def config(freq: int, warmup: int, active: int, enable: bool = True) -> Profiling:
    return Profiling(
        enable_profiling=enable,
        profile_freq=freq,
        profiler_warmup=warmup,
        profiler_active=active,
        save_traces_folder="t",
    )


def test_a_trace_of_the_last_steps_of_every_period(tmp_path: Path) -> None:
    with profiler(config(4, 1, 2), tmp_path, rank=3, steps_done=100) as trace:
        for step in range(101, 110):
            with record_function(f"optimizer step {step}"):
                torch.ones(4).sum()
            trace.step()
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.gz"))
    assert files == ["t/iteration_104/rank_3.json.gz", "t/iteration_108/rank_3.json.gz"]
    with gzip.open(tmp_path / files[0], "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"optimizer step {step}" for step in range(101, 110)} & names == {
        "optimizer step 103",
        "optimizer step 104",
    }


def test_off_does_nothing(tmp_path: Path) -> None:
    with profiler(config(1, 5, 5, enable=False), tmp_path, rank=0) as trace:
        trace.step()
    assert not list(tmp_path.iterdir())


def test_a_period_too_short_for_its_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile_freq = 4 .* 3 \+ 2.*profile_freq to 5 or more"):
        profiler(config(4, 3, 2), tmp_path, rank=0)
    profiler(config(5, 3, 2), tmp_path, rank=0)
