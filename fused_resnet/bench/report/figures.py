"""What follows from an outcome: rates, and the part of the machine's ceilings that was reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fused_resnet.bench.report.roles import best_eager, times_faster
from fused_resnet.bench.result import OP, RIGHT, Measurement
from fused_resnet.bench.roofline import Ceilings


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
    outcome = measurement.outcomes[name]
    if outcome.timing is None:
        return Figures()
    seconds, flop, moved = outcome.timing.median, measurement.flop, outcome.moved_bytes
    eager = best_eager(measurement) if outcome.status == RIGHT else None
    return Figures(
        images_per_second=None if measurement.level == OP else measurement.batch_size / seconds,
        times_best_eager=None if eager is None else times_faster(measurement, name, eager),
        bytes_per_second=None if moved is None else moved / seconds,
        flop_per_second=None if not flop else flop / seconds,
        roofline_fraction=_roofline_fraction(measurement, name, ceilings),
        flop_per_byte=None if not flop or not moved else flop / moved,
    )


def _roofline_fraction(
    measurement: Measurement, name: str, ceilings: Mapping[str, Mapping[str, float]]
) -> float | None:
    outcome, ceiling = measurement.outcomes[name], ceilings.get(measurement.dtype)
    if ceiling is None or outcome.status != RIGHT or outcome.timing is None:
        return None
    if measurement.flop is None and measurement.least_bytes is None:
        return None
    return Ceilings(**ceiling).fraction(outcome.timing.median, measurement.least_bytes or 0, measurement.flop or 0)
