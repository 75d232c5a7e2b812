"""GPUs and the networks between them, as the time model reads them: a table, which `hardware_file.py` overrides."""

from dataclasses import dataclass

__all__ = ["HARDWARE", "Constants", "Hardware"]

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
    matmul: float = 0.72  # share of `flops` that large bf16 matmuls of a long run reach, whose power limits the clock
    attention: float = 0.56  # the same of attention's forward, the masked half not counted
    power: float = 1.0  # what the cards may draw, as a share of the data sheet's
    peak_flops: float | None = None  # what MFU divides by; None: flops
    measured: tuple[str, ...] = ()  # fields that preflight measured


@dataclass(frozen=True)
class Constants:
    """Of all GPUs, as shares of peak rates unless a unit is said. `scripts/bench/plan_error.py --fit` fitted them to
    published steps, but for launch_s.
    """

    memory: float = 0.745
    link: float = 0.66
    network: float = 0.65
    launch_s: float = 6e-6  # of one kernel by the host, in eager mode
    contention: float = 0.07  # of the network's rate, for each doubling of the nodes beyond two
    overlap_tax: float = 0.05  # of a block's time, while as much is gathered and reduced behind it
    optimizer_s: float = 2e-3  # beside its bytes


# NVIDIA's data sheets of the SXM modules; a network adapter for each GPU, 200 Gbit/s with A100s, 400 with later ones.
# Memory is what torch.cuda sees: less than the name says. The matmuls of H100s are from NVIDIA NeMo's and nanotron's
# steps; of H200s from KempnerForge's; of A100s from fms-fsdp's, which is also the best measured; of B200s as H100s.
# Attention is cuDNN's, which torch takes first on Hopper from 2.11 on: 560 of 989 TFLOP/s; on A100s FlashAttention 2's
# (arXiv 2307.08691). A limit of power lowers the clock, so rates go with its root.
HARDWARE = {
    "a100-40gb": Hardware("a100-40gb", 312e12, 39.4 * 2**30, 1555 * GB, 300 * GB, 25 * GB, 8, 108, 0.85, 0.55),
    "a100": Hardware("a100", 312e12, 79.2 * 2**30, 2039 * GB, 300 * GB, 25 * GB, 8, 108, 0.85, 0.55),
    "h100": Hardware("h100", 989.5e12, 79.1 * 2**30, 3350 * GB, 450 * GB, 50 * GB),
    "h200": Hardware("h200", 989.5e12, 139.8 * 2**30, 4800 * GB, 450 * GB, 50 * GB, matmul=0.79),
    "b200": Hardware("b200", 2250e12, 178.3 * 2**30, 7700 * GB, 900 * GB, 50 * GB, multiprocessors=148),
}
