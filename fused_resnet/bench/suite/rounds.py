"""One measurement's rounds: contenders take turns until there are samples enough, or no time is left.

A turn is a pause in which the threads of whoever came before go to sleep (a runtime's own pool spins on its cores for
some milliseconds after its work), a call that brings back the contender's weights where one call is short, and the
calls that are timed. Round i of one contender is round i of all of them.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from fused_resnet.bench.timer import Stopwatch, Timing, rotate

LEAST_ROUNDS = 5
"""Measured even where the time is used up; ``report.noise`` says nothing of fewer."""
WARMUP = 3
"""Rounds that go unmeasured; everyone has run a few times before, when he was made ready."""
WARMUP_SHARE = 0.25
"""Of a measurement's time, at most."""
SHORT_CALL, MOST_CALLS = 0.25, 10_000


@dataclass(frozen=True)
class Method:
    """How long to measure: at least so many ``rounds``, where time allows, and as many more, until every contender has
    been timed for ``min_seconds``, but no more than ``most_rounds``. A sample is the mean of as many calls as take
    ``sample_seconds``, after a ``pause``; with ``warm_up`` the first rounds go unmeasured."""

    rounds: int = 15
    min_seconds: float = 2.0
    most_rounds: int = 60
    sample_seconds: float = 0.002
    pause: float = 0.02
    warm_up: bool = True


ONCE = Method(rounds=1, min_seconds=0.0, most_rounds=1, sample_seconds=0.0, pause=0.0, warm_up=False)
"""Of a dry run."""


def measure_rounds(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    method: Method,
    *,
    flush_cache: bool = False,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
    after_round: Callable[[float], object] = lambda done: None,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Times these functions in turns; one that raises is out from then on, and the others go on.

    Gives the timings of those who ran to the end, and the exceptions of the others.

    Args:
        runs: what to call, by name. They have run before: compiling and packing are over.
        device, flush_cache: see ``timer.Stopwatch``.
        seconds: after which there are no more rounds, once `LEAST_ROUNDS` are done.
        after_round: called after every round with how much of all is done, from 0 to 1.
    """
    turns = _Turns(dict(runs), list(runs), Stopwatch(device, clock=clock, flush_cache=flush_cache), method, sleep)
    start, samples = clock(), list[dict[str, float]]()
    with _no_garbage_collection():
        for index in range(WARMUP if method.warm_up and runs else 0):
            turns.round(index)
            after_round(0.0)
            if clock() - start > seconds * WARMUP_SHARE:
                break
        measured_since = clock()
        while turns.runs:
            samples.append(turns.round(len(samples)))
            gc.collect()  # of this round's making only: quick
            done, wanted = len(samples), turns.rounds_wanted()
            a_round = (clock() - measured_since) / done
            affordable = done + int((start + seconds - clock()) / a_round) if seconds < math.inf else wanted
            last = min(wanted, max(affordable, min(LEAST_ROUNDS, method.rounds)))
            after_round(min(1.0, done / last))
            if done >= last:
                break
    return {name: Timing(tuple(each[name] for each in samples)) for name in turns.runs}, turns.failures


@dataclass
class _Turns:
    """The contenders that are still in; ``timed`` is how long a contender was timed for in its latest turn, ``seconds``
    the least that one call took, since a turn that somebody disturbed must not make later samples shorter."""

    runs: dict[str, Callable[[], object]]
    order: list[str]
    stopwatch: Stopwatch
    method: Method
    sleep: Callable[[float], object]
    failures: dict[str, Exception] = field(default_factory=dict)
    timed: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def round(self, index: int) -> dict[str, float]:
        """Everyone's turn, beginning with contender ``index``; seconds of one call each."""
        found: dict[str, float] = {}
        for name in [name for name in rotate(self.order, index) if name in self.runs]:
            try:
                found[name] = self._turn(name)
            except Exception as error:
                self.failures[name] = error
                del self.runs[name]
                self.timed.pop(name, None)
        return found

    def rounds_wanted(self) -> int:
        """So many that the contender that was timed for the least time so far gets ``min_seconds``."""
        method, shortest = self.method, min(self.timed.values(), default=math.inf)
        by_time = math.ceil(method.min_seconds / shortest) if shortest > 0 else method.most_rounds
        return max(method.rounds, min(by_time, method.most_rounds))

    def _turn(self, name: str) -> float:
        run, last = self.runs[name], self.seconds.get(name, math.inf)
        if self.method.pause:
            self.sleep(self.method.pause)
        if last < SHORT_CALL:
            self.stopwatch.time(run)
        calls = calls_for(last, self.method.sample_seconds)
        seconds = self.stopwatch.time_calls(run, calls)
        self.seconds[name], self.timed[name] = min(last, seconds), seconds * calls
        return seconds


def calls_for(seconds: float, sample_seconds: float) -> int:
    """How many calls of so many seconds make a sample of at least ``sample_seconds``."""
    return max(1, min(MOST_CALLS, math.ceil(sample_seconds / seconds))) if seconds > 0 else MOST_CALLS


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Nothing is collected inside but by ``gc.collect()``, which then looks at new objects only."""
    was_enabled = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
