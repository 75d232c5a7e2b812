"""Traces land where they are promised and hold the steps they are named after."""

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from tinyrun import train_tiny
from torch.profiler import ProfilerActivity, profile, record_function

from dtron.compat.tracing import span
from dtron.config.sections import Profiling
from dtron.errors import UserError
from dtron.mesh import Degrees, Mesh
from dtron.observe.profiler import profiler
from dtron.observe.trace_names import dimension_of, name_collectives


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


def test_collectives_are_named_by_operation_and_dimension(tmp_path: Path) -> None:
    kernel = {"Collective name": "_allgather_base", "Process Group Description": "mesh_tp", "Group size": 2}
    events: list[dict[str, Any]] = [
        {"name": "ncclDevKernel_AllGather_RING_LL(ncclDevComm*)", "args": kernel, "ts": 1.5},
        {"name": "record_param_comms", "args": kernel | {"Process Group Description": "default_pg"}},
        {"name": "aten::mm", "args": {}},
        {"name": "process_name"},
    ]
    file = tmp_path / "rank_0.json.gz"
    with gzip.open(file, "wt") as text:
        json.dump({"traceEvents": events, "schemaVersion": 1}, text)
    name_collectives(file)
    with gzip.open(file, "rt") as text:
        trace = json.load(text)
    assert [event["name"] for event in trace["traceEvents"]] == [
        "ncclDevKernel_AllGather_RING_LL(ncclDevComm*) (_allgather_base, tp)",
        "record_param_comms (_allgather_base, world)",
        "aten::mm",
        "process_name",
    ]
    assert (
        trace["schemaVersion"] == 1 and trace["traceEvents"][0]["args"] == kernel and len(list(tmp_path.iterdir())) == 1
    )


def groups_of_a_mesh() -> dict[str, str]:
    mesh = Mesh(Degrees(pp=2, dp_shard=1, cp=2, tp=1), "cpu")
    assert mesh.cp is not None
    return {name: dimension_of(getattr(mesh, name).get_group().group_desc) for name in ("pp", "tp", "fsdp", "cp")}


def trace_of_a_pipeline(folder: str, arguments: str) -> list[dict[str, Any]]:
    profiling = "--profiling.enable_profiling --profiling.profile_freq 2 --profiling.profiler_warmup 0"
    trainer, _ = train_tiny(folder, 2, f"{profiling} {arguments}")
    with gzip.open(trainer.run_folder / f"profile_traces/iteration_2/rank_{trainer.world.rank}.json.gz", "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]


def test_groups_are_described_by_their_dimension(ranks: Ranks) -> None:
    for found in ranks.run(4, groups_of_a_mesh):
        assert found == {"pp": "pp", "tp": "tp", "fsdp": "dp_shard_cp", "cp": "cp"}


SPLIT = "--parallelism.pipeline_parallel_schedule InterleavedZeroBubble --model.n_layers 4"


@pytest.mark.parametrize("arguments", ["--model.n_layers 2", pytest.param(SPLIT, id="zero bubble")])
def test_a_trace_names_phases_and_the_actions_of_a_pipeline(ranks: Ranks, tmp_path: Path, arguments: str) -> None:
    given = f"--pp 2 --training.local_batch_size 2 --training.global_batch_size 4 {arguments}"
    for rank, events in enumerate(ranks.run(2, trace_of_a_pipeline, str(tmp_path), given)):
        names = [event["name"] for event in events]
        assert {"count labels", "forward-backward", "reduce loss and norm", "optimizer"} <= set(names)
        backward = "backward of inputs of" if arguments == SPLIT else "backward of"
        for stage in (rank, rank + 2) if arguments == SPLIT else (rank,):
            for action in ("forward of", backward, *(["backward of weights of"] if arguments == SPLIT else [])):
                for microbatch in (0, 1):  # of each of the two passes
                    assert names.count(f"{action} microbatch {microbatch}, stage {stage}") == 2


def test_a_name_costs_nothing_while_nothing_is_recorded() -> None:
    assert isinstance(span("forward"), contextlib.nullcontext)
    with profile(activities=[ProfilerActivity.CPU]):
        assert isinstance(span("forward"), record_function)


def test_off_does_nothing(tmp_path: Path) -> None:
    with profiler(config(1, 5, 5, enable=False), tmp_path, rank=0) as trace:
        trace.step()
    assert not list(tmp_path.iterdir())


def test_a_period_too_short_for_its_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile_freq = 4 .* 3 \+ 2.*profile_freq to 5 or more"):
        profiler(config(4, 3, 2), tmp_path, rank=0)
    profiler(config(5, 3, 2), tmp_path, rank=0)
