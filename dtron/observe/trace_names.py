"""Names that a person reads, in a Chrome trace of torch.profiler: operation and dimension of each collective.

The profiler notes both among the arguments of NCCL's kernels, the dimension as the description of the process group.
Here they go to the end of the name, as in `ncclDevKernel_AllGather_RING_LL(...) (all_gather, tp)`: tools that know
NCCL's kernels go by how their names begin.
"""

import gzip
import json
import os
from pathlib import Path

__all__ = ["dimension_of", "name_collectives"]

OP, DESCRIPTION = "Collective name", "Process Group Description"


def dimension_of(description: str) -> str:
    """`mesh_tp` -> tp, `default_pg` -> world."""
    return "world" if description == "default_pg" else description.removeprefix("mesh_")


def name_collectives(file: Path) -> None:
    """Rename the collectives of a trace in place; one without any, as of gloo, stays as it is."""
    with gzip.open(file, "rb") as compressed:
        text = compressed.read()
    if DESCRIPTION.encode() not in text:
        return
    trace = json.loads(text)
    for event in trace["traceEvents"]:
        arguments = event.get("args", {})
        if description := arguments.get(DESCRIPTION):
            words = [str(arguments[OP])] if OP in arguments else []
            event["name"] += f" ({', '.join([*words, dimension_of(description)])})"
    partial = file.with_name(f"{file.name}.partial")
    with gzip.open(partial, "wt", compresslevel=3) as compressed_text:
        json.dump(trace, compressed_text)
    os.replace(partial, file)
