"""One training step, watched. On a GPU: where the host waited for the device, and what the device did; on a CPU: what
its seconds went into.

`step.py --bench.profile` puts the result into `watched`. On a GPU:

* synchronisations: file:line of each operation during which the host waited for the device -> how often.
* wall_ms, busy_ms: the step's time, and in how much of it at least one kernel ran. A gap: the host is too slow.
* kinds_ms: device time by kind of kernel. Kernels that overlap both count, so that the sum may exceed busy_ms.
* kernels_ms: the dearest kernels by name.

Of a profiled step, which is a little slower than others; the synchronisations are those of another.

On a CPU, in CPU milliseconds per step, of this rank:

* threads_ms: of the thread that computes, and of those of gloo that move messages.
* kinds_ms: of the former, what operators took by a profiled step; host: the rest, Python and torch's dispatch.
"""

import collections
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["busy", "kind_of_kernel", "watch", "watch_cpu"]

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
# The same of a CPU's operators; the other ones are elementwise or reductions.
OPERATORS = (
    ("matmul", ("::mm", "::addmm", "::bmm", "::matmul", "::linear")),
    ("attention", ("attention",)),
    ("optimizer", ("adam", "foreach")),
    ("copies", ("copy", "cat", "split_with_sizes", "clone", "contiguous", "chunk")),
)


def kind_of_kernel(name: str, kinds: tuple[tuple[str, tuple[str, ...]], ...] = KINDS) -> str:
    """One of `kinds`, or other."""
    return next((kind for kind, words in kinds if any(word in name.lower() for word in words)), "other")


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


def _thread_cpu_s() -> tuple[float, float]:
    """CPU seconds of this thread, and of all others of the process."""
    tasks = Path("/proc/self/task")
    each = {int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks.iterdir()}
    mine = each.pop(os.getpid())
    return mine, sum(each.values())


def watch_cpu(step: Callable[[], Any], steps: int = 3) -> dict[str, Any]:
    """Run some more steps and say what their CPU seconds went into. Milliseconds per step."""
    before = _thread_cpu_s()
    for _ in range(steps):
        step()
    main, others = (1e3 * (b - a) / steps for a, b in zip(before, _thread_cpu_s(), strict=True))
    kinds = collections.Counter[str]()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):  # the rest dispatches, or waits for messages
            kinds[kind_of_kernel(event.key, OPERATORS)] += event.self_cpu_time_total / 1e3 / steps  # type: ignore[assignment]
    return {
        "threads_ms": {"computing": main, "messages": others},
        "kinds_ms": {**kinds, "host": main - kinds.total()},
    }
