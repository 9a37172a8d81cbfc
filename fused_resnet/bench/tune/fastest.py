"""Which of some candidates is the fastest, and whether it really is faster than what would be chosen anyway."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy
import torch

from fused_resnet.bench.result import RIGHT
from fused_resnet.bench.suite.measure import Group
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.suite.task import Contender, Prepared, Task
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
    medians: dict[str, float] = {}
    with Group(task, clock) as group:
        for name, prepare in candidates.items():
            group.prepare(Contender(name, lambda task: [], lambda task, prepare=prepare: prepare()))  # type: ignore[misc]
        names, end = [name for name in group.ready if group.outcomes[name].status == RIGHT], clock() + seconds

        def measured(names: list[str], method: Method, share: float) -> dict[str, Timing]:
            timings = group.time(names, method, max(0.0, end - clock()) * share)
            medians.update({name: timing.median for name, timing in timings.items()})
            return timings

        if len(names) > SHORTLIST + 1:
            brief = measured(names, replace(BRIEF, rounds=min(method.rounds, BRIEF.rounds)), 0.3)
            best = sorted(brief, key=lambda name: brief[name].median)[:SHORTLIST]
            names = [name for name in brief if name in best or name == heuristic]
        timings = measured(names, method, 0.6)
        finals: dict[str, Timing] = {}
        fastest = min(timings, key=lambda name: timings[name].median, default=heuristic)
        if fastest != heuristic and heuristic in timings:
            finals = measured([heuristic, fastest], method, 1.0)
        dropped = {name: f"{o.status}: {o.reason}" for name, o in group.outcomes.items() if o.status != RIGHT}
    if not timings:
        raise NothingRan("; ".join(f"{name}: {reason}" for name, reason in dropped.items()))
    if heuristic not in timings:
        return Found(heuristic, fastest, medians, math.nan, dropped)
    if len(finals) == 2 and is_faster(finals[heuristic], finals[fastest]):
        ratio = statistics.median(_quotients(finals[heuristic], finals[fastest]))
        return Found(heuristic, fastest, medians, ratio, dropped)
    return Found(heuristic, heuristic, medians, 1.0, dropped)


def is_faster(before: Timing, after: Timing) -> bool:
    """True if ``after`` takes less time than ``before``, by `MARGIN` in nearly all of at least `FEWEST_ROUNDS` rounds
    that they were measured in together."""
    if len(before.samples) < FEWEST_ROUNDS:
        return False
    return float(numpy.percentile(_quotients(before, after), SURE)) > MARGIN


def _quotients(before: Timing, after: Timing) -> list[float]:
    return [a / b for a, b in zip(before.samples, after.samples, strict=True)]
