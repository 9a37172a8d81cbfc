"""The timer on a clock that the test turns itself."""

from __future__ import annotations

import math

import pytest
import torch

from fused_resnet.bench.timer import Stopwatch, Timing, interleave, ratio, rotate


class Clock:
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_contenders_take_turns_and_the_order_rotates():
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    interleave(contenders, 3, 1, "cpu")
    assert ["".join(calls[start : start + 3]) for start in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]


def test_samples_are_what_the_clock_says_without_the_warmup():
    clock = Clock()
    durations = {"slow": iter([9.0, 2.0, 4.0, 6.0]), "fast": iter([9.0, 1.0, 1.0, 2.0])}

    def work(name: str) -> None:
        clock.now += next(durations[name])

    timings = interleave({name: (lambda name=name: work(name)) for name in durations}, 3, 1, "cpu", clock=clock)
    assert timings["slow"].samples == (2.0, 4.0, 6.0)
    assert timings["fast"].samples == (1.0, 1.0, 2.0)
    assert ratio(timings["slow"], timings["fast"]) == 3.0  # the median of 2, 4 and 3, not the quotient of medians


def test_after_round_is_called_once_a_round_warmup_included():
    rounds: list[int] = []
    interleave({"a": lambda: None}, 3, 2, "cpu", after_round=lambda: rounds.append(1))
    assert len(rounds) == 5


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


@pytest.mark.parametrize(
    ("contenders", "rounds", "warmup", "message"),
    [
        ({}, 1, 0, "contenders"),
        ({"a": lambda: None}, 0, 0, "rounds must be at least 1; got 0"),
        ({"a": lambda: None}, 1, -1, "warmup must be at least 0; got -1"),
    ],
)
def test_bad_arguments(contenders, rounds, warmup, message):
    with pytest.raises(ValueError, match=message):
        interleave(contenders, rounds, warmup, "cpu")


def test_ratio_needs_the_same_rounds():
    with pytest.raises(ValueError, match="got 2 and 1 samples"):
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
