"""A result as CSV: a row for each measurement and contender, every number in SI units."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from fused_resnet.bench.report.figures import figures
from fused_resnet.bench.result import Measurement, Result

COLUMNS = (
    *("level", "subject", "mode", "batch_size", "dtype", "image_size", "contender", "status", "reason"),
    *("median_seconds", "p20_seconds", "p80_seconds", "rounds", "images_per_second", "times_best_eager"),
    *("error", "setup_seconds", "peak_bytes", "saved_bytes", "moved_bytes", "least_bytes", "flop"),
    *("bytes_per_second", "flop_per_second", "roofline_fraction"),
    *("device", "threads", "torch", "commit", "date"),
)
MACHINE = ("device", "threads", "torch", "commit", "date")


def csv_text(results: Sequence[Result]) -> str:
    """The rows of these results under one header; an empty cell where nothing is known.

    ``times_best_eager`` is how many times as fast as the faster plain eager, ``roofline_fraction`` the part of the
    measured ceilings that was reached. ``commit`` and the columns beside it tell the results apart.
    """
    target = io.StringIO()
    writer = csv.DictWriter(target, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in results:
        for measurement in result.measurements:
            for contender in measurement.outcomes:
                writer.writerow(_row(result, measurement, contender))
    return target.getvalue()


def _row(result: Result, measurement: Measurement, contender: str) -> dict[str, Any]:
    outcome = measurement.outcomes[contender]
    found = figures(measurement, contender, result.ceilings)
    row: dict[str, Any] = {name: getattr(measurement, name) for name in COLUMNS[:6]}
    row |= {"contender": contender, "status": outcome.status, "reason": outcome.reason}
    if outcome.timing is not None:
        timing = outcome.timing
        row |= {"median_seconds": timing.median, "p20_seconds": timing.p20, "p80_seconds": timing.p80}
        row["rounds"] = len(timing.samples)
    row |= {name: getattr(outcome, name) for name in ("error", "setup_seconds", "peak_bytes", "saved_bytes")}
    row |= {"moved_bytes": outcome.moved_bytes, "least_bytes": measurement.least_bytes, "flop": measurement.flop}
    row |= {"images_per_second": found.images_per_second, "times_best_eager": found.times_best_eager}
    row |= {"bytes_per_second": found.bytes_per_second, "flop_per_second": found.flop_per_second}
    row["roofline_fraction"] = found.roofline_fraction
    return row | {name: result.machine.get(name) for name in MACHINE}
