"""Timing contenders against each other in one process.

A machine is never as fast twice: other programs, clocks and caches come and go. So contenders take turns: every round
runs each of them once, the order rotates from round to round, and two contenders are compared round by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy
import torch

from fused_resnet.bench.device_clock import SPIN_CYCLES

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """The seconds of one contender, one sample a round, in the order of the rounds."""

    samples: tuple[float, ...]

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
        """For JSON: median, p20, p80 and all samples, in seconds."""
        return {"median": self.median, "p20": self.p20, "p80": self.p80, "samples": list(self.samples)}


def ratio(slower: Timing, faster: Timing) -> float:
    """How many times longer ``slower`` took than ``faster``: the median of the quotients of each round.

    Raises:
        ValueError: the two were not measured in the same number of rounds.
    """
    if len(slower.samples) != len(faster.samples):
        raise ValueError(
            f"both timings must come from the same rounds; got {len(slower.samples)} and {len(faster.samples)} samples"
        )
    return statistics.median(a / b for a, b in zip(slower.samples, faster.samples, strict=True))


class Stopwatch:
    """Times one call at a time: by the wall clock on the CPU, by CUDA events on a GPU.

    Args:
        device: where the work runs.
        clock: seconds since some moment; used on the CPU only.
        flush_cache: on a GPU, overwrite the L2 cache before each call, so that it finds its inputs in memory. The
            stream is then kept busy while the call is launched, so that launch time is not measured.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        clock: Callable[[], float] = time.perf_counter,
        flush_cache: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self._clock = clock
        self._flush = _cache_sized_buffer(self.device) if flush_cache and self.device.type == "cuda" else None

    def time(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """(what ``work`` returned, the seconds it took); on a GPU all of its kernels have finished."""
        if self.device.type == "cuda":
            return self._time_by_events(work)
        start = self._clock()
        result = work()
        return result, self._clock() - start

    def time_calls(self, work: Callable[[], object], calls: int) -> float:
        """Seconds of one of ``calls`` calls in a row: for work too short to be timed alone.

        With ``flush_cache`` on a GPU each is timed by itself, behind a flush of its own.
        """
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
            wall = time.perf_counter()
            start.record()
            result = work()
            end.record()
            torch.cuda.synchronize()
            wall = time.perf_counter() - wall
        seconds = start.elapsed_time(end) / 1e3
        # Work on a stream of its own (a peer's runtime may have one) is not between the events.
        on_another_stream = self._flush is None and wall > 2 * seconds + 1e-3
        return result, wall if on_another_stream else seconds


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    device: torch.device | str,
    *,
    clock: Callable[[], float] = time.perf_counter,
    flush_cache: bool = False,
    after_round: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times the contenders in turns, ``warmup`` rounds unmeasured and then ``rounds`` rounds measured.

    Round r starts with contender r (modulo their number), so that none is always the one that finds the caches warm.

    Args:
        contenders: what to call, by name.
        rounds: measured rounds, at least 1.
        warmup: rounds before them, at least 0.
        device, clock, flush_cache: see `Stopwatch`.
        after_round: called after every round, warm-up included (for a progress bar).

    Raises:
        ValueError: there is no contender, or a count is out of range.
    """
    if not contenders:
        raise ValueError("contenders must hold at least one function; got none")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0; got {warmup}")
    stopwatch = Stopwatch(device, clock=clock, flush_cache=flush_cache)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmup + rounds):
        for name in rotate(list(contenders), index):
            seconds = stopwatch.time(contenders[name])[1]
            if index >= warmup:
                samples[name].append(seconds)
        if after_round is not None:
            after_round()
    return {name: Timing(tuple(durations)) for name, durations in samples.items()}


def rotate(items: list[Any], by: int) -> list[Any]:
    """The items in order, starting with item ``by`` modulo their number."""
    start = by % len(items)
    return items[start:] + items[:start]


def _cache_sized_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
