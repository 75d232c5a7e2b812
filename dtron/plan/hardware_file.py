"""The hardware that `--hardware` names: of the table, of a file with figures, or as `dtron preflight` measured it."""

import dataclasses
import json
import math
import re
import statistics
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.observe.device import peak_flops_per_s
from dtron.plan.hardware import HARDWARE, Constants, Hardware
from dtron.plan.network import contended

__all__ = ["read_hardware"]

SCHEMA = 1  # of preflight's file, see docs/preflight.md
SQUARE_MATMUL = (
    0.80  # share of the peak that the best bf16 matmuls of H100 and H200 reach, which is what preflight runs
)
CPU_ATTENTION = 0.3  # share of the matmuls' rate; a guess
GIVEN = tuple(field.name for field in dataclasses.fields(Hardware) if field.name != "measured")


def read_hardware(text: str, cpu: bool = False) -> Hardware:
    """A name in `HARDWARE` or as torch.cuda has it, or a JSON file: of `dtron preflight`, or with `name` and other
    figures of `Hardware`.

    cpu: of a run on CPUs, for which there is only what preflight measured there. UserError for an unknown name, an
    unreadable file, an unknown field and a figure that is no positive number.
    """
    if text.endswith(".json"):
        try:
            given = json.loads(Path(text).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--hardware {text}: {error}") from None
        if isinstance(given, dict) and "schema" in given:
            return _of_preflight(given, text, cpu)
        if not cpu:
            return _of_figures(given, text)
    if cpu:
        raise UserError(f"--hardware {text}: this run was on CPUs; expected the file of dtron preflight on them")
    if text.lower() in HARDWARE:
        return HARDWARE[text.lower()]
    if known := _named(text):
        return known
    near = get_close_matches(text.lower(), HARDWARE, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"--hardware {text} is unknown; {hint}known: {', '.join(HARDWARE)}; or a JSON file, of dtron preflight or with "
        "a name of these and other figures"
    )


def _of_figures(given: Any, file: str) -> Hardware:
    if not isinstance(given, dict) or not (set(given) <= set(GIVEN) and str(given.get("name")).lower() in HARDWARE):
        raise UserError(
            f"--hardware {file}: expected the file of dtron preflight, or an object with name, one of "
            f"{', '.join(HARDWARE)}, and any of {', '.join(sorted(set(GIVEN) - {'name'}))}"
        )
    base = HARDWARE[given["name"].lower()]
    figures = {name: value for name, value in given.items() if name != "name"}
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"--hardware {file}: {name} is {value!r}; expected a number above 0")
    return dataclasses.replace(base, **figures)


def _of_preflight(figures: dict[str, Any], file: str, cpu: bool) -> Hardware:
    """The table's figures of the GPU, but for those that were measured: for these the time model gets the rate that
    it would need for the measured times.
    """
    if figures["schema"] != SCHEMA:
        raise UserError(
            f"--hardware {file}: its schema is {figures['schema']!r}; expected {SCHEMA}, see docs/preflight.md"
        )
    try:
        device, ranks = figures["ranks"][0]["device"], figures["ranks"]
        base = _of_cpu(device, ranks, file) if cpu else _of_device(device, file)
        taken = {} if cpu else _gpu_rates(ranks, base)
        found = _network_rates(figures["dimensions"], [rank["host"] for rank in ranks])
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"--hardware {file}: not a whole file of dtron preflight ({type(error).__name__}: {error}); run it again"
        ) from None
    taken |= found
    return dataclasses.replace(base, peak_flops=None if cpu else base.flops, measured=tuple(taken), **taken)  # type: ignore[arg-type]


def _named(device: str) -> Hardware | None:
    """The table's GPU of a name as torch.cuda gives it."""
    words = set(re.split(r"[^a-z0-9]+", device.lower()))
    for name, hw in HARDWARE.items():  # a100-40gb is before a100
        if words.issuperset(name.split("-")) and peak_flops_per_s(device) == hw.flops and "pcie" not in words:
            return hw
    return None


def _of_cpu(device: str, ranks: list[dict[str, Any]], file: str) -> Hardware:
    """A rank's share of a CPU, computing in fp32, whose elements take twice the bytes that the time model counts.

    Messages that preflight did not measure go through the memory.
    """
    if device != "cpu":
        raise UserError(f"--hardware {file}: it was measured on {device}, and this run was on CPUs")
    memory = statistics.median(rank["memory_bytes_per_s"] for rank in ranks) / 2
    flops = statistics.median(rank["matmul_flops_per_s"] for rank in ranks)
    return Hardware(
        "cpu", flops, math.inf, memory / Constants().memory, memory, memory,
        gpus_per_node=len(ranks), multiprocessors=1, matmul=1.0, attention=CPU_ATTENTION,
    )  # fmt: skip


def _of_device(device: str, file: str) -> Hardware:
    if known := _named(device):
        return known
    raise UserError(
        f"--hardware {file}: it was measured on {device}, which is none of {', '.join(HARDWARE)}; for another GPU give "
        "a file with a name of these and the figures that differ"
    )


def _gpu_rates(ranks: list[dict[str, Any]], base: Hardware) -> dict[str, float]:
    """The median of the ranks'; matmuls only of bfloat16."""
    c = Constants()
    taken = {}
    if ranks[0]["matmul_dtype"] == "bfloat16":
        taken["flops"] = statistics.median(rank["matmul_flops_per_s"] for rank in ranks) / SQUARE_MATMUL
    taken["memory_rate"] = statistics.median(rank["memory_bytes_per_s"] for rank in ranks) / c.memory
    if all("memory_total_bytes" in rank for rank in ranks):
        taken["memory_bytes"] = float(min(rank["memory_total_bytes"] for rank in ranks))
    return taken


def _network_rates(dimensions: dict[str, Any], hosts: list[str]) -> dict[str, float]:
    """Of the largest gather in the dimension of most ranks that stays in a node, and of that which does not."""
    c = Constants()
    most = {"link_rate": 1, "network_rate": 1}
    taken: dict[str, float] = {}
    for dimension in dimensions.values():
        n = dimension["degree"]
        nodes = max(len({hosts[rank] for rank in group}) for group in dimension["groups"])
        name = "link_rate" if nodes == 1 else "network_rate"
        if n > most[name]:
            most[name] = n
            rate = dimension["all_gather"]["sizes"][-1]["bus_bytes_per_s"]
            taken[name] = rate / c.link if nodes == 1 else rate * contended(nodes, c) / (n / nodes) / c.network
    return taken
