"""What the device could do at best, measured in the same run as what is held against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fused_resnet.bench.timer import Stopwatch, Timing

ROUNDS = 20
WARMUP = 5
CPU_COPY_BYTES, GPU_COPY_BYTES = 2**27, 2**30
"""Of either tensor of a copy: four times the cache of an EPYC's eight cores, and twenty times that of a GPU."""
CPU_PRODUCT_SIZES, GPU_PRODUCT_SIZES = (1024, 2048), (8192,)
"""Sides of the square matrices; the fastest counts (which of them that is depends on the CPU and the dtype)."""


@dataclass(frozen=True)
class Ceilings:
    """Bytes and matrix operations a second that this device was seen to reach."""

    bytes_per_second: float
    flop_per_second: float

    def fraction(self, seconds: float, moved: float, flop: float) -> float:
        """The least time that ``moved`` bytes and ``flop`` operations take, over ``seconds``; 1 is the roofline."""
        return max(moved / self.bytes_per_second, flop / self.flop_per_second) / seconds


def measure_ceilings(device: torch.device | str, dtype: torch.dtype, *, rounds: int = ROUNDS) -> Ceilings:
    """A copy of a tensor larger than any cache (read and written bytes), and a square matrix product in ``dtype``.

    Random numbers, not zeros, on which a GPU clocks higher. Of the ``rounds`` the 20th percentile: what the device
    reaches while nobody else is in its way.
    """
    on_gpu = torch.device(device).type == "cuda"
    copy_bytes, sizes = (GPU_COPY_BYTES, GPU_PRODUCT_SIZES) if on_gpu else (CPU_COPY_BYTES, CPU_PRODUCT_SIZES)
    stopwatch, warmup = Stopwatch(device), min(WARMUP, rounds)

    def seconds(work: Callable[[], object]) -> float:
        samples = [stopwatch.time(work)[1] for _ in range(warmup + rounds)]
        return Timing(tuple(samples[warmup:])).p20

    def flop_per_second(size: int) -> float:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return 2 * size**3 / seconds(lambda: left @ right)

    source = torch.empty(copy_bytes // dtype.itemsize, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    return Ceilings(2 * source.nbytes / seconds(lambda: target.copy_(source)), max(map(flop_per_second, sizes)))
