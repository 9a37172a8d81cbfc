"""What changed between two results: of every measurement that both have, of every contender."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy

from fused_resnet.bench.report import noise
from fused_resnet.bench.report.figures import is_ours, right_timings
from fused_resnet.bench.report.noise import FEWEST_ROUNDS, Difference, Verdict
from fused_resnet.bench.result import ABSENT, FAILED, RIGHT, WRONG, Measurement, Outcome, Result
from fused_resnet.bench.timer import Timing

FEWEST_TOGETHER = 3
"""Measurements whose mean is judged beside each of them."""
SLOWER, FASTER, APPEARED, GONE = "slower", "faster", "appeared", "gone"


@dataclass(frozen=True)
class Speed:
    """How long a contender took before and after, relative to the references; median seconds as measured, None of a
    mean of several measurements."""

    measurement: str
    contender: str
    before: float | None
    after: float | None
    verdict: Verdict
    references: tuple[str, ...]

    @property
    def kind(self) -> str | None:
        """`SLOWER`, `FASTER`, or None if nothing is seen beyond noise."""
        return None if not self.verdict.changed else SLOWER if self.verdict.value > 0 else FASTER

    @property
    def is_loss(self) -> bool:
        """Only of contenders that this package runs: the others are what is measured by."""
        return self.kind == SLOWER and is_ours(self.contender)


@dataclass(frozen=True)
class Status:
    """A contender whose status is another: before and after are those of ``result.Outcome``, `GONE` or `APPEARED`."""

    measurement: str
    contender: str
    before: str
    after: str
    reason: str | None

    @property
    def is_loss(self) -> bool:
        return self.before == RIGHT and self.after in (WRONG, FAILED)


@dataclass
class Comparison:
    """All of it. Everything compared is in ``speeds``, changed or not; ``overall`` has the means of ours over several
    measurements; ``only_before``, ``only_after`` and ``too_few_rounds`` are titles."""

    before: Result
    after: Result
    threshold: float
    turned_rivals: list[str]
    """Who changed against the other rivals throughout, and was not measured by."""
    only_before: list[str]
    only_after: list[str]
    speeds: list[Speed] = field(default_factory=list)
    overall: list[Speed] = field(default_factory=list)
    statuses: list[Status] = field(default_factory=list)
    too_few_rounds: list[str] = field(default_factory=list)
    spreads: dict[str, float] = field(default_factory=dict)
    """By level of measurement: the standard deviation between runs that was reckoned with."""

    @property
    def losses(self) -> list[Speed | Status]:
        changes: list[Speed | Status] = [*self.statuses, *self.overall, *self.speeds]
        return [change for change in changes if change.is_loss]


@dataclass(frozen=True)
class _Pair:
    """A measurement of both results."""

    before: Measurement
    after: Measurement

    def timings(self, name: str) -> tuple[Timing, Timing] | None:
        before, after = (right_timings(entry).get(name) for entry in (self.before, self.after))
        return None if before is None or after is None else (before, after)

    def rounds(self, name: str) -> list[int]:
        return [len(timing.samples) for timing in self.timings(name) or ()]

    @property
    def references(self) -> list[str]:
        """The contenders that this package does not run and that were right in both."""
        return [name for name in self.before.outcomes if not is_ours(name) and self.timings(name) is not None]

    def outcomes(self, name: str) -> tuple[Outcome, Outcome]:
        gone = Outcome(GONE)
        return self.before.outcomes.get(name, gone), self.after.outcomes.get(name, gone)


@dataclass(frozen=True)
class _Cell:
    pair: _Pair
    contender: str
    references: tuple[str, ...]
    found: Difference
    is_control: bool
    """Whether it should not have changed: a reference held against the others."""

    @property
    def tells(self) -> bool:
        """Whether a change of it would say anything: of two rivals that moved apart nobody knows which one did."""
        return is_ours(self.contender) or len(self.references) != 1


def compare(before: Result, after: Result, threshold: float = 0.05) -> Comparison:
    """What changed from one result to the other; changes of speed below the threshold, a fraction, are not told.
    ValueError if they have no measurement in common."""
    first, second = ({entry.key: entry for entry in result.measurements} for result in (before, after))
    common = [_Pair(first[key], second[key]) for key in first if key in second]
    if not common:
        raise ValueError(f"the two results have no measurement in common: {_titles(before)}; and {_titles(after)}")
    only_before, only_after = (
        [entry.title for key, entry in one.items() if key not in other]
        for one, other in ((first, second), (second, first))
    )
    found = Comparison(before, after, threshold, _turned_rivals(common, threshold), only_before, only_after)
    cells: list[_Cell] = []
    for pair in common:
        references = [name for name in pair.references if name not in found.turned_rivals]
        for name in dict.fromkeys([*pair.before.outcomes, *pair.after.outcomes]):
            rounds, timings = pair.rounds(name), pair.timings(name)
            if timings is not None and min(rounds) >= FEWEST_ROUNDS:
                others = [other for other in references if other != name and pair.rounds(other) == rounds]
                beside = [both for other in others if (both := pair.timings(other)) is not None]
                difference = noise.difference(*noise.relative(timings, beside))
                cells.append(_Cell(pair, name, tuple(others), difference, name in references and bool(others)))
            found.statuses += _status(pair, name)
            found.too_few_rounds += [f"{pair.after.title}: {name}"] if rounds and min(rounds) < FEWEST_ROUNDS else []
    _judge(found, cells)
    return found


def _judge(comparison: Comparison, cells: Sequence[_Cell]) -> None:
    """Each cell, and of ours those of a contender at one level, in one mode and dtype together. Ops are noisier than
    models, so errors are steadied, and the spread between runs is learnt from the controls, of each level by itself."""
    told: list[_Cell] = []
    controls = [cell.found for cell in cells if cell.is_control]
    for level in dict.fromkeys(cell.pair.after.level for cell in cells):
        group = [cell for cell in cells if cell.pair.after.level == level]
        steadied = noise.steadied([cell.found for cell in group])
        group = [dataclasses.replace(cell, found=found) for cell, found in zip(group, steadied, strict=True)]
        own = [cell.found for cell in group if cell.is_control]
        comparison.spreads[level] = noise.between_runs(own if len(own) >= noise.FEWEST_CONTROLS else controls)
        told += [cell for cell in group if cell.tells]
    groups: dict[tuple[str, ...], list[_Cell]] = {}
    for cell in filter(lambda cell: is_ours(cell.contender), told):
        entry = cell.pair.after
        groups.setdefault((entry.level, entry.mode, entry.dtype, cell.contender), []).append(cell)
    groups = {key: group for key, group in groups.items() if len(group) >= FEWEST_TOGETHER}
    count = max(1, len(told) + len(groups))

    def judged(difference: Difference, level: str, references: tuple[str, ...]) -> Verdict:
        spread = max(comparison.spreads[level], 0.0 if references else noise.BETWEEN_RUNS_ALONE)
        return noise.judge(difference, spread, comparison.threshold, count)

    for cell in told:
        was, now = (timing.median for timing in cell.pair.timings(cell.contender) or ())
        verdict, title = judged(cell.found, cell.pair.after.level, cell.references), cell.pair.after.title
        comparison.speeds.append(Speed(title, cell.contender, was, now, verdict, cell.references))
    for (level, mode, dtype, name), group in groups.items():
        references = tuple(dict.fromkeys(name for cell in group for name in cell.references))
        verdict = judged(noise.together([cell.found for cell in group]), level, references)
        title = f"all {len(group)} {level}s, {mode}, {dtype}"
        comparison.overall.append(Speed(title, name, None, None, verdict, references))


def _titles(result: Result) -> str:
    titles = [entry.title for entry in result.measurements]
    return ", ".join(titles[:3]) + (", ..." if len(titles) > 3 else "") or "none"


def _turned_rivals(common: Sequence[_Pair], threshold: float) -> list[str]:
    """Who changed against the other rivals by more than the threshold in most measurements: a new version, perhaps.

    Where only two took part nobody can say which of them it was.
    """
    apart: dict[str, list[float]] = {}
    for pair in common:
        changes = {}
        for name in pair.references:
            before, after = (noise.middle(numpy.log(timing.samples)) for timing in pair.timings(name) or ())
            changes[name] = float(after - before)
        for name, change in changes.items() if len(changes) > 2 else ():
            apart.setdefault(name, []).append(change - statistics.median(changes.values()))
    bar = math.log1p(threshold)
    return [n for n, found in apart.items() if len(found) >= FEWEST_TOGETHER and abs(statistics.median(found)) > bar]


def _status(pair: _Pair, name: str) -> Iterator[Status]:
    before, after = pair.outcomes(name)
    if before.status != after.status and {before.status, after.status} != {GONE, ABSENT}:
        was = APPEARED if before.status == GONE else before.status
        yield Status(pair.after.title, name, was, after.status, after.reason or before.reason)
