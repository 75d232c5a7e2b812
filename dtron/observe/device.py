"""Facts about the device: its peak speed, which MFU divides by, and the most memory it held."""

import re
import resource
import sys

import torch

__all__ = ["device_name", "max_memory_bytes", "memory_statistics", "peak_flops_per_s", "reset_max_memory"]

# Dense bf16 matrix peak with fp32 accumulation, in FLOP/s, of one device as torch.cuda counts them.
# NVIDIA's data sheets often print the figure with 2:4 sparsity: it is halved here.
# The first row all of whose words are in the device's name wins, so special names come first.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("gb300", 2.5e15),  # NVIDIA GB300 NVL72 data sheet: 360 PFLOPS sparse for 72 GPUs
    ("gb200", 2.5e15),  # NVIDIA GB200 NVL72 data sheet: 360 PFLOPS sparse for 72 GPUs
    ("b300", 2.25e15),  # NVIDIA HGX B300 data sheet: 36 PFLOPS sparse for 8 GPUs
    ("b200", 2.25e15),  # NVIDIA HGX B200 data sheet: 36 PFLOPS sparse for 8 GPUs
    ("gh200", 989.5e12),  # NVIDIA GH200 data sheet: 1,979 TFLOPS sparse
    ("h200 nvl", 835.5e12),  # NVIDIA H200 data sheet, NVL: 1,671 TFLOPS sparse
    ("h200", 989.5e12),  # NVIDIA H200 data sheet, SXM: 1,979 TFLOPS sparse
    ("h100 pcie", 756.5e12),  # NVIDIA H100 data sheet, PCIe: 1,513 TFLOPS sparse
    ("h100 nvl", 835.5e12),  # NVIDIA H100 data sheet, NVL: 1,671 TFLOPS sparse
    ("h100 hbm3", 989.5e12),  # NVIDIA H100 data sheet, SXM ("H100 80GB HBM3"): 1,979 TFLOPS sparse
    ("h20", 148e12),  # NVIDIA H20 data sheet
    ("a100", 312e12),  # NVIDIA A100 data sheet, SXM and PCIe alike
    ("a40", 149.7e12),  # NVIDIA A40 data sheet
    ("a10", 125e12),  # NVIDIA A10 data sheet
    ("a10g", 70e12),  # NVIDIA A10G data sheet: 70 TFLOPS, less than the A10
    ("a6000", 154.8e12),  # NVIDIA RTX A6000 data sheet: 309.7 TFLOPS sparse
    ("l40s", 362.05e12),  # NVIDIA L40S data sheet: 362.05 dense, 733 sparse
    ("l40", 181.05e12),  # NVIDIA L40 data sheet: 181.05 dense, 362.1 sparse
    ("l4", 121e12),  # NVIDIA L4 data sheet: 242 TFLOPS sparse
    ("6000 ada", 364.25e12),  # NVIDIA RTX 6000 Ada: Ada architecture whitepaper, appendix
    ("rtx 5090", 209.5e12),  # NVIDIA RTX Blackwell architecture whitepaper, appendix, fp32 accumulation
    ("rtx 4090", 165.2e12),  # NVIDIA Ada architecture whitepaper, appendix, fp32 accumulation
    ("rtx 3090", 71e12),  # NVIDIA Ampere GA102 architecture whitepaper, appendix, fp32 accumulation
    ("mi355x", 2.5e15),  # AMD Instinct MI355X data sheet
    ("mi350x", 2.3e15),  # AMD Instinct MI350X data sheet
    ("mi325x", 1307.4e12),  # AMD Instinct MI325X data sheet
    ("mi300x", 1307.4e12),  # AMD Instinct MI300X data sheet
    ("mi300a", 980.6e12),  # AMD Instinct MI300A data sheet
    ("mi250x", 191.5e12),  # AMD Instinct MI250X data sheet: 383 TFLOPS for two dies; torch sees each die
)
# A slice of a GPU, or a sibling with another peak: the table's figure would be wrong.
_OTHER_CHIP = {"mig", "laptop", "ti", "d", "super"}


def device_name(device: torch.device) -> str:
    """The name of a GPU; cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops_per_s(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of one device, by the name `torch.cuda.get_device_name` gives.

    None: not known, and MFU with it; the caller says so and assumes nothing. V100 and T4 are
    not known on purpose: they have no bf16 tensor cores.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if words & _OTHER_CHIP:
        return None
    return next((peak for key, peak in _PEAKS if words.issuperset(key.split())), None)


def max_memory_bytes(device: torch.device) -> int:
    """Most memory held, in bytes: reserved by torch's allocator on CUDA, resident in the process on CPU.

    CUDA counts since `reset_max_memory`, the CPU since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def memory_statistics(device: torch.device) -> dict[str, int]:
    """`max_memory_bytes`, and on CUDA what tensors held of it at most, and how often the allocator had to free its
    cache because nothing was left, which is slow.
    """
    found = {"max_memory_bytes": max_memory_bytes(device)}
    if device.type == "cuda":
        seen = torch.cuda.memory_stats(device)
        found |= {"max_active_memory_bytes": seen["active_bytes.all.peak"], "alloc_retries": seen["num_alloc_retries"]}
    return found


def reset_max_memory(device: torch.device) -> None:
    """Start counting `max_memory_bytes` anew on CUDA; a process's own peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
