"""Which of some candidates is the fastest, and whether it really is faster than what would be chosen anyway; of one
question after the other, until all are answered or no time is left. Every answer is kept at once."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from fused_resnet.bench.result import RIGHT
from fused_resnet.bench.suite.measure import Group, last_line
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.suite.task import Contender, Prepared, Task
from fused_resnet.bench.timer import Timing
from fused_resnet.bench.tune.questions import Candidate, Question
from fused_resnet.ops.plan import measured_plan
from fused_resnet.ops.plan.plan_file import Key
from fused_resnet.ops.route.reasons import unavailable

METHOD = Method(rounds=15, min_seconds=0.1, most_rounds=40, sample_seconds=0.002, pause=0.0)
SHORTLIST = 6
"""So many candidates are measured in full, beside what would be chosen anyway; more are timed briefly before."""
BRIEF = Method(rounds=3, min_seconds=0.0, most_rounds=3, sample_seconds=0.001, pause=0.0, warm_up=False)
FEWEST_ROUNDS = 5
"""With fewer nothing is said to be faster."""
MARGIN = 1.02
SURE = 20
"""Percent of the rounds that may show less than `MARGIN`."""
SECONDS_PER_QUESTION = 20.0
"""For the rounds of one, at most; a few rounds are measured in any case."""


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


@dataclass
class Outcome:
    """Of a whole run.

    Attributes:
        found: the questions that were answered, in order.
        failed: by title, why nothing was found out.
        left: titles of those that there was no time for.
        interrupted: it was ended by Ctrl-C.
    """

    found: list[tuple[Question, Found]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    interrupted: bool = False


def tune(
    questions: Sequence[Question],
    tiles: dict[Key, str],
    path: Path | None,
    *,
    method: Method = METHOD,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    begin: Callable[[Question], object] = lambda question: None,
    finish: Callable[[Question, Found | None], object] = lambda question, found: None,
) -> Outcome:
    """Measures, and records what is found; ``tiles`` are those of the answers so far.

    What was measured before has no say in it: heuristics are those that are written. Ctrl-C ends it, and what was
    measured is kept."""
    outcome, end, queue = Outcome(), clock() + seconds, deque(questions)
    slowest: dict[str, float] = {}
    try:
        with measured_plan.ignoring_measured_plan():
            while queue:
                question, start = queue[0], clock()
                if start + slowest.get(question.op, 0.0) >= end:
                    outcome.left.append(question.title)
                else:
                    begin(question)
                    answer = _answer(question, method, min(SECONDS_PER_QUESTION, end - start), outcome)
                    if answer is not None:
                        outcome.found.append((question, answer[0]))
                        _keep(question, *answer, tiles, path)
                    finish(question, None if answer is None else answer[0])
                    slowest[question.op] = max(slowest.get(question.op, 0.0), clock() - start)
                queue.popleft()
    except KeyboardInterrupt:
        outcome.interrupted = True
        outcome.left += [question.title for question in queue]
    finally:
        if not unavailable("triton"):
            measured_plan.choose_tiles_by(None)
    return outcome


def _answer(question: Question, method: Method, seconds: float, outcome: Outcome) -> tuple[Found, Candidate] | None:
    try:
        usual, candidates = question.ask()
        prepare = {name: candidate.prepare for name, candidate in candidates.items()}
        found = find_fastest(question.task, prepare, usual, method, seconds=seconds)
        return found, candidates[found.winner]
    except NothingRan as error:
        outcome.failed[question.title] = str(error)
    except Exception as error:  # of one shape; the others go on
        outcome.failed[question.title] = last_line(error)
    finally:
        question.task.release()
    return None


def _keep(question: Question, found: Found, winner: Candidate, tiles: dict[Key, str], path: Path | None) -> None:
    """The question's own entry last: a rerun that finds it would pass over its tile."""
    answers = [(question.op, question.key, winner.answer, found.heuristic)]
    if winner.tile is not None:
        asked, name = winner.tile
        tiles[asked.plan_key] = name
        answers.insert(0, (measured_plan.TILES, asked.plan_key, name, asked.usual))
    for op, key, answer, heuristic in answers:
        where: Any = {"device": question.task.device, "path": path}
        measured_plan.record(op, key, answer, found.seconds, heuristic=heuristic, **where)
