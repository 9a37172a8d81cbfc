"""The timer on a clock that the test turns itself."""

from __future__ import annotations

import math

import pytest
import torch

from fused_resnet.bench.timer import Stopwatch, Timing, ratio, rotate


class Clock:
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_ratio_is_the_median_of_the_rounds_quotients():
    assert ratio(Timing((2.0, 4.0, 6.0)), Timing((1.0, 1.0, 2.0))) == 3.0  # of 2, 4 and 3, not the quotient of medians


def test_median_and_percentiles():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0, 6.0))
    assert timing.median == 3.5
    assert math.isclose(timing.p20, 2.0)
    assert math.isclose(timing.p80, 5.0)
    assert timing.as_dict() == {
        "median": timing.median,
        "p20": timing.p20,
        "p80": timing.p80,
        "samples": [5.0, 1.0, 2.0, 4.0, 3.0, 6.0],
    }


def test_the_stopwatch_returns_the_result_too():
    clock = Clock()

    def work() -> str:
        clock.now += 0.25
        return "done"

    assert Stopwatch("cpu", clock=clock).time(work) == ("done", 0.25)


def test_rotate():
    assert rotate([1, 2, 3], 4) == [2, 3, 1]


def test_ratio_needs_the_same_rounds():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratio(Timing((1.0, 2.0)), Timing((1.0,)))
    with pytest.raises(ValueError, match="at least one"):
        Timing(())


@pytest.mark.gpu
@pytest.mark.parametrize("flush_cache", [False, True])
def test_events_cover_the_kernels_and_not_the_flush(flush_cache):
    x = torch.randn(4096, 4096, device="cuda")
    stopwatch = Stopwatch("cuda", flush_cache=flush_cache)
    stopwatch.time(lambda: x @ x)
    one = min(stopwatch.time(lambda: x @ x)[1] for _ in range(5))
    ten = min(stopwatch.time(lambda: [x @ x for _ in range(10)])[1] for _ in range(5))
    assert 5 * one < ten < 20 * one
