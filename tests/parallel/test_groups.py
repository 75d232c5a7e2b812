"""Process groups and start-up."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import Ranks

from dtron.checkpoint.save import Saver
from dtron.checkpoint.storage import StoragePath
from dtron.config.sections import Checkpoint
from dtron.mesh import Degrees, Mesh


def _coordinates(degrees: Degrees) -> tuple[int, int, tuple[int, ...], list[list[int]]]:
    """Groups this rank is in, its world rank, its coordinates, and the ranks of its tp, cp and fsdp groups."""
    mesh = Mesh(degrees, "cpu")
    groups = len(dist.distributed_c10d._world.pg_map)
    members = [dist.get_process_group_ranks(m.get_group()) for m in (mesh.tp, mesh.cp, mesh.pp) if m is not None]
    return groups, dist.get_rank(), (mesh.pp_rank, mesh.dp_rank, mesh.cp_rank, mesh.tp_rank), members


def test_a_rank_of_the_four_dimensional_layout_is_in_few_groups_and_they_are_the_right_ones(ranks: Ranks):
    degrees = Degrees(pp=2, dp_shard=2, cp=2, tp=2)
    answers = ranks.run(16, _coordinates, degrees)
    assert max(groups for groups, *_ in answers) == 6
    place = {rank: where for _, rank, where, _ in answers}
    assert len(set(place.values())) == 16
    for _, rank, where, members in answers:
        for dim, group in zip((3, 2, 0), members, strict=True):  # tp, cp, pp
            same = [r for r, other in place.items() if all(other[i] == where[i] for i in range(4) if i != dim)]
            assert sorted(group) == sorted(same), (rank, dim)


def _expert_groups(degrees: Degrees, experts: bool) -> tuple[int, int, tuple[int, ...], list[list[int]]]:
    """Groups this rank is in, its world rank, its coordinates, and the ranks of its ep and expert_fsdp groups."""
    mesh = Mesh(degrees, "cpu", experts)
    groups = len(dist.distributed_c10d._world.pg_map)
    place = mesh.pp_rank, mesh.dp_rank, mesh.cp_rank, mesh.tp_rank
    if mesh.ep is None or mesh.expert_fsdp is None:
        return groups, dist.get_rank(), place, []
    members = [mesh.ep.get_group(), mesh.expert_fsdp.get_group("expert_fsdp")]
    return groups, dist.get_rank(), place, [dist.get_process_group_ranks(group) for group in members]


def test_experts_cost_a_dense_model_no_group_and_others_at_most_four(ranks: Ranks):
    five = Degrees(pp=2, dp_replicate=2, dp_shard=1, cp=2, tp=2, ep=4)
    dense = ranks.run(16, _coordinates, replace(five, ep=1))
    without = ranks.run(16, _expert_groups, replace(five, ep=1), False)
    assert [groups for groups, *_ in without] == [groups for groups, *_ in dense]
    assert all(members == [] for *_, members in without)
    sharded = ranks.run(4, _expert_groups, Degrees(dp_shard=2, cp=2), True)  # as everything else is
    assert [g for g, *_ in sharded] == [g for g, *_ in ranks.run(4, _coordinates, Degrees(dp_shard=2, cp=2))]
    answers = ranks.run(16, _expert_groups, five, True)
    assert max(groups for groups, *_ in answers) <= max(groups for groups, *_ in dense) + 4
    place = {rank: where for _, rank, where, _ in answers}
    for _, rank, where, (ep, expert_fsdp) in answers:
        # All four ranks of cp and tp, of one stage and replica; nobody is left to share an expert's shards.
        assert ep == [r for r, other in place.items() if other[:2] == where[:2]] and expert_fsdp == [rank]


def test_ep_is_the_innermost_of_the_ranks_that_it_borrows(ranks: Ranks):
    for _, rank, _, (ep, expert_fsdp) in ranks.run(8, _expert_groups, Degrees(dp_shard=4, tp=2, ep=4), True):
        assert ep == list(range(rank // 4 * 4, rank // 4 * 4 + 4)) and expert_fsdp == [rank % 4, rank % 4 + 4]


def _groups_of_a_run_that_saves(folder: str) -> int:
    Mesh(Degrees(dp_shard=2), "cpu")
    Saver(StoragePath.at(folder), Checkpoint())
    return len(dist.distributed_c10d._world.pg_map)


def test_saving_needs_one_group_more(ranks: Ranks, tmp_path: Path):
    with_saver = ranks.run(2, _groups_of_a_run_that_saves, str(tmp_path))
    alone = [groups for groups, *_ in ranks.run(2, _coordinates, Degrees(dp_shard=2))]
    assert with_saver == [groups + 1 for groups in alone]


@pytest.mark.parametrize(
    ("flavor", "layout", "schedule", "held"),
    [
        pytest.param("405B", "16x1x32x1x8", "Interleaved1F1B", 405.8e9 / 4096, marks=pytest.mark.long),
        # All five dimensions: stage 0 is the embedding and two layers, sharded over 8 x 2 x 8 ranks.
        ("8B", "16x2x8x2x8", "1F1B", (128256 * 4096 + 2 * 218.1e6) / 128),
    ],
)
def test_one_of_4096_ranks_starts_in_seconds(flavor: str, layout: str, schedule: str, held: float):
    """From the meshes to the initial weights."""
    command = [sys.executable, str(Path(__file__).with_name("startup.py")), "17", flavor, layout, schedule]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["cpu_s"] < 20
    assert answer["groups"] <= 6
    assert 0.7 * held < answer["parameters"] < 1.3 * held
