"""Start as one rank of 4,096 without the others: a fake process group answers every collective at once.

python startup.py RANK FLAVOR DEGREES SCHEDULE -> a JSON line: CPU-seconds from the meshes to the initial weights,
parameters held, process groups. DEGREES: pp x dp_replicate x dp_shard x cp x tp, for example 16x1x32x1x8.
"""

import json
import sys
import time

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dtron import registry
from dtron.config import Config, replace
from dtron.mesh import Degrees, Mesh
from dtron.models.families import FAMILIES
from dtron.parallel.compose import parallelize


def main(rank: int, flavor: str, degrees: Degrees, schedule: str) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degrees.world)
    config = replace(Config(), "parallelism.pipeline_parallel_degree", degrees.pp)
    config = replace(config, "parallelism.tensor_parallel_degree", degrees.tp)
    config = replace(config, "parallelism.pipeline_parallel_schedule", schedule)
    config = replace(replace(config, "training.seq_len", 8192), "training.local_batch_size", 32)
    start = time.process_time()
    mesh = Mesh(degrees, "cpu")
    spec, model_config = registry.look_up("model", "llama3.1", ""), FAMILIES["llama3.1"][flavor]
    model = parallelize(spec, model_config, config, mesh, torch.device("cpu"), registry.cross_entropy, [])
    held = sum(p.to_local().numel() for _, p in model.named_parameters())
    groups = len(dist.distributed_c10d._world.pg_map)
    print(json.dumps({"cpu_s": time.process_time() - start, "parameters": held, "groups": groups}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Degrees(*map(int, sys.argv[3].split("x"))), sys.argv[4])
