"""GPUs and the networks between them, as the time model reads them: a table, overridden by what preflight measured."""

import dataclasses
import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dtron.errors import UserError

__all__ = ["HARDWARE", "Hardware", "read_hardware"]

GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """One GPU in a node. Rates are peaks per second and GPU; links and network in one direction."""

    name: str
    flops: float  # dense bf16
    memory_bytes: float
    memory_rate: float
    link_rate: float  # to the other GPUs of the node
    network_rate: float  # to other nodes
    gpus_per_node: int = 8
    multiprocessors: int = 132


# NVIDIA's data sheets of the SXM modules; a network adapter for each GPU, 200 Gbit/s with A100s, 400 with later ones.
# Memory is what torch.cuda sees: less than the name says.
HARDWARE = {
    "a100-40gb": Hardware("a100-40gb", 312e12, 39.4 * 2**30, 1555 * GB, 300 * GB, 25 * GB, multiprocessors=108),
    "a100": Hardware("a100", 312e12, 79.2 * 2**30, 2039 * GB, 300 * GB, 25 * GB, multiprocessors=108),
    "h100": Hardware("h100", 989.5e12, 79.1 * 2**30, 3350 * GB, 450 * GB, 50 * GB),
    "h200": Hardware("h200", 989.5e12, 139.8 * 2**30, 4800 * GB, 450 * GB, 50 * GB),
    "b200": Hardware("b200", 2250e12, 178.3 * 2**30, 7700 * GB, 900 * GB, 50 * GB, multiprocessors=148),
}


def read_hardware(text: str) -> Hardware:
    """A name in `HARDWARE`, or a JSON file with `name` and any of the other fields, which replace the table's.

    UserError for an unknown name, an unreadable file and an unknown field.
    """
    if text.endswith(".json"):
        try:
            given = json.loads(Path(text).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--hardware {text}: {error}") from None
        fields = {field.name for field in dataclasses.fields(Hardware)}
        if not isinstance(given, dict) or not (set(given) <= fields and "name" in given):
            raise UserError(
                f"--hardware {text}: expected an object with name, one of {', '.join(HARDWARE)}, and any of "
                f"{', '.join(sorted(fields - {'name'}))}"
            )
        return dataclasses.replace(read_hardware(given.pop("name")), **given)
    if text.lower() in HARDWARE:
        return HARDWARE[text.lower()]
    near = get_close_matches(text.lower(), HARDWARE, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"--hardware {text} is unknown; {hint}known: {', '.join(HARDWARE)}; or a JSON file with a name of these and "
        "other figures"
    )
