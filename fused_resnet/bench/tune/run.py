"""Asking one question after the other until all are answered or no time is left; every answer is kept at once."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fused_resnet.bench.suite.measure import last_line
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.tune.fastest import METHOD, Found, NothingRan, find_fastest
from fused_resnet.bench.tune.subject import Subject
from fused_resnet.ops.plan import measured_plan
from fused_resnet.ops.plan.plan_file import Key
from fused_resnet.ops.route.reasons import unavailable

SECONDS_PER_SUBJECT = 20.0
"""For the rounds of one, at most; a few rounds are measured in any case."""


@dataclass
class Outcome:
    """Of a whole run.

    Attributes:
        found: the subjects that were measured, in order.
        failed: by title, why nothing was found out about a subject.
        left: titles of those that there was no time for.
        interrupted: it was ended by Ctrl-C.
    """

    found: list[tuple[Subject, Found]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    interrupted: bool = False


def unknown(subjects: Sequence[Subject], known: Collection[tuple[str, Key]]) -> list[int]:
    """The places of those that a plan with these ops and keys has no answer for."""
    return [index for index, subject in enumerate(subjects) if (subject.op, subject.key) not in known]


def tune(
    subjects: Sequence[Subject],
    tiles: dict[Key, str],
    path: Path | None,
    *,
    method: Method = METHOD,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    begin: Callable[[Subject], object] = lambda subject: None,
    finish: Callable[[Subject, Found | None], object] = lambda subject, found: None,
) -> Outcome:
    """Measures the subjects and records what is found.

    What was measured before has no say in it: heuristics are those that are written. Ctrl-C ends it, and what was
    measured is kept."""
    outcome, end, queue = Outcome(), clock() + seconds, deque(subjects)
    slowest: dict[str, float] = {}
    try:
        with measured_plan.ignoring_measured_plan():
            while queue:
                subject, start = queue[0], clock()
                if start + slowest.get(subject.op, 0.0) >= end:
                    outcome.left.append(subject.title)
                else:
                    begin(subject)
                    found = _measure(subject, method, min(SECONDS_PER_SUBJECT, end - start), outcome)
                    if found is not None:
                        _keep(subject, found, tiles, path)
                        outcome.found.append((subject, found))
                    finish(subject, found)
                    slowest[subject.op] = max(slowest.get(subject.op, 0.0), clock() - start)
                queue.popleft()
    except KeyboardInterrupt:
        outcome.interrupted = True
        outcome.left += [subject.title for subject in queue]
    finally:
        if not unavailable("triton"):
            measured_plan.choose_tiles_by(None)
    return outcome


def _measure(subject: Subject, method: Method, seconds: float, outcome: Outcome) -> Found | None:
    try:
        candidates, heuristic = subject.candidates(), subject.heuristic()
        return find_fastest(candidates, heuristic, subject.why_wrong, subject.device, method, seconds=seconds)
    except NothingRan as error:
        outcome.failed[subject.title] = str(error)
    except Exception as error:  # of one shape; the others go on
        outcome.failed[subject.title] = last_line(error)
    finally:
        subject.release()
    return None


def _keep(subject: Subject, found: Found, tiles: dict[Key, str], path: Path | None) -> None:
    """The subject's own entry last: a rerun that finds it would pass over the others."""
    for entry in reversed(subject.entries(found)):
        if entry.op == measured_plan.TILES:
            tiles[entry.key] = entry.winner
        measured_plan.record(
            *(entry.op, entry.key, entry.winner, entry.seconds),
            heuristic=entry.heuristic,
            device=subject.device,
            path=path,
        )
