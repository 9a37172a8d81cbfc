"""The GPU's own clock for pytest-benchmark, and what comes before it is read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fused_resnet.bench.timer import SPIN_CYCLES


class Moment:
    """Now, on the current CUDA stream. The difference of two is seconds, and waits for the later: a clock for
    pytest-benchmark that measures the device and not the host."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def before_each_round(device: torch.device | str, flush: bool) -> Callable[[], None]:
    """What to do on a GPU in front of what `Moment` measures: nothing on the CPU.

    With ``flush`` the L2 cache is overwritten, so that inputs come from memory. Then the stream is kept busy until all
    of the work is launched, so that launches are not measured.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return lambda: None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size if flush else 0
    buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def prepare() -> None:
        torch.cuda.synchronize(device)
        if flush:
            buffer.zero_()
        torch.cuda._sleep(SPIN_CYCLES)

    return prepare
