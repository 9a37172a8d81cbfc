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
from typing import Any

import numpy
import scipy
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
CUT = 0.2
"""Of the rounds, cut off at either end."""

Samples = NDArray[numpy.float64]
Pair = tuple[Timing, Timing]


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
    """A `Difference` held against a threshold, among others."""

    value: float
    low: float
    high: float
    """The interval of it, wide enough that all of a comparison's hold together."""
    changed: bool
    smallest: float
    """The smallest difference that would have been told: a change of less is not seen in this much noise."""


def relative(own: Pair, references: Sequence[Pair]) -> list[Samples]:
    """Logarithms of the seconds of each round, before and after, over those of the references in the same round.

    Of several references the middle one counts, each held against its own time in both runs: neither a few slow rounds
    of one of them nor one that changed moves it. Of two it is their geometric mean.
    """
    logarithms = [numpy.log(timing.samples) for timing in own]
    if not references:
        return logarithms
    beside = [[numpy.log(timing.samples) for timing in pair] for pair in references]
    levels = [(middle(before) + middle(after)) / 2 for before, after in beside]
    shared = ([theirs[side] - level for theirs, level in zip(beside, levels, strict=True)] for side in (0, 1))
    return [mine - numpy.median(others, axis=0) for mine, others in zip(logarithms, shared, strict=True)]


def difference(before: Samples, after: Samples) -> Difference:
    """Of the middles of two runs' relative times, each in the order of its rounds, at least `FEWEST_ROUNDS` of them."""
    error, lasting = (math.hypot(*pair) for pair in zip(*map(_errors_of_middle, (before, after)), strict=True))
    return Difference(float(middle(after) - middle(before)), error, lasting, len(before) + len(after) - 2)


def middle(samples: Samples) -> Any:
    """The mean along the last dimension without its lowest and its highest fifth."""
    return scipy.stats.trim_mean(samples, CUT, axis=-1)


def steadied(found: Sequence[Difference]) -> list[Difference]:
    """The same with errors that are not small by chance: each at least the mean, in squares, of its own and of the
    typical one for as many rounds."""
    typical = float(numpy.median([each.error**2 * each.freedom for each in found]))

    def raised(each: Difference) -> float:
        return max(each.error, math.sqrt((each.error**2 + typical / each.freedom) / 2))

    return [dataclasses.replace(each, error=raised(each)) for each in found]


def between_runs(controls: Sequence[Difference]) -> float:
    """The standard deviation from run to run of what did not change, beyond what the rounds show.

    Such that half of the controls lie within 0.67 standard errors: a few that did change do not move it.
    """
    if len(controls) < FEWEST_CONTROLS:
        return ASSUMED_BETWEEN_RUNS
    values = numpy.array([control.value for control in controls])
    variances = numpy.array([control.error**2 + control.lasting**2 for control in controls])

    def excess(spread: float) -> float:
        return float(numpy.median(values**2 / (variances + spread**2)) - scipy.stats.chi2.median(1))

    if excess(LEAST_BETWEEN_RUNS) <= 0:
        return LEAST_BETWEEN_RUNS
    return scipy.optimize.brentq(excess, LEAST_BETWEEN_RUNS, 2 * numpy.abs(values).max())


def judge(found: Difference, spread: float, threshold: float, comparisons: int) -> Verdict:
    """Whether it is a change, among so many ``comparisons``: its interval excludes none, and it is past the
    threshold (0.05: 1.05 times as long, or as short) with nine chances in ten; ``spread`` is that between runs."""
    error, chances = math.hypot(found.error, found.lasting, spread), (ONE_SIDED, 1 - FAMILY_ERROR / (2 * comparisons))
    sure, wide = (float(scipy.stats.t.ppf(chance, found.freedom)) * error for chance in chances)
    smallest = max(wide, math.log1p(threshold) + sure)
    return Verdict(found.value, found.value - wide, found.value + wide, abs(found.value) > smallest, smallest)


def together(found: Sequence[Difference]) -> Difference:
    """The mean of several differences: a change too small to be seen in each may be seen in all.

    What differs from run to run may do so alike in all of them, and does not become less.
    """
    error = math.sqrt(sum(each.error**2 for each in found)) / len(found)
    value, lasting = (sum(getattr(each, name) for each in found) / len(found) for name in ("value", "lasting"))
    return Difference(value, error, lasting, min(each.freedom for each in found))


def _errors_of_middle(samples: Samples) -> tuple[float, float]:
    """(the standard error of the trimmed mean, what `LASTING` adds to it).

    From the samples with those that it leaves out moved to the edge of those that it keeps (Tukey and McLaughlin); and
    from the means of neighbouring rounds, as a block bootstrap drawn for ever would, since neighbours are alike.
    """
    count, kept = len(samples), numpy.asarray(scipy.stats.mstats.winsorize(samples, (CUT, CUT)))
    length = max(2, round(count ** (1 / 3)))
    blocks = numpy.mean([numpy.roll(kept, shift) for shift in range(length)], axis=0)
    scale = count / (count - 2 * int(CUT * count))
    return float(blocks.std()) * math.sqrt(length / (count - length)) * scale, LASTING * float(kept.std()) * scale
