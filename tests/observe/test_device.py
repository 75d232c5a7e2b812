"""The peak by the device's name, and the memory a process held."""

import pytest
import torch
from on_gpu import needs_gpu, run_on_gpu

from dtron.observe.device import max_memory_bytes, peak_flops_per_s, reset_max_memory


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.25e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181.05e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("AMD Instinct MI325X", 1307.4e12),
        ("AMD Instinct MI250X", 191.5e12),
        # Never guessed: no bf16 tensor cores, slices and siblings of known chips, CPUs, names yet to come.
        ("Tesla V100-SXM2-16GB", None),
        ("Tesla T4", None),
        ("Quadro RTX 6000", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 64GB HBM2", None),
        ("NVIDIA H1000", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_by_name(name: str, peak: float | None) -> None:
    assert peak_flops_per_s(name) == peak


def test_memory_of_a_process_grows_with_what_it_touches_and_is_in_bytes() -> None:
    cpu = torch.device("cpu")
    before = max_memory_bytes(cpu)
    assert 50 * 2**20 < before < 64 * 2**30, "a process with torch holds some hundred MiB"
    block = torch.ones(before // 4 + 32 * 2**20)  # float32: more bytes than the process ever held
    assert max_memory_bytes(cpu) >= block.numel() * 4
    reset_max_memory(cpu)


@needs_gpu
def test_memory_of_a_gpu_is_what_the_allocator_reserved() -> None:
    program = """
import torch
from dtron.observe.device import max_memory_bytes, reset_max_memory
gpu = torch.device("cuda")
block = torch.ones(64 * 2**20, device=gpu)
held = max_memory_bytes(gpu)
del block
torch.cuda.empty_cache()
reset_max_memory(gpu)
print(held, max_memory_bytes(gpu))
"""
    held, afterwards = map(int, run_on_gpu(program).split())
    assert held >= 64 * 2**20 * 4 > afterwards
