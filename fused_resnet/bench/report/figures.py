"""Who is who among the contenders of a result, what follows from an outcome, and numbers as a reader wants them.

A file holds names only. Plain eager is what everything is held against; a rival is whatever this package does not run;
ours is the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fused_resnet.bench.result import OP, RIGHT, Measurement
from fused_resnet.bench.roofline import Ceilings
from fused_resnet.bench.timer import Timing, ratio

PLAIN_EAGER = ("eager", "eager NCHW", "eager channels_last")
"""PyTorch as it comes, in either memory format; not under a CUDA graph, not compiled."""
OURS = ("ours", "fused", "frozen")
"""The first word of the name of a contender that this package runs."""
NOTHING = "-"


def is_ours(name: str) -> bool:
    """Whether this package runs it."""
    return (name.replace(",", " ").split() or [""])[0] in OURS


def right_timings(measurement: Measurement) -> dict[str, Timing]:
    """The timings of the contenders whose numbers were right: only these are compared."""
    outcomes = measurement.outcomes.items()
    return {name: o.timing for name, o in outcomes if o.status == RIGHT and o.timing is not None}


def best_eager(measurement: Measurement) -> str | None:
    """The faster of the plain eager contenders by its median; None if none was right."""
    return _fastest(measurement, PLAIN_EAGER)


def best_rival(measurement: Measurement) -> str | None:
    """The fastest contender that this package does not run, eager included; None if none was right."""
    return _fastest(measurement, [name for name in measurement.outcomes if not is_ours(name)])


def best_of_ours(measurement: Measurement) -> str | None:
    """The fastest contender that this package runs; None if none was right."""
    return _fastest(measurement, [name for name in measurement.outcomes if is_ours(name)])


def _fastest(measurement: Measurement, names: Iterable[str]) -> str | None:
    timings = right_timings(measurement)
    return min((n for n in names if n in timings), key=lambda name: timings[name].median, default=None)


def times_faster(measurement: Measurement, name: str, than: str) -> float:
    """How many times as fast ``name`` was as ``than``: the median of the quotients of each round.

    Where one of them has fewer rounds than the other, the quotient of their medians.
    """
    timings = right_timings(measurement)
    ours, theirs = timings[name], timings[than]
    if len(ours.samples) != len(theirs.samples):
        return theirs.median / ours.median
    return ratio(theirs, ours)


@dataclass(frozen=True)
class Figures:
    """Numbers in SI units; None where they cannot be formed, and all None of a contender that has no timing.

    Of a contender whose numbers were wrong there are rates, but no comparison with eager and no part of the roofline.
    """

    images_per_second: float | None = None
    """None of an op."""
    times_best_eager: float | None = None
    """How many times as fast as the faster plain eager."""
    bytes_per_second: float | None = None
    """Of the bytes that it is counted to move itself."""
    flop_per_second: float | None = None
    roofline_fraction: float | None = None
    """The least time that the task can take under the measured ceilings, over the time it took."""
    flop_per_byte: float | None = None


def figures(measurement: Measurement, name: str, ceilings: Mapping[str, Mapping[str, float]]) -> Figures:
    """The figures of contender ``name``; ``ceilings`` as in ``Result.ceilings``."""
    outcome, ceiling = measurement.outcomes[name], ceilings.get(measurement.dtype)
    if outcome.timing is None:
        return Figures()
    seconds, flop, moved = outcome.timing.median, measurement.flop, outcome.moved_bytes
    eager, least = best_eager(measurement), measurement.least_bytes
    is_right, is_counted = outcome.status == RIGHT, flop is not None or least is not None
    fraction = None
    if ceiling is not None and is_right and is_counted:
        fraction = Ceilings(**ceiling).fraction(seconds, least or 0, flop or 0)
    return Figures(
        images_per_second=None if measurement.level == OP else measurement.batch_size / seconds,
        times_best_eager=times_faster(measurement, name, eager) if eager is not None and is_right else None,
        bytes_per_second=None if moved is None else moved / seconds,
        flop_per_second=flop / seconds if flop else None,
        roofline_fraction=fraction,
        flop_per_byte=flop / moved if flop and moved else None,
    )


def three_digits(value: float) -> str:
    """Such as 0.0123, 1.23, 12.3, 123, 1234."""
    return f"{value:.{_decimals(value)}f}" if math.isfinite(value) else f"{value:g}"


def _decimals(value: float) -> int:
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0


def times(value: float | None) -> str:
    """Such as "1.52x"."""
    return NOTHING if value is None else f"{value:.2f}x"


def megabytes(number: float | None) -> str:
    """In 10^6 bytes, without the unit."""
    return NOTHING if number is None else three_digits(number / 1e6)


def spread(timing: Timing, second: float) -> str:
    """The median, and the 20th to 80th percentile after it, in units of ``second`` seconds: "12.3 (12.0-12.9)"."""
    decimals = _decimals(timing.median / second)
    median, low, high = (f"{value / second:.{decimals}f}" for value in (timing.median, timing.p20, timing.p80))
    return f"{median} ({low}-{high})"


def duration(seconds: float | None) -> str:
    """Such as "12.3 ms", with the unit that suits."""
    if seconds is None:
        return NOTHING
    unit, second = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("µs", 1e-6))
    return f"{three_digits(seconds / second)} {unit}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are padded, so that it reads as well in a terminal; the first is aligned left, the
    others right."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)
