"""How sure a change between two runs is.

What is compared is a contender's time over that of contenders which this package does not run, round by round: what
the machine does to all of them in a round, and its drift from run to run, cancels (`relative`). The middle of its
logarithms in one run is subtracted from that in the other: the mean of the rounds between the 20th and the 80th
percentile, which is as deaf to a few slow rounds as the median is, and steadier. The difference has two kinds of error:

- within a run: from blocks of rounds, since a busy neighbour stays for several; of a dozen rounds that is itself
  uncertain, so an error that is small beside those of the other measurements is raised (`steadied`);
- between runs: two processes place their memory differently, and the same code is a little faster in one of them,
  which no number of rounds shows. The contenders that this package does not run tell how much: each of them held
  against the others should not have changed at all (`between_runs`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy
from numpy.typing import NDArray

from fused_resnet.bench.timer import Timing

FEWEST_ROUNDS = 5
"""With fewer rounds nothing is said of a change."""
LASTING = 0.25
"""The noise of a busy machine has all durations: what lasts for a whole run is taken to be a quarter of the spread of
its rounds. Seen at a load of 7 on two cores, with a spread of 10 %: a third to two thirds; `between_runs` finds the
rest."""
FAMILY_ERROR = 0.05
"""The chance that any of the intervals of a comparison misses what it is of."""
ONE_SIDED = 0.9
"""How sure it has to be that a change is past the threshold."""
LEAST_BETWEEN_RUNS = 0.005
ASSUMED_BETWEEN_RUNS = 0.01
"""Where there are too few controls to tell."""
BETWEEN_RUNS_ALONE = 0.03
"""Of what is held against nobody: a machine is a few percent faster on one day than on another."""
FEWEST_CONTROLS = 8
CUT = 5
"""A fifth of the rounds is cut off at either end."""
MEDIAN_OF_CHI_SQUARED = 0.4549  # with one degree of freedom

Samples = NDArray[numpy.float64]


@dataclass(frozen=True)
class Difference:
    """The logarithm of how many times as long something took after as before."""

    value: float
    error: float
    """Its standard error by the rounds."""
    lasting: float
    """Beside it, by what lasts longer than a run."""
    freedom: int
    """Degrees of freedom of the error."""


@dataclass(frozen=True)
class Verdict:
    """A `Difference` held against a threshold, among ``comparisons`` others."""

    value: float
    low: float
    high: float
    """The interval of it, wide enough that all of a comparison's hold together."""
    changed: bool
    smallest: float
    """The smallest difference that would have been told: a change of less is not seen in this much noise."""


def relative(own: tuple[Timing, Timing], references: Sequence[tuple[Timing, Timing]]) -> tuple[Samples, Samples]:
    """Logarithms of the seconds of each round, before and after, over those of the references in the same round.

    Of several references the middle one counts, each held against its own time in both runs: neither a few slow rounds
    of one of them nor one that changed moves it. Of two it is their geometric mean.

    Raises:
        ValueError: a reference has another number of rounds.
    """
    logarithms = [numpy.log(timing.samples) for timing in own]
    beside: list[list[Samples]] = [[], []]
    for pair in references:
        theirs = [numpy.log(timing.samples) for timing in pair]
        level = (middle(theirs[0]) + middle(theirs[1])) / 2
        for side in (0, 1):
            if len(theirs[side]) != len(logarithms[side]):
                raise ValueError(
                    f"references must have as many rounds, {len(logarithms[side])}; got one of {len(theirs[side])}"
                )
            beside[side].append(theirs[side] - level)
    if not references:
        return logarithms[0], logarithms[1]
    before, after = (logarithms[side] - numpy.median(beside[side], axis=0) for side in (0, 1))
    return before, after


def difference(before: Samples, after: Samples) -> Difference:
    """Of the middles of two runs' relative times, each in the order of its rounds, at least `FEWEST_ROUNDS` of them."""
    for samples in (before, after):
        if len(samples) < FEWEST_ROUNDS:
            raise ValueError(f"takes at least {FEWEST_ROUNDS} rounds of each run; got {len(samples)}")
    error, lasting = (math.hypot(*pair) for pair in zip(*map(_errors_of_middle, (before, after)), strict=True))
    value = float(middle(after) - middle(before))
    return Difference(value, error, lasting, len(before) + len(after) - 2)


def middle(samples: Samples) -> Samples:
    """The mean along the last dimension without its lowest and its highest fifth."""
    count = samples.shape[-1]
    cut = count // CUT
    return numpy.sort(samples, axis=-1)[..., cut : count - cut].mean(axis=-1)


def steadied(found: Sequence[Difference]) -> list[Difference]:
    """The same with errors that are not small by chance: each at least the mean, in squares, of its own and of the
    typical one for as many rounds."""
    if not found:
        return []
    typical = numpy.median([each.error**2 * each.freedom for each in found])
    return [
        dataclasses.replace(each, error=max(each.error, math.sqrt((each.error**2 + float(typical) / each.freedom) / 2)))
        for each in found
    ]


def between_runs(controls: Sequence[Difference]) -> float:
    """The standard deviation from run to run of what did not change, beyond what the rounds show.

    Such that half of the controls lie within 0.67 standard errors: a few that did change do not move it.
    """
    if len(controls) < FEWEST_CONTROLS:
        return ASSUMED_BETWEEN_RUNS
    values, errors = (
        numpy.array(each) for each in zip(*((c.value, math.hypot(c.error, c.lasting)) for c in controls), strict=True)
    )

    def too_small(spread: float) -> bool:
        variances = errors**2 + spread**2
        return bool(numpy.median(values**2 / variances) > MEDIAN_OF_CHI_SQUARED)

    low, high = LEAST_BETWEEN_RUNS, 1.0
    if not too_small(low):
        return low
    for _ in range(40):
        guess = (low + high) / 2
        low, high = (guess, high) if too_small(guess) else (low, guess)
    return high


def judge(found: Difference, spread: float, threshold: float, comparisons: int) -> Verdict:
    """Whether it is a change.

    It is one if its interval excludes none, and it is past the threshold with nine chances in ten.

    Args:
        spread: from `between_runs`.
        threshold: such as 0.05 for times that are 1.05 times as long, or as short.
        comparisons: how many are judged together.
    """
    error, bar = math.hypot(found.error, found.lasting, spread), math.log1p(threshold)
    wide = student(1 - FAMILY_ERROR / (2 * comparisons), found.freedom) * error
    smallest = max(wide, bar + student(ONE_SIDED, found.freedom) * error)
    return Verdict(found.value, found.value - wide, found.value + wide, abs(found.value) > smallest, smallest)


def together(found: Sequence[Difference]) -> Difference:
    """The mean of several differences: a change too small to be seen in each may be seen in all.

    What differs from run to run may do so alike in all of them, and does not become less.
    """
    error = math.sqrt(sum(each.error**2 for each in found)) / len(found)
    value, lasting = (sum(getattr(each, name) for each in found) / len(found) for name in ("value", "lasting"))
    return Difference(value, error, lasting, min(each.freedom for each in found))


def student(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution, by its expansion about the normal one; for freedom of 8 and more it is
    a few percent low at most out where one in ten thousand lies, and nearly exact further in."""
    z, n = NormalDist().inv_cdf(probability), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def _errors_of_middle(samples: Samples) -> tuple[float, float]:
    """(the standard error of the trimmed mean, what `LASTING` adds to it).

    From the samples with those that it leaves out moved to the edge of those that it keeps (Tukey and McLaughlin); and
    from the means of neighbouring rounds, as a block bootstrap drawn for ever would, since neighbours are alike.
    """
    count, cut = len(samples), len(samples) // CUT
    ordered = numpy.sort(samples)
    kept = numpy.clip(samples, ordered[cut], ordered[count - cut - 1])
    length = max(2, round(count ** (1 / 3)))
    blocks = numpy.mean([numpy.roll(kept, shift) for shift in range(length)], axis=0)
    scale = count / (count - 2 * cut)
    return float(blocks.std()) * math.sqrt(length / (count - length)) * scale, LASTING * float(kept.std()) * scale
