"""The hardware that `--hardware` names: of the table, of a file with figures, or as `dtron preflight` measured it."""

import dataclasses
import math

from dtron.observe.plan_hardware import Measured, read_plan_hardware
from dtron.plan.hardware import HARDWARE, Constants, Hardware
from dtron.plan.network import contended

__all__ = ["read_hardware"]

SQUARE_MATMUL = (
    0.80  # share of the peak that the best bf16 matmuls of H100 and H200 reach, which is what preflight runs
)
CPU_ATTENTION = 0.3  # share of the matmuls' rate; a guess


def read_hardware(text: str, cpu: bool = False) -> Hardware:
    """The figures of what `read_plan_hardware` reads, whose errors these are.

    Rates that were measured become those that the time model would need for the measured times.
    """
    named = read_plan_hardware(text, cpu)
    base = HARDWARE[named.gpu] if not cpu else None
    if named.measured is None:
        assert base is not None
        return dataclasses.replace(base, **named.figures)  # type: ignore[arg-type]
    taken = _network_rates(named.measured)
    if base is None:
        base = _cpu(named.measured)
    else:
        taken = _gpu_rates(named.measured) | taken
    peak = None if cpu else base.flops
    return dataclasses.replace(base, peak_flops=peak, measured=tuple(taken), **taken)  # type: ignore[arg-type]


def _cpu(m: Measured) -> Hardware:
    """A rank's share of a CPU, computing in fp32, whose elements take twice the bytes that the time model counts.

    Messages that preflight did not measure go through the memory.
    """
    assert m.flops is not None
    memory = m.memory_rate / 2
    return Hardware(
        "cpu", m.flops, math.inf, memory / Constants().memory, memory, memory,
        gpus_per_node=m.ranks, multiprocessors=1, matmul=1.0, attention=CPU_ATTENTION,
    )  # fmt: skip


def _gpu_rates(m: Measured) -> dict[str, float]:
    taken = {}
    if m.flops is not None:
        taken["flops"] = m.flops / SQUARE_MATMUL
    taken["memory_rate"] = m.memory_rate / Constants().memory
    if m.memory_bytes is not None:
        taken["memory_bytes"] = m.memory_bytes
    return taken


def _network_rates(m: Measured) -> dict[str, float]:
    c, taken = Constants(), dict[str, float]()
    if m.inside:
        taken["link_rate"] = m.inside.bytes_per_s / c.link
    if g := m.between:
        taken["network_rate"] = g.bytes_per_s * contended(g.nodes, c) / (g.ranks / g.nodes) / c.network
    return taken
