"""Which of some candidates is the fastest, and whether it really is faster than what would be chosen anyway."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy
import torch

from fused_resnet.bench.suite.measure import last_line
from fused_resnet.bench.suite.rounds import Method, measure_rounds
from fused_resnet.bench.suite.task import Prepared, Task
from fused_resnet.bench.timer import Timing

METHOD = Method(rounds=15, min_seconds=0.1, most_rounds=40, sample_seconds=0.002, pause=0.0)
SHORTLIST = 6
"""So many candidates are measured in full, beside what would be chosen anyway; more are timed briefly before."""
BRIEF = Method(rounds=3, min_seconds=0.0, most_rounds=3, sample_seconds=0.001, pause=0.0, warm_up=False)
FEWEST_ROUNDS = 5
"""With fewer nothing is said to be faster."""
MARGIN = 1.02
SURE = 20
"""Percent of the rounds that may show less than `MARGIN`."""


@dataclass(frozen=True)
class Found:
    """What came of one comparison."""

    heuristic: str
    """What would be chosen without a measurement."""
    winner: str
    """The fastest if it is faster beyond noise, else the heuristic's choice."""
    seconds: dict[str, float]
    """The median of each candidate, the heuristic's choice and the winner as they were held against each other."""
    ratio: float
    """How many times as long as the winner the heuristic's choice takes: 1 if it is the winner, NaN if it did not run
    or was wrong."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Candidates that gave wrong numbers or failed, and the reason."""


class NothingRan(RuntimeError):
    """Every candidate gave wrong numbers or failed; the message lists the reasons."""


def find_fastest(
    task: Task,
    candidates: Mapping[str, Callable[[], Prepared]],
    heuristic: str,
    method: Method = METHOD,
    *,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> Found:
    """Makes the candidates ready, drops those with wrong numbers, times the others in turns, and then the fastest once
    more against the heuristic's choice alone: of many candidates the fastest looks faster than it is.

    Args:
        task: what they do; on a GPU the L2 cache is flushed before each call.
        candidates: from a name to a function that makes it ready, or raises.
        heuristic: the name of what would be chosen anyway.
        seconds: for the rounds; a few are measured in any case.

    Raises:
        NothingRan: no candidate can run.
        RuntimeError: a CUDA graph is being captured.
    """
    if task.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("candidates cannot be measured while a CUDA graph is captured")
    ready: dict[str, Prepared] = {}
    dropped: dict[str, str] = {}
    medians: dict[str, float] = {}

    def measured(names: list[str], method: Method, share: float) -> dict[str, Timing]:
        runs, left = {name: ready[name].run for name in names}, max(0.0, end - clock()) * share
        rounds = measure_rounds(runs, task.device, method, flush_cache=True, seconds=left, clock=clock)
        dropped.update({name: f"failed: {last_line(error)}" for name, error in rounds.failures.items()})
        medians.update({name: timing.median for name, timing in rounds.timings.items()})
        return rounds.timings

    try:
        for name, prepare in candidates.items():
            if reason := _make_ready(task, name, prepare, ready):
                dropped[name] = reason
        names, end = list(ready), clock() + seconds
        if len(names) > SHORTLIST + 1:
            brief = measured(names, replace(BRIEF, rounds=min(method.rounds, BRIEF.rounds)), 0.3)
            best = sorted(brief, key=lambda name: brief[name].median)[:SHORTLIST]
            names = [name for name in brief if name in best or name == heuristic]
        timings = measured(names, method, 0.6)
        if not timings:
            raise NothingRan("; ".join(f"{name}: {reason}" for name, reason in dropped.items()))
        fastest = min(timings, key=lambda name: timings[name].median)
        if heuristic not in timings:
            return Found(heuristic, fastest, medians, math.nan, dropped)
        if fastest != heuristic:
            finals = measured([heuristic, fastest], method, 1.0)
            if len(finals) == 2 and is_faster(finals[heuristic], finals[fastest]):
                ratio = statistics.median(_quotients(finals[heuristic], finals[fastest]))
                return Found(heuristic, fastest, medians, ratio, dropped)
        return Found(heuristic, heuristic, medians, 1.0, dropped)
    finally:
        for prepared in ready.values():
            prepared.close()


def is_faster(before: Timing, after: Timing) -> bool:
    """True if ``after`` takes less time than ``before``, by `MARGIN` in nearly all of at least `FEWEST_ROUNDS` rounds
    that they were measured in together."""
    if len(before.samples) < FEWEST_ROUNDS:
        return False
    return float(numpy.percentile(_quotients(before, after), SURE)) > MARGIN


def _make_ready(task: Task, name: str, prepare: Callable[[], Prepared], ready: dict[str, Prepared]) -> str | None:
    """Puts it among the ``ready`` ones; the reason why not."""
    try:
        prepared = prepare()
    except Exception as error:
        return f"failed: {last_line(error)}"
    try:
        _, wrong = task.why_wrong(prepared)
    except Exception as error:
        wrong = last_line(error)
    if wrong is None:
        ready[name] = prepared
        return None
    prepared.close()
    return f"wrong: {wrong}"


def _quotients(before: Timing, after: Timing) -> list[float]:
    return [a / b for a, b in zip(before.samples, after.samples, strict=True)]
