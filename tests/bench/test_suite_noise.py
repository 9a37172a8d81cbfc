"""The rounds of a measurement on a machine whose noise is planted, and what comparing two runs says of them."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable

import pytest
import torch

from fused_resnet.bench.suite import rounds as rounds_module
from fused_resnet.bench.suite.rounds import LEAST_ROUNDS, WARMUP, Method, calls_for, measure_rounds
from fused_resnet.bench.timer import Stopwatch, Timing, ratio


class NoisyMachine:
    """Contenders of planted times, on a clock that only they move: each call of one takes a little longer at random,
    now and then a lot longer, and the whole machine drifts."""

    def __init__(self, seed: int = 0, noise: float = 0.0, drift: float = 0.0, outliers: float = 0.0) -> None:
        self.now, self.trace = 0.0, []
        self._random, self._noise, self._drift, self._outliers = random.Random(seed), noise, drift, outliers

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.trace.append("rest")
        self.now += seconds

    def work(self, name: str, seconds: float | Callable[[int], float]) -> Callable[[], None]:
        calls = 0

        def run() -> None:
            nonlocal calls
            calls += 1
            self.trace.append(name)
            exact = seconds(calls) if callable(seconds) else seconds
            slowdown = 1 + self._drift * (self.now / 60 % 1) + self._random.expovariate(1) * self._noise
            if self._random.random() < self._outliers:
                slowdown += self._random.uniform(0.2, 2.0)
            self.now += exact * slowdown

        return run

    def measure(self, times: dict[str, float | Callable[[int], float]], method: Method, **changes):
        runs = {name: self.work(name, seconds) for name, seconds in times.items()}
        timings, failures = measure_rounds(runs, "cpu", method, clock=self.clock, sleep=self.sleep, **changes)
        assert not failures
        return timings


def test_turns_rotate_and_each_rests_first_and_warms_up():
    machine = NoisyMachine()
    machine.measure({"a": 0.1, "b": 0.1, "c": 0.1}, Method(rounds=4, min_seconds=0.0, warm_up=False))
    first, *others = machine.trace[:6], machine.trace[6:15], machine.trace[15:24], machine.trace[24:33]
    assert first == ["rest", "a", "rest", "b", "rest", "c"]  # how long a call is nobody knows yet
    for start, turns in enumerate(others, 1):
        order = [turns[2], turns[5], turns[8]]
        assert turns == ["rest", order[0], order[0], "rest", order[1], order[1], "rest", order[2], order[2]]
        assert "".join(order) == "abcabc"[start % 3 : start % 3 + 3]


def test_long_calls_need_no_warm_up_of_their_own():
    machine = NoisyMachine()
    machine.measure({"a": 0.5}, Method(rounds=3, min_seconds=0.0, pause=0.0, warm_up=False))
    assert machine.trace == ["a"] * 3


def test_the_untimed_call_pays_for_cold_caches():
    """The first call after somebody else's takes three times as long."""
    machine = NoisyMachine()
    last = None

    def run(name: str) -> Callable[[], None]:
        def work() -> None:
            nonlocal last
            machine.now += 0.1 if last == name else 0.3
            last = name

        return work

    found, _ = measure_rounds(
        {"a": run("a"), "b": run("b")},
        "cpu",
        Method(rounds=5, min_seconds=0.0),
        clock=machine.clock,
        sleep=machine.sleep,
    )
    assert all(timing.median == pytest.approx(0.1) for timing in found.values())


def test_short_calls_are_repeated_until_they_can_be_timed():
    machine = NoisyMachine()
    found = machine.measure({"short": 1e-4, "long": 0.5}, Method(rounds=2, min_seconds=0.0, sample_seconds=0.00195))
    assert found["short"].samples == pytest.approx([1e-4] * 2)
    turn = "".join("s" if call == "short" else "-" for call in machine.trace)
    assert "s" * 21 in turn and "s" * 22 not in turn  # twenty timed, one not
    assert [calls_for(s, 0.002) for s in (1e-4, 0.0015, 0.1)] == [20, 2, 1]
    assert calls_for(1e-9, 1.0) == calls_for(0.0, 1.0) == 10_000


def test_a_disturbed_turn_does_not_shorten_the_later_samples():
    machine = NoisyMachine()
    seconds = {"a": lambda call: 0.1 if call == 1 else 1e-4}
    machine.measure(seconds, Method(rounds=3, min_seconds=0.0, pause=0.0, sample_seconds=0.002))
    assert len(machine.trace) > 3 * 20


def test_the_first_rounds_go_unmeasured_but_for_a_share_of_the_time():
    def warming(call: int) -> float:
        return 4.0 if call <= WARMUP else 1.0

    method = Method(rounds=3, min_seconds=0.0)
    assert NoisyMachine().measure({"a": warming}, method)["a"].samples == pytest.approx((1.0, 1.0, 1.0))
    cold = Method(rounds=3, min_seconds=0.0, warm_up=False)
    assert NoisyMachine().measure({"a": warming}, cold)["a"].samples == pytest.approx((4.0, 4.0, 4.0))
    assert NoisyMachine().measure({"a": warming}, method, seconds=20.0)["a"].samples == pytest.approx((4.0, 1.0, 1.0))


def test_rounds_go_on_until_everyone_was_timed_long_enough():
    method = Method(rounds=5, min_seconds=3.0, most_rounds=40)
    assert len(NoisyMachine().measure({"a": 0.1, "b": 1.0}, method)["b"].samples) == 30
    assert len(NoisyMachine().measure({"a": 2.0, "b": 1.0}, method)["a"].samples) == 5
    assert len(NoisyMachine().measure({"a": 0.001, "b": 1.0}, method)["a"].samples) == 40


def test_rounds_end_with_the_time_but_not_before_the_least():
    method = Method(rounds=1000, min_seconds=0.0, pause=0.0)
    machine = NoisyMachine()
    found = machine.measure({"a": 0.4, "b": 0.6}, method, seconds=50.0)
    assert len(found["a"].samples) == pytest.approx(48, abs=1)
    assert machine.now == pytest.approx(50.0, abs=1.01)
    assert len(NoisyMachine().measure({"a": 9.0}, method, seconds=1.0)["a"].samples) == LEAST_ROUNDS
    assert len(NoisyMachine().measure({"a": 9.0}, Method(rounds=2), seconds=1.0)["a"].samples) == 2


def test_progress_goes_from_nothing_to_all():
    told: list[float] = []
    NoisyMachine(noise=0.1).measure({"a": 0.5}, Method(rounds=8, min_seconds=0.0), after_round=told.append)
    assert told == sorted(told) and told[0] == 0.0 and told[-1] == 1.0 and len(told) >= 10


def test_nothing_is_collected_while_it_is_timed(monkeypatch):
    states: list[bool] = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)
    measure_rounds({"a": lambda: states.append(gc.isenabled())}, "cpu", Method(rounds=2, min_seconds=0.0, pause=0.0))
    assert states and not any(states)
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with pytest.raises(KeyboardInterrupt):
        measure_rounds({"a": _stop}, "cpu", Method(rounds=1))
    assert gc.isenabled()


def _stop() -> None:
    raise KeyboardInterrupt


def test_nobody_to_measure():
    assert measure_rounds({}, "cpu", Method()) == ({}, {})


def test_calls_in_a_row_are_timed_together():
    machine = NoisyMachine()
    assert Stopwatch("cpu", clock=machine.clock).time_calls(machine.work("a", 0.25), 8) == pytest.approx(0.25)
    assert machine.trace == ["a"] * 8


@pytest.mark.gpu
@pytest.mark.parametrize("flush_cache", [False, True])
def test_calls_in_a_row_on_a_gpu(flush_cache):
    x = torch.randn(4096, 4096, device="cuda")
    stopwatch = Stopwatch("cuda", flush_cache=flush_cache)
    one = min(stopwatch.time(lambda: x @ x)[1] for _ in range(5))
    assert one / 2 < stopwatch.time_calls(lambda: x @ x, 10) < 2 * one


TIMES = {f"rival {index}": 0.05 + 0.01 * index for index in range(4)} | {"ours": 0.04, "ours, planned": 0.03}
NOISE = {"noise": 0.03, "drift": 0.15, "outliers": 0.05}


def timings(seed: int, **slower: float) -> dict[str, Timing]:
    times = {name: seconds * slower.get(name, 1.0) for name, seconds in TIMES.items()}
    return NoisyMachine(seed, **NOISE).measure(times, Method())


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch):
    """A search through all of what the tests have made would take longer than what is tested."""
    monkeypatch.setattr(rounds_module.gc, "collect", lambda generation=2: 0)


def relative_to_rivals(found: dict[str, Timing]) -> float:
    return ratio(found["ours"], found["rival 0"])


def test_the_default_rounds_agree_from_run_to_run_on_a_noisy_machine():
    """Drift of 15 %, bursts, and noise of 3 %: the same code is within 3 % of itself, and a tenth more is seen."""
    same = [relative_to_rivals(timings(seed)) for seed in range(12)]
    slower = [relative_to_rivals(timings(seed, ours=1.1)) for seed in range(12, 24)]
    middle = sum(same) / len(same)
    assert max(abs(value / middle - 1) for value in same) < 0.03
    assert min(slower) > 1.05 * middle


def result_of(found: dict[str, Timing]):
    from fused_resnet.bench.result import INFERENCE, MODEL, RIGHT, Measurement, Outcome, Result

    outcomes = {name: Outcome(RIGHT, timing=timing) for name, timing in found.items()}
    measurement = Measurement(MODEL, "resnet50", INFERENCE, 8, "float32", 224, outcomes)
    return Result({"commit": "abc", "device": "x"}, {}, {}, [measurement])


@pytest.mark.parametrize("seed", range(4))
def test_two_runs_of_the_same_code_do_not_differ_and_a_planted_loss_is_reported(seed, tmp_path, capsys):
    from fused_resnet.__main__ import main

    before, same, slower = (tmp_path / f"{name}.json" for name in ("before", "same", "slower"))
    result_of(timings(10 * seed)).save(before)
    result_of(timings(10 * seed + 1)).save(same)
    result_of(timings(10 * seed + 2, ours=1.1)).save(slower)
    assert main(["bench", "compare", str(before), str(same)]) == 0
    assert main(["bench", "compare", str(before), str(slower)]) == 1
    assert main(["bench", "compare", str(slower), str(before)]) == 0
