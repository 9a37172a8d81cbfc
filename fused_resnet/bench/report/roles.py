"""Who is who among the contenders of a result: a file holds names only.

Plain eager is what everything is held against; a rival is whatever this package does not run; ours is the rest.
"""

from __future__ import annotations

from fused_resnet.bench.result import RIGHT, Measurement
from fused_resnet.bench.timer import Timing, ratio

PLAIN_EAGER = ("eager", "eager NCHW", "eager channels_last")
"""PyTorch as it comes, in either memory format; not under a CUDA graph, not compiled."""
OURS = ("ours", "fused", "frozen")
"""The first word of the name of a contender that this package runs."""


def is_ours(name: str) -> bool:
    """Whether this package runs it."""
    return name.replace(",", " ").split()[:1] in [[word] for word in OURS]


def right_timings(measurement: Measurement) -> dict[str, Timing]:
    """The timings of the contenders whose numbers were right: only these are compared."""
    return {
        name: outcome.timing
        for name, outcome in measurement.outcomes.items()
        if outcome.status == RIGHT and outcome.timing is not None
    }


def best_eager(measurement: Measurement) -> str | None:
    """The faster of the plain eager contenders by its median; None if none was right."""
    return _fastest({name: t for name, t in right_timings(measurement).items() if name in PLAIN_EAGER})


def best_rival(measurement: Measurement) -> str | None:
    """The fastest contender that this package does not run, eager included; None if none was right."""
    return _fastest({name: t for name, t in right_timings(measurement).items() if not is_ours(name)})


def best_of_ours(measurement: Measurement) -> str | None:
    """The fastest contender that this package runs; None if none was right."""
    return _fastest({name: t for name, t in right_timings(measurement).items() if is_ours(name)})


def times_faster(measurement: Measurement, name: str, than: str) -> float:
    """How many times as fast ``name`` was as ``than``: the median of the quotients of each round.

    Where one of them has fewer rounds than the other, the quotient of their medians.
    """
    timings = right_timings(measurement)
    ours, theirs = timings[name], timings[than]
    if len(ours.samples) != len(theirs.samples):
        return theirs.median / ours.median
    return ratio(theirs, ours)


def _fastest(timings: dict[str, Timing]) -> str | None:
    return min(timings, key=lambda name: timings[name].median, default=None)
