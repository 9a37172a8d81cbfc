"""Asking one question after the other until all are answered or no time is left; every answer is kept at once."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fused_resnet.bench.suite.measure import last_line
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.tune.fastest import METHOD, Found, NothingRan, find_fastest
from fused_resnet.bench.tune.questions import Candidate, Question
from fused_resnet.ops.plan import measured_plan
from fused_resnet.ops.plan.plan_file import Key
from fused_resnet.ops.route.reasons import unavailable

SECONDS_PER_QUESTION = 20.0
"""For the rounds of one, at most; a few rounds are measured in any case."""


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
        key, name, usual = winner.tile
        tiles[key] = name
        answers.insert(0, (measured_plan.TILES, key, name, usual))
    for op, key, answer, heuristic in answers:
        where: Any = {"device": question.task.device, "path": path}
        measured_plan.record(op, key, answer, found.seconds, heuristic=heuristic, **where)
