"""What `dtron explain` says of messages is what gloo does on real ranks: how many in each dimension, and their bytes.

The other side shares nothing with the recorder: gloo's own count of operations of each process group, and the events
that its backend gives torch's profiler, with the shapes and dtypes of what it was handed.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plan.real_step import balanced_experts, step_and_batch
from ranks import Ranks

from dtron.config import load
from dtron.explain.facts import explain, setup_of
from dtron.train.step import Step

MODEL = (
    "--model.n_layers 3 --model.dim 32 --model.n_heads 4 --model.n_kv_heads 2 --model.ffn_dim 48 "
    "--model.vocab_size 96 --training.seq_len 32 --training.local_batch_size 2 --training.device cpu "
    "--training.loss_chunk_tokens 24"
)
PP2 = "--pp 2 --training.local_batch_size 4"
OP = "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op"
# name -> ranks, arguments
LAYOUTS = {
    "dp2 tp2 pp2": (8, f"{PP2} --tp 2 --activation_checkpoint.mode full"),
    "fsdp2 accumulation": (2, "--training.global_batch_size 20"),
    "hsdp2x2": (4, f"--parallelism.data_parallel_replicate_degree 2 {OP}"),
    "tp2": (2, "--tp 2"),
    "cp2": (2, "--cp 2"),
    "dp2 pp2 passes tied": (
        4,
        "--pp 2 --training.local_batch_size 10 --training.global_batch_size 40 --model.tie_embeddings true",
    ),
    "ep2": (2, "--model.name qwen3_moe --training.expert_balance_loss 0 --ep 2"),
}
BYTES = {"float": 4, "double": 8, "long int": 8, "c10::BFloat16": 2}
GLOO = {"reduce_scatter": "all_reduce", "receive": "recv"}  # ours -> gloo's: it all-reduces, and keeps a part


def setup(arguments: str, world: int) -> Any:
    return setup_of(load(f"{MODEL} {arguments}".split()), world, [])


def real_step(arguments: str, file: str) -> tuple[dict[tuple[str, ...], int], dict[str, list[int]]]:
    """One step on this rank: operations of each group, by its dimensions; and count and bytes of each operation."""
    step, batch = step_and_batch(setup(arguments, dist.get_world_size()))
    groups = groups_of(step)
    before = {name: group._get_sequence_number_for_group() for name, (group, _) in groups.items()}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with balanced_experts(), torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step(batch)
    counts = {tuple(names): group._get_sequence_number_for_group() - before[n] for n, (group, names) in groups.items()}
    path = f"{file}-{dist.get_rank()}"
    profile.export_chrome_trace(path)
    return counts, handed_to_gloo(json.loads(Path(path).read_text())["traceEvents"])


def groups_of(step: Step) -> dict[str, tuple[dist.ProcessGroup, list[str]]]:
    """Name of each group -> it and its dimensions, of which several can be all ranks."""
    found: dict[str, tuple[dist.ProcessGroup, list[str]]] = {}
    mesh = step.mesh
    for part in (mesh.pp, mesh.tp, mesh.cp, mesh.fsdp, mesh.ep, mesh.expert_fsdp):
        for i, dimension in enumerate((part.mesh_dim_names or ()) if part is not None else ()):
            group = part.get_group(i)
            found.setdefault(group.group_name, (group, []))[1].append(dimension)
    whole = dist.distributed_c10d._get_default_group()
    found.setdefault(whole.group_name, (whole, []))[1].append("world")
    return found


def handed_to_gloo(events: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Operation of gloo -> count, and bytes of the tensors that this rank gave it, or took from it by a receive."""
    found: dict[str, list[int]] = {}
    for event in events:
        _, gloo, operation = event["name"].rpartition("gloo:")
        if gloo:
            shape, dtype = event["args"]["Input Dims"][0], event["args"]["Input type"][0]
            total = found.setdefault(operation, [0, 0])
            total[0] += 1
            total[1] += torch.Size(shape).numel() * BYTES[dtype]
    return found


LONG = {"dp2 pp2 passes tied"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in LONG else []) for n in LAYOUTS])
def test_messages_are_those_of_real_ranks(ranks: Ranks, tmp_path: Path, name: str) -> None:
    world, arguments = LAYOUTS[name]
    real = ranks.run(world, real_step, arguments, str(tmp_path / "trace"))
    for rank in sorted({0, world - 1}):
        facts = explain(setup(arguments, world), rank, 8)
        by_group, by_operation = real[rank]
        said: Counter[str] = Counter()
        handed: dict[str, list[int]] = {}
        for c in facts["collectives"]:
            said[c["dimension"]] += c["count"]
            total = handed.setdefault(GLOO.get(c["operation"], c["operation"]), [0, 0])
            total[0] += c["count"]
            total[1] += c["bytes"] // (c["ranks"] if c["operation"] == "all_gather" else 1)
        assert {names: sum(said[n] for n in names) for names in by_group} == by_group, rank
        assert handed == by_operation, rank
