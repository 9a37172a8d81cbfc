"""What changed between two results: of every measurement that both have, of every contender."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy

from fused_resnet.bench.report import noise
from fused_resnet.bench.report.changes import APPEARED, GONE, Bytes, Comparison, Speed, Status
from fused_resnet.bench.report.noise import FEWEST_ROUNDS, Difference, Verdict
from fused_resnet.bench.report.roles import is_ours, right_timings
from fused_resnet.bench.result import ABSENT, Measurement, Outcome, Result
from fused_resnet.bench.timer import Timing

SAME_BYTES = 0.01
"""Bytes that are counted and differ by less are the same."""
SAME_PEAK = 0.05
"""The same of peak memory, which is measured; and what differs by no more than the peak of any rival does is noise."""
LEAST_PEAK = 1 << 20
"""Bytes: peaks below it are as good as it. A runtime that keeps its memory between runs holds a page more or none."""
PEAK = "peak_bytes"
BYTES = {PEAK: "peak memory", "saved_bytes": "saved for backward", "moved_bytes": "moved"}
FEWEST_TOGETHER = 3
"""Measurements whose mean is judged beside each of them."""


@dataclass(frozen=True)
class _Cell:
    before: Measurement
    after: Measurement
    contender: str
    references: tuple[str, ...]
    found: Difference
    control: bool = False
    """Whether it should not have changed: a reference held against the others."""

    @property
    def level(self) -> str:
        return self.after.level

    @property
    def tells(self) -> bool:
        """Whether a change of it would say anything: of two rivals that moved apart nobody knows which one did."""
        return is_ours(self.contender) or len(self.references) != 1

    def speed(self, verdict: Verdict) -> Speed:
        before, after = (right_timings(entry)[self.contender].median for entry in (self.before, self.after))
        return Speed(self.after.title, self.contender, before, after, verdict, self.references)


def compare(before: Result, after: Result, threshold: float = 0.05, only: str | None = None) -> Comparison:
    """What changed from one result to the other.

    Args:
        threshold: changes of speed below this fraction are not told.
        only: a regular expression; where "MEASUREMENT: CONTENDER" does not contain it, nothing is compared.

    Raises:
        ValueError: they have no measurement in common, ``only`` is no regular expression, or finds nothing.
    """
    wanted = _pattern(only)
    first, second = ({entry.key: entry for entry in result.measurements} for result in (before, after))
    common = [(first[key], second[key]) for key in first if key in second]
    if not common:
        raise ValueError(f"the two results have no measurement in common: {_titles(before)}; and {_titles(after)}")
    found: list[_Cell] = []
    statuses: list[Status] = []
    changed_bytes: list[Bytes] = []
    too_few: list[str] = []
    compared = 0
    turned = _turned_rivals(common, threshold)
    peak_noise = _peak_noise(common)
    for one, other in common:
        references = tuple(name for name in _references(one, other) if name not in turned)
        for name in dict.fromkeys([*one.outcomes, *other.outcomes]):
            title = f"{other.title}: {name}"
            cell, rounds = _cell(one, other, name, references)
            if cell is not None:
                found.append(dataclasses.replace(cell, control=name in references and bool(cell.references)))
            if not wanted.search(title):
                continue
            compared += 1
            statuses += _status(one, other, name)
            changed_bytes += _bytes(one, other, name, peak_noise)
            if 0 < rounds < FEWEST_ROUNDS:
                too_few.append(title)
    if not compared:
        raise ValueError(f"nothing that both results have matches --only {only!r}")
    found = _steadied(found)
    spreads = _spreads(found)
    cells = [cell for cell in found if cell.tells and wanted.search(f"{cell.after.title}: {cell.contender}")]
    groups = _groups(cells)
    count = max(1, len(cells) + len(groups))

    def judged(difference: Difference, level: str, references: tuple[str, ...]) -> Verdict:
        spread = spreads[level] if references else max(spreads[level], noise.BETWEEN_RUNS_ALONE)
        return noise.judge(difference, spread, threshold, count)

    overall = []
    for title, group in groups:
        references = tuple(dict.fromkeys(name for cell in group for name in cell.references))
        verdict = judged(noise.together([cell.found for cell in group]), group[0].level, references)
        overall.append(Speed(title, group[0].contender, None, None, verdict, references))
    return Comparison(
        before,
        after,
        threshold,
        speeds=[cell.speed(judged(cell.found, cell.level, cell.references)) for cell in cells],
        overall=overall,
        statuses=statuses,
        bytes=changed_bytes,
        too_few_rounds=too_few,
        turned_rivals=turned,
        spreads=spreads,
        peak_noise=peak_noise,
        only_before=[entry.title for key, entry in first.items() if key not in second],
        only_after=[entry.title for key, entry in second.items() if key not in first],
    )


def _pattern(only: str | None) -> re.Pattern[str]:
    try:
        return re.compile(only or "")
    except re.error as error:
        raise ValueError(f"--only must be a regular expression; got {only!r}: {error}") from None


def _titles(result: Result) -> str:
    titles = [entry.title for entry in result.measurements]
    return "none" if not titles else ", ".join(titles[:3]) + (", ..." if len(titles) > 3 else "")


def _by_level(cells: Sequence[_Cell]) -> dict[str, list[_Cell]]:
    levels: dict[str, list[_Cell]] = {}
    for cell in cells:
        levels.setdefault(cell.level, []).append(cell)
    return levels


def _steadied(cells: Sequence[_Cell]) -> list[_Cell]:
    """Ops are noisier than models, so each level by itself."""
    return [
        dataclasses.replace(cell, found=found)
        for group in _by_level(cells).values()
        for cell, found in zip(group, noise.steadied([cell.found for cell in group]), strict=True)
    ]


def _spreads(cells: Sequence[_Cell]) -> dict[str, float]:
    """By level: the spread between runs of its controls; of all controls where it has too few."""
    everything = [cell.found for cell in cells if cell.control]
    spreads = {}
    for level, group in _by_level(cells).items():
        controls = [cell.found for cell in group if cell.control]
        spreads[level] = noise.between_runs(controls if len(controls) >= noise.FEWEST_CONTROLS else everything)
    return spreads


def _timings(one: Measurement, other: Measurement, name: str) -> tuple[Timing, Timing] | None:
    before, after = (right_timings(entry).get(name) for entry in (one, other))
    return None if before is None or after is None else (before, after)


def _references(one: Measurement, other: Measurement) -> tuple[str, ...]:
    """The contenders that this package does not run and that were right in both."""
    return tuple(name for name in right_timings(one) if not is_ours(name) and _timings(one, other, name) is not None)


def _turned_rivals(common: Sequence[tuple[Measurement, Measurement]], threshold: float) -> list[str]:
    """Who changed against the other rivals by more than the threshold in most measurements: a new version, perhaps.

    Where only two took part nobody can say which of them it was.
    """
    apart: dict[str, list[float]] = {}
    for one, other in common:
        changes = {}
        for name in _references(one, other):
            before, after = (numpy.log(right_timings(entry)[name].samples) for entry in (one, other))
            changes[name] = float(noise.middle(after) - noise.middle(before))
        if len(changes) > 2:
            usual = statistics.median(changes.values())
            for name, change in changes.items():
                apart.setdefault(name, []).append(change - usual)
    return [
        name
        for name, found in apart.items()
        if len(found) >= FEWEST_TOGETHER and abs(statistics.median(found)) > math.log1p(threshold)
    ]


def _cell(one: Measurement, other: Measurement, name: str, references: tuple[str, ...]) -> tuple[_Cell | None, int]:
    """(the comparison of one contender, None if it cannot be made; the rounds of the shorter run, 0 if it has none)."""
    pair = _timings(one, other, name)
    if pair is None:
        return None, 0
    rounds = [len(timing.samples) for timing in pair]
    if min(rounds) < FEWEST_ROUNDS:
        return None, min(rounds)
    known = {reference: _timings(one, other, reference) for reference in references if reference != name}
    beside = {
        reference: timings
        for reference, timings in known.items()
        if timings is not None and [len(timing.samples) for timing in timings] == rounds
    }
    before, after = noise.relative(pair, list(beside.values()))
    return _Cell(one, other, name, tuple(beside), noise.difference(before, after)), min(rounds)


def _groups(cells: Sequence[_Cell]) -> list[tuple[str, list[_Cell]]]:
    """(title, cells) of ours that are judged together: those of a contender at one level, in one mode and dtype."""
    groups: dict[tuple[str, ...], list[_Cell]] = {}
    for cell in cells:
        if is_ours(cell.contender):
            entry = cell.after
            groups.setdefault((entry.level, entry.mode, entry.dtype, cell.contender), []).append(cell)
    return [
        (f"all {len(group)} {level}s, {mode}, {dtype}", group)
        for (level, mode, dtype, _), group in groups.items()
        if len(group) >= FEWEST_TOGETHER
    ]


def _status(one: Measurement, other: Measurement, name: str) -> Iterator[Status]:
    before, after = one.outcomes.get(name), other.outcomes.get(name)
    statuses = (before.status if before else GONE, after.status if after else GONE)
    if statuses[0] == statuses[1] or set(statuses) == {GONE, ABSENT}:
        return
    if before is None:
        statuses = (APPEARED, statuses[1])
    reason = next((outcome.reason for outcome in (after, before) if outcome is not None and outcome.reason), None)
    yield Status(other.title, name, *statuses, reason)


def _bytes(one: Measurement, other: Measurement, name: str, peak_noise: float) -> Iterator[Bytes]:
    before, after = one.outcomes.get(name, Outcome(ABSENT)), other.outcomes.get(name, Outcome(ABSENT))
    for attribute, what in BYTES.items():
        was, now = getattr(before, attribute), getattr(after, attribute)
        apart, tolerance = (_peaks_apart, peak_noise) if attribute == PEAK else (_apart, SAME_BYTES)
        if was is not None and now is not None and apart(was, now) > tolerance:
            yield Bytes(other.title, name, what, was, now)


def _peak_noise(common: Sequence[tuple[Measurement, Measurement]]) -> float:
    found = [SAME_PEAK]
    for one, other in common:
        for name in _references(one, other):
            was, now = (entry.outcomes[name].peak_bytes for entry in (one, other))
            if was is not None and now is not None:
                found.append(_peaks_apart(was, now))
    return max(found)


def _peaks_apart(one: int, other: int) -> float:
    return _apart(max(one, LEAST_PEAK), max(other, LEAST_PEAK))


def _apart(one: int, other: int) -> float:
    """By what fraction the larger is larger."""
    low, high = sorted((one, other))
    return 0.0 if low == high else high / low - 1 if low > 0 else math.inf
