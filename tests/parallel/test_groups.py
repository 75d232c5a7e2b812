"""Process groups and start-up."""

import json
import os
import subprocess
import sys
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
        ("405B", "16x1x32x1x8", "Interleaved1F1B", 405.8e9 / 4096),
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
