"""What the device could do at best, measured in the same run as what is held against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_resnet.bench.timer import Stopwatch, Timing

ROUNDS = 20
WARMUP = 5


@dataclass(frozen=True)
class Ceilings:
    """Bytes and matrix operations a second that this device was seen to reach."""

    bytes_per_second: float
    flop_per_second: float

    def fraction(self, seconds: float, moved: float, flop: float) -> float:
        """The least time that ``moved`` bytes and ``flop`` operations take, over ``seconds``; 1 is the roofline."""
        return max(moved / self.bytes_per_second, flop / self.flop_per_second) / seconds


def measure_ceilings(device: torch.device | str, dtype: torch.dtype) -> Ceilings:
    """A copy of a tensor larger than any cache (read and written bytes), and a square matrix product in ``dtype``.

    Random numbers, not zeros, on which a GPU clocks higher.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    elements, size = (2**29, 8192) if on_gpu else (2**26, 1024)
    source = torch.empty(elements // dtype.itemsize * 2, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    copy = _median(lambda: target.copy_(source), device)
    product = _median(lambda: left @ right, device)
    return Ceilings(2 * source.nbytes / copy, 2 * size**3 / product)


def _median(work, device: torch.device) -> float:
    stopwatch = Stopwatch(device)
    samples = [stopwatch.time(work)[1] for _ in range(WARMUP + ROUNDS)]
    return Timing(tuple(samples[WARMUP:])).median
