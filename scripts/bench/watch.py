"""One training step on a GPU, watched: where the host waited for the device, and what the device did.

`step.py --bench.profile` puts the result into `watched`:

* synchronisations: file:line of each operation during which the host waited for the device -> how often.
* wall_ms, busy_ms: the step's time, and in how much of it at least one kernel ran. A gap: the host is too slow.
* kinds_ms: device time by kind of kernel. Kernels that overlap both count, so that the sum may exceed busy_ms.
* kernels_ms: the dearest kernels by name.

Of a profiled step, which is a little slower than others; the synchronisations are those of another.
"""

import collections
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["busy", "kind_of_kernel", "watch"]

DEAREST = 25
# The first row of which a word is in the kernel's name wins.
KINDS = (
    ("communication", ("nccl",)),
    ("attention", ("sdpa", "flash", "fmha", "cudnn_generated", "attention")),
    ("optimizer", ("adam", "multi_tensor", "foreach", "fused_optimizer")),
    ("matmul", ("gemm", "nvjet", "cutlass", "xmma", "cublas")),
    ("copies", ("memcpy", "memset", "copy", "cat", "split_with_sizes")),
    ("compiled", ("triton",)),
)


def kind_of_kernel(name: str) -> str:
    """One of `KINDS`, or other."""
    return next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), "other")


def busy(spans: list[tuple[float, float]]) -> float:
    """Total length of the union of (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def watch(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Run two more steps and say what happened in them. Times in milliseconds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        wall_s = time.perf_counter() - began
    kernels = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    kinds, names = collections.Counter[str](), collections.Counter[str]()
    for event in kernels:
        elapsed_ms = event.time_range.elapsed_us() / 1e3
        kinds[kind_of_kernel(event.name)] += elapsed_ms  # type: ignore[assignment]
        names[event.name[:100]] += elapsed_ms  # type: ignore[assignment]
    return {
        "synchronisations": dict(collections.Counter(f"{os.path.basename(w.filename)}:{w.lineno}" for w in waits)),
        "wall_ms": wall_s * 1e3,
        "busy_ms": busy([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e3,
        "kinds_ms": dict(kinds),
        "kernels_ms": dict(names.most_common(DEAREST)),
    }
