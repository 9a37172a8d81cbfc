"""Finding the fastest of some candidates: the planted one is found, the wrong one is dropped, noise changes nothing."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.bench.timer import Timing
from fused_resnet.bench.tune import fastest
from fused_resnet.bench.tune.fastest import NothingRan, find_fastest, is_faster
from tests.bench.planted import FakeTask

METHOD = Method(rounds=9, min_seconds=0, most_rounds=9, sample_seconds=0, pause=0, warm_up=False)


class Workshop:
    """Candidates that take as long as is said on a clock of their own, times a little noise."""

    def __init__(self, noise: float = 0.0) -> None:
        self.now, self.closed, self.ran = 0.0, [], []
        self._random, self._noise = random.Random(0), noise

    def candidate(self, name: str, seconds: float, result: float = 1.0, error: Exception | None = None):
        def run() -> None:
            self.ran.append(name)
            self.now += seconds * (1 + self._noise * self._random.uniform(-1, 1))

        def prepare() -> Prepared:
            if error is not None:
                raise error
            return Prepared(run, lambda: [torch.tensor(result)], close=lambda: self.closed.append(name))

        return prepare

    def find(self, candidates: dict, heuristic: str, **settings):
        method = settings.pop("method", METHOD)
        return find_fastest(FakeTask(), candidates, heuristic, method, clock=lambda: self.now, **settings)


def test_the_planted_winner_is_found():
    shop = Workshop(noise=0.01)
    candidates = {name: shop.candidate(name, s) for name, s in {"usual": 1.0, "slow": 2.0, "fast": 0.5}.items()}
    found = shop.find(candidates, "usual")
    assert (found.winner, found.heuristic) == ("fast", "usual")
    assert found.ratio == pytest.approx(2, rel=0.05) and found.seconds["slow"] == pytest.approx(2, rel=0.05)
    assert not found.dropped and sorted(shop.closed) == ["fast", "slow", "usual"]


def test_the_heuristic_stays_where_it_is_the_fastest_or_nearly():
    for seconds in (1.0, 0.985):
        shop = Workshop()
        found = shop.find({"usual": shop.candidate("usual", 1.0), "other": shop.candidate("other", seconds)}, "usual")
        assert found.winner == "usual" and found.ratio == 1


def test_of_many_that_are_alike_none_is_called_faster():
    """The fastest of twenty looks faster than it is; the rounds that decide are of two alone."""
    for _ in range(5):
        shop = Workshop(noise=0.3)
        found = shop.find({f"{i}": shop.candidate(f"{i}", 1.0) for i in range(20)}, "0")
        assert found.winner == "0"


def test_of_many_only_the_best_are_measured_in_full():
    shop = Workshop()
    candidates = {f"{i}": shop.candidate(f"{i}", 1.0 + i) for i in range(30)}
    found = shop.find(candidates, "29")
    assert found.winner == "0" and found.ratio == pytest.approx(30)
    assert shop.ran.count("15") <= fastest.BRIEF.rounds + 1 < shop.ran.count("1")
    assert shop.ran.count("29") > fastest.BRIEF.rounds + 1  # the heuristic's choice is


def test_wrong_numbers_and_failures_are_dropped_with_their_reasons():
    shop = Workshop()
    candidates = {
        "usual": shop.candidate("usual", 1.0),
        "wrong": shop.candidate("wrong", 0.1, result=2.0),
        "raises": shop.candidate("raises", 0.1, error=RuntimeError("out of\nshared memory")),
        "fast": shop.candidate("fast", 0.5),
    }
    found = shop.find(candidates, "usual")
    assert found.winner == "fast" and set(found.seconds) == {"usual", "fast"}
    assert found.dropped == {"wrong": "wrong: differs by 1.0", "raises": "failed: RuntimeError: shared memory"}
    assert "wrong" in shop.closed and "wrong" not in shop.ran


def test_one_that_fails_while_it_is_timed_is_dropped():
    shop, turns = Workshop(), itertools.count()

    def run() -> None:
        if next(turns) == 2:
            raise RuntimeError("broken")

    flaky = Prepared(run, lambda: [torch.tensor(1.0)])
    found = shop.find({"usual": shop.candidate("usual", 1.0), "flaky": lambda: flaky}, "usual")
    assert found.winner == "usual" and found.dropped == {"flaky": "failed: RuntimeError: broken"}


def test_a_heuristic_that_is_wrong_loses_to_what_is_right():
    shop = Workshop()
    found = shop.find(
        {"usual": shop.candidate("usual", 0.1, result=5.0), "other": shop.candidate("other", 1.0)}, "usual"
    )
    assert found.winner == "other" and math.isnan(found.ratio) and found.dropped == {"usual": "wrong: differs by 4.0"}


def test_nothing_ran():
    shop = Workshop()
    with pytest.raises(NothingRan, match="^a: wrong: differs by 1.0; b: failed: ValueError: no$"):
        shop.find({"a": shop.candidate("a", 1, result=0.0), "b": shop.candidate("b", 1, error=ValueError("no"))}, "a")


def test_time_that_is_used_up_ends_the_rounds():
    shop = Workshop()
    candidates = {"usual": shop.candidate("usual", 1.0), "fast": shop.candidate("fast", 0.5)}
    method = Method(rounds=1000, min_seconds=0, most_rounds=1000, sample_seconds=0, pause=0, warm_up=False)
    found = shop.find(candidates, "usual", method=method, seconds=60)
    assert found.winner == "fast" and shop.now < 90


def test_few_rounds_say_nothing():
    twice, once = Timing((2.0,) * 4), Timing((1.0,) * 4)
    assert not is_faster(twice, once)
    assert is_faster(Timing((2.0,) * 5), Timing((1.0,) * 5))
    assert not is_faster(Timing((2.0,) * 5), Timing((1.0, 1.0, 1.0, 3.0, 3.0)))


def test_never_inside_the_capture_of_a_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    shop = Workshop()
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        find_fastest(FakeTask(device=torch.device("cuda")), {"a": shop.candidate("a", 1.0)}, "a", METHOD)
    assert not shop.ran
