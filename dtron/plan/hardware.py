"""GPUs and the networks between them, as the time model reads them: a table, which `hardware_file.py` overrides."""

from dataclasses import dataclass

__all__ = ["HARDWARE", "Hardware"]

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
    peak_flops: float | None = None  # what MFU divides by; None: flops
    measured: tuple[str, ...] = ()  # fields that preflight measured


# NVIDIA's data sheets of the SXM modules; a network adapter for each GPU, 200 Gbit/s with A100s, 400 with later ones.
# Memory is what torch.cuda sees: less than the name says.
HARDWARE = {
    "a100-40gb": Hardware("a100-40gb", 312e12, 39.4 * 2**30, 1555 * GB, 300 * GB, 25 * GB, multiprocessors=108),
    "a100": Hardware("a100", 312e12, 79.2 * 2**30, 2039 * GB, 300 * GB, 25 * GB, multiprocessors=108),
    "h100": Hardware("h100", 989.5e12, 79.1 * 2**30, 3350 * GB, 450 * GB, 50 * GB),
    "h200": Hardware("h200", 989.5e12, 139.8 * 2**30, 4800 * GB, 450 * GB, 50 * GB),
    "b200": Hardware("b200", 2250e12, 178.3 * 2**30, 7700 * GB, 900 * GB, 50 * GB, multiprocessors=148),
}
