"""The hardware that a prediction is for, as `dtron plan --hardware` and metrics.plan_hardware name it.

Here a name or a file is read and checked, which a run does before it trains; the planner makes rates of it
(`dtron/plan/hardware_file.py`).
"""

import json
import re
import statistics
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dtron.config import Config
from dtron.errors import UserError
from dtron.observe.device import peak_flops_per_s

__all__ = ["FIGURES", "GPUS", "Gather", "Measured", "NamedHardware", "check_plan_hardware", "read_plan_hardware"]

SCHEMA = 1  # of preflight's file, see docs/preflight.md
# Those of the planner's table, with their dense bf16 peaks in FLOP/s; a100-40gb is before a100.
GPUS = {"a100-40gb": 312e12, "a100": 312e12, "h100": 989.5e12, "h200": 989.5e12, "b200": 2250e12}
FIGURES = (  # what a file may give in place of the table's
    "attention", "flops", "gpus_per_node", "link_rate", "matmul", "memory_bytes", "memory_rate", "multiprocessors",
    "network_rate", "peak_flops", "power",
)  # fmt: skip


@dataclass(frozen=True)
class Gather:
    """The largest all-gather that preflight measured in a dimension: its bus bandwidth, ranks and nodes."""

    bytes_per_s: float
    ranks: int
    nodes: int


@dataclass(frozen=True)
class Measured:
    """What preflight measured, per second: of the median rank; None: not measured.

    flops: of bf16 matmuls, on a CPU of fp32 ones. memory_bytes: the least of all ranks. inside, between: in the
    dimension of most ranks that stays in a node, and in that which does not.
    """

    ranks: int
    flops: float | None
    memory_rate: float
    memory_bytes: float | None
    inside: Gather | None
    between: Gather | None


@dataclass(frozen=True)
class NamedHardware:
    """gpu: one of `GPUS`, or cpu. figures: of `FIGURES`, in place of the table's. measured: by preflight."""

    gpu: str
    figures: dict[str, float] = field(default_factory=dict)
    measured: Measured | None = None


def check_plan_hardware(config: Config) -> None:
    """UserError where metrics.plan_hardware is nothing that the planner, asked at the end of a run, would accept."""
    if hardware := config.metrics.plan_hardware:
        read_plan_hardware(hardware, config.training.device == "cpu", "metrics.plan_hardware")


def read_plan_hardware(text: str, cpu: bool = False, option: str = "--hardware") -> NamedHardware:
    """A name in `GPUS` or as torch.cuda has it, or a JSON file: of `dtron preflight`, or with `name` and `FIGURES`.

    cpu: of a run on CPUs, for which there is only what preflight measured there. option: where `text` was given.
    UserError for an unknown name, an unreadable file, an unknown figure and one that is no positive number.
    """
    said = f"{option} {text}"
    if text.endswith(".json"):
        try:
            given = json.loads(Path(text).read_text())
        except FileNotFoundError:
            raise UserError(
                f"{option}: there is no file {text}; `dtron preflight` writes it on the machines of a run"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{said}: {error}") from None
        if isinstance(given, dict) and "schema" in given:
            return _of_preflight(given, said, cpu)
        if not cpu:
            return _of_figures(given, said)
    if cpu:
        raise UserError(
            f"{said}: the device is cpu; expected the file that `dtron preflight` wrote there, such as preflight.json"
        )
    if gpu := text.lower() if text.lower() in GPUS else _gpu_of(text):
        return NamedHardware(gpu)
    near = get_close_matches(text.lower(), GPUS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{said} is unknown; {hint}known: {', '.join(GPUS)}; or a JSON file, of dtron preflight or with a name of "
        "these and other figures"
    )


def _gpu_of(device: str) -> str | None:
    """The one of `GPUS` that has this name in torch.cuda."""
    words = set(re.split(r"[^a-z0-9]+", device.lower()))
    for name, peak in GPUS.items():
        if words.issuperset(name.split("-")) and peak_flops_per_s(device) == peak and "pcie" not in words:
            return name
    return None


def _of_figures(given: Any, said: str) -> NamedHardware:
    if not isinstance(given, dict) or not (set(given) <= {*FIGURES, "name"} and str(given.get("name")).lower() in GPUS):
        raise UserError(
            f"{said}: expected the file of dtron preflight, or an object with name, one of {', '.join(GPUS)}, and any "
            f"of {', '.join(FIGURES)}"
        )
    figures = {name: value for name, value in given.items() if name != "name"}
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{said}: {name} is {value!r}; expected a number above 0")
    return NamedHardware(given["name"].lower(), figures)


def _of_preflight(file: dict[str, Any], said: str, cpu: bool) -> NamedHardware:
    if file["schema"] != SCHEMA:
        raise UserError(f"{said}: its schema is {file['schema']!r}; expected {SCHEMA}, see docs/preflight.md")
    try:
        device, measured = file["ranks"][0]["device"], _measured(file, cpu)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{said}: not a whole file of dtron preflight ({type(error).__name__}: {error}); run it again"
        ) from None
    if cpu:
        if device != "cpu":
            raise UserError(f"{said}: it was measured on {device}, and the device of this run is cpu")
        return NamedHardware("cpu", measured=measured)
    if gpu := _gpu_of(device):
        return NamedHardware(gpu, measured=measured)
    raise UserError(
        f"{said}: it was measured on {device}, which is none of {', '.join(GPUS)}; for another GPU give a file with a "
        "name of these and the figures that differ"
    )


def _measured(file: dict[str, Any], cpu: bool) -> Measured:
    ranks, found = file["ranks"], dict[bool, Gather]()
    for dimension in file["dimensions"].values():
        hosts = [{ranks[rank]["host"] for rank in group} for group in dimension["groups"]]
        nodes, n = max(map(len, hosts)), dimension["degree"]
        inside = nodes == 1
        if n > (found[inside].ranks if inside in found else 1):
            found[inside] = Gather(dimension["all_gather"]["sizes"][-1]["bus_bytes_per_s"], n, nodes)
    flops = statistics.median(rank["matmul_flops_per_s"] for rank in ranks)
    memory_rate = statistics.median(rank["memory_bytes_per_s"] for rank in ranks)
    sizes = [rank.get("memory_total_bytes") for rank in ranks]
    return Measured(
        len(ranks), flops if cpu or ranks[0]["matmul_dtype"] == "bfloat16" else None, memory_rate,
        None if None in sizes else float(min(sizes)), found.get(True), found.get(False),
    )  # fmt: skip
