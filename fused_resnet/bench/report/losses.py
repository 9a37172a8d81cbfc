"""Where this package was not the fastest, said as plainly as where it was."""

from __future__ import annotations

from fused_resnet.bench.report.roles import best_of_ours, best_rival, is_ours, right_timings, times_faster
from fused_resnet.bench.report.sections import Column, Section
from fused_resnet.bench.report.wording import duration

NOTICED = 1.005
"""Less is written 1.00x, and is no loss."""


def loss(column: Column) -> str | None:
    """A sentence on who was faster than the best of ours, and by how much; None where nobody was.

    None too where ours had no timing because none was there to take part; where ours was wrong or failed, it says so.
    """
    measurement = column.measurement
    ours, rival = best_of_ours(measurement), best_rival(measurement)
    if rival is None:
        return None
    where = f"{column.letter + ': ' if column.letter else ''}{measurement.title}"
    rival_seconds = right_timings(measurement)[rival].median
    if ours is None:
        tried = {name: o.status for name, o in measurement.outcomes.items() if is_ours(name) and o.status != "absent"}
        if not tried:
            return None
        statuses = ", ".join(f"{name} {status}" for name, status in tried.items())
        return f"{where}: none of ours was right ({statuses}); {rival} took {duration(rival_seconds)}."
    factor = times_faster(measurement, rival, ours)
    if factor < NOTICED:
        return None
    our_seconds = right_timings(measurement)[ours].median
    return (
        f"{where}: {rival} was {factor:.2f}x as fast as {ours}, the best of ours "
        f"({duration(rival_seconds)} to {duration(our_seconds)})."
    )


def losses(sections: list[Section]) -> list[str]:
    """A sentence for each measurement where ours was not the fastest."""
    return [text for section in sections for column in section.columns if (text := loss(column)) is not None]


def contests(sections: list[Section]) -> int:
    """The number of measurements in which ours and a rival were right."""
    columns = [column for section in sections for column in section.columns]
    return sum(
        best_of_ours(column.measurement) is not None and best_rival(column.measurement) is not None
        for column in columns
    )
