"""The time of a matrix product."""

import math

from dtron.plan.hardware import Constants, Hardware

__all__ = ["matmul_s"]


def matmul_s(m: float, n: float, k: float, hw: Hardware, c: Constants, faster: float = 1.0) -> float:
    """m x k by k x n: whole waves of 128 x 256 tiles, which smaller tiles soften, or the traffic.

    faster: the rate over that of bf16, whose bytes are counted.
    """
    rate = hw.flops * hw.matmul * math.sqrt(hw.power) * faster
    waves = math.ceil(math.ceil(m / 128) * math.ceil(n / 256) / hw.multiprocessors)
    whole = 2 * m * n * k / rate
    tiled = waves * 2 * 128 * 256 * k * hw.multiprocessors / rate
    return max(min(tiled, 1.35 * whole), 2 * (m * k + k * n + m * n) / (hw.memory_rate * c.memory)) + 2e-6
