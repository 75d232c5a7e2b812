"""What the initial weights of one rank cost: seconds, and the elements it makes for those it holds.

    python scripts/bench/init.py --bench.ranks N [--bench.rank R] --job.config_file FILE.toml [--section.key value ...]

Builds the part of the model that rank R of N would hold, on this machine's CPU and alone: the other ranks exist in
name only (torch's fake process group), so the layout may be of any size as long as the rank's own share fits here.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the process group named "fake"
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's dtron

from dtron.config import load  # noqa: E402
from dtron.mesh import Mesh  # noqa: E402
from dtron.models import init  # noqa: E402
from dtron.models.spec import experts_of  # noqa: E402
from dtron.parallel import materialize  # noqa: E402
from dtron.parallel.compose import parallelize  # noqa: E402
from dtron.registry import cross_entropy  # noqa: E402
from dtron.train.resolve import resolve  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--bench.ranks", dest="ranks", type=int, required=True, metavar="N")
    parser.add_argument("--bench.rank", dest="rank", type=int, default=0, metavar="R")
    options, rest = parser.parse_known_args()
    setup = resolve(load([*rest, "--training.device", "cpu"]), options.ranks)
    dist.init_process_group("fake", store=dist.HashStore(), rank=options.rank, world_size=options.ranks)
    made = 0

    def counted(name: str, shape: torch.Size, first: int, last: int, *rest: object) -> torch.Tensor:
        nonlocal made
        per_row = shape[1:].numel()
        per_block = max(1, init.BLOCK_ELEMENTS // per_row)
        made += (min(shape[0], -(-last // per_block) * per_block) - first // per_block * per_block) * per_row
        return init.initial_rows(name, shape, first, last, *rest)  # type: ignore[arg-type]

    materialize.initial_rows = counted  # this process measures and ends
    began = time.process_time()
    mesh = Mesh(setup.degrees, "cpu", experts_of(setup.model_config) is not None)
    model = parallelize(setup.spec, setup.model_config, setup.config, mesh, torch.device("cpu"), cross_entropy, [])
    seconds = time.process_time() - began
    held = sum(p.to_local().numel() for _, p in model.named_parameters() if isinstance(p, DTensor))
    result = {
        "layout": str(setup.degrees),
        "rank": options.rank,
        "held": held,
        "made": made,
        "cpu_s": round(seconds, 1),
    }
    print(json.dumps(result | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()
