"""Seconds of one call at a time, and ratios of two contenders that took turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy
import torch

from fused_resnet.bench.schema import Limits

SPIN_CYCLES = 1_000_000
"""About half a millisecond of a GPU: longer than the host needs to launch a step of one norm."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """The seconds of one contender, one sample a round, in the order of the rounds."""

    samples: tuple[Annotated[float, Limits(ge=1e-12, le=1e12)], ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("samples must hold at least one duration; got none")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p20(self) -> float:
        return float(numpy.percentile(self.samples, 20))

    @property
    def p80(self) -> float:
        return float(numpy.percentile(self.samples, 80))

    def as_dict(self) -> dict[str, Any]:
        """For JSON, in seconds."""
        return {"median": self.median, "p20": self.p20, "p80": self.p80, "samples": list(self.samples)}


def ratio(slower: Timing, faster: Timing) -> float:
    """How many times longer ``slower`` took than ``faster``: the median of the quotients of each round.
    ValueError if they are not of the same rounds."""
    return statistics.median(a / b for a, b in zip(slower.samples, faster.samples, strict=True))


class Stopwatch:
    """Times one call at a time: by the wall clock on the CPU, by CUDA events on a GPU.

    Args:
        clock: seconds since some moment; used on the CPU only.
        flush_cache: on a GPU, overwrite the L2 cache before each call, so that its inputs come from memory, and keep
            the stream busy while the call is launched, so that launch time is not measured.
    """

    def __init__(
        self, device: torch.device | str, *, clock: Callable[[], float] = time.perf_counter, flush_cache: bool = False
    ) -> None:
        self.device, self._clock, self._flush = torch.device(device), clock, None
        if flush_cache and self.device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.uint8, device=self.device)

    def time(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """(what ``work`` returned, the seconds it took); on a GPU all of its kernels have finished."""
        if self.device.type == "cuda":
            return self._time_by_events(work)
        start = self._clock()
        result = work()
        return result, self._clock() - start

    def time_calls(self, work: Callable[[], object], calls: int) -> float:
        """Seconds of one of ``calls`` calls in a row, for work too short to be timed alone. With ``flush_cache`` on a
        GPU each is timed by itself, after its own flush."""
        if self._flush is not None:
            return sum(self.time(work)[1] for _ in range(calls)) / calls

        def all_of_them() -> None:
            for _ in range(calls):
                work()

        return self.time(all_of_them)[1] / calls

    def _time_by_events(self, work: Callable[[], Result]) -> tuple[Result, float]:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if self._flush is not None:
                self._flush.zero_()
                torch.cuda._sleep(SPIN_CYCLES)
            start.record()
            result = work()
            end.record()
            torch.cuda.synchronize()
        return result, start.elapsed_time(end) / 1e3


def rotate(items: list[Any], by: int) -> list[Any]:
    """The items in order, starting with item ``by`` modulo their number."""
    start = by % len(items)
    return items[start:] + items[:start]
