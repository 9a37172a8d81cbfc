"""Numbers as a reader wants them: three digits that count, in a unit that suits."""

from __future__ import annotations

import math

from fused_resnet.bench.timer import Timing

NOTHING = "-"


def three_digits(value: float) -> str:
    """Such as 0.0123, 1.23, 12.3, 123, 1234."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def times(value: float | None) -> str:
    """Such as "1.52x"."""
    return NOTHING if value is None else f"{value:.2f}x"


def percent(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.0f} %"


def megabytes(number: float | None) -> str:
    """In 10^6 bytes, without the unit."""
    return NOTHING if number is None else three_digits(number / 1e6)


def spread(timing: Timing, second: float) -> str:
    """The median, and the 20th to 80th percentile behind it, in units of ``second`` seconds: "12.3 (12.0-12.9)"."""
    median, low, high = (value / second for value in (timing.median, timing.p20, timing.p80))
    decimals = max(0, 2 - math.floor(math.log10(median))) if median > 0 else 0
    return f"{median:.{decimals}f} ({low:.{decimals}f}-{high:.{decimals}f})"


def duration(seconds: float) -> str:
    """Such as "12.3 ms", with the unit that suits."""
    for unit, second in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= second:
            return f"{three_digits(seconds / second)} {unit}"
    return f"{three_digits(seconds / 1e-6)} µs"
