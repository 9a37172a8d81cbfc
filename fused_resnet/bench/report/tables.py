"""The tables and sentences of a report, for the terminal, for Markdown and for the page: text in cells, and the number
that a column is sorted by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fused_resnet.bench.report.figures import (
    NOTHING,
    best_eager,
    best_of_ours,
    best_rival,
    duration,
    figures,
    is_ours,
    megabytes,
    right_timings,
    spread,
    three_digits,
    times,
    times_faster,
)
from fused_resnet.bench.result import ABSENT, FAILED, LEVELS, MODES, OP, RIGHT, WRONG, Measurement, Outcome

Ceilings = Mapping[str, Mapping[str, float]]
NOTICED = 1.005
"""Less is written 1.00x, and is no loss."""
READING = (
    'Times are medians, with the 20th to 80th percentile in brackets. "to eager" is how many times as fast as the '
    "faster plain eager PyTorch: the median of the quotients of each round. Who was wrong is not compared. Setup comes "
    "once, before the first run, and is in no other number: compiling, tuning, packing weights, capture. Peak memory "
    "is the most held during a run beyond what was held before; on the CPU, of pages that the system sees. Bytes moved "
    "and FLOP are counted, not measured. The roofline is the least time that the task takes at the ceilings measured "
    "in the same run; the fewest bytes anyone can move, not those that a contender moves, are held against it."
)


@dataclass(frozen=True)
class Cell:
    """``order`` is what a column is sorted by, None of what has no number; ``kind`` is "best", "ours", "wrong", "win",
    "loss" or empty."""

    text: str
    order: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[Cell]]


def in_order(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Models first, then blocks and ops; subjects and dtypes in the order of the run, modes from inference to training
    step, batch sizes rising."""
    names = [name for one in measurements for name in (one.subject, one.dtype)]
    first_seen = {name: place for place, name in enumerate(dict.fromkeys(names))}

    def place(one: Measurement) -> tuple[int, ...]:
        order = (-LEVELS.index(one.level), first_seen[one.subject], MODES.index(one.mode), first_seen[one.dtype])
        return (*order, one.image_size or 0, one.batch_size)

    return sorted(measurements, key=place)


def measured(measurement: Measurement, ceilings: Ceilings) -> Table:
    """A row for each contender that was timed, the right ones by their speed, then the wrong ones, whose speed does not
    count. Columns in which nobody has anything are left out. ``ceilings`` as in ``Result.ceilings``."""
    outcomes = measurement.outcomes.items()
    timed = sorted(
        ((name, outcome, outcome.timing) for name, outcome in outcomes if outcome.timing is not None),
        key=lambda row: (row[1].status != RIGHT, row[2].median),
    )
    rows = [{"contender": _name(name)} | _cells(measurement, name, ceilings) for name, _, _ in timed]
    if rows and timed[0][1].status == RIGHT:
        rows[0] = {title: Cell(cell.text, cell.order, cell.kind or "best") for title, cell in rows[0].items()}
    header = [title for title in (rows[0] if rows else ()) if any(row[title].text != NOTHING for row in rows)]
    return Table(header, [[row[title] for title in header] for row in rows])


def _cells(measurement: Measurement, name: str, ceilings: Ceilings) -> dict[str, Cell]:
    """Of a contender with a timing, by the title of their column."""
    outcome, found = measurement.outcomes[name], figures(measurement, name, ceilings)
    timing = outcome.timing
    assert timing is not None
    unit, second = ("µs", 1e-6) if measurement.level == OP else ("ms", 1e-3)
    rate, roof, setup = found.images_per_second, found.roofline_fraction, outcome.setup_seconds
    return {
        f"{unit} (20-80 %)": Cell(spread(timing, second), timing.median),
        "images/s": Cell(NOTHING if rate is None else three_digits(rate), rate),
        "to eager": Cell(times(found.times_best_eager), found.times_best_eager),
        "setup s": Cell(NOTHING if setup is None else f"{setup:.1f}", setup),
        "peak MB": Cell(megabytes(outcome.peak_bytes), outcome.peak_bytes),
        "saved MB": Cell(megabytes(outcome.saved_bytes), outcome.saved_bytes),
        "moved MB": Cell(megabytes(outcome.moved_bytes), outcome.moved_bytes),
        "GB/s": _scaled(found.bytes_per_second, 1e9),
        "TFLOP/s": _scaled(found.flop_per_second, 1e12),
        "% roof": Cell(NOTHING if roof is None else f"{100 * roof:.0f}", roof),
        "numbers": _verdict(outcome),
    }


def _verdict(outcome: Outcome) -> Cell:
    error = "" if outcome.error is None else f" ({outcome.error:.0e})"
    if outcome.status == RIGHT:
        return Cell(f"right{error}", outcome.error)
    return Cell(f"WRONG: {outcome.reason}", outcome.error, "wrong")


def _name(contender: str) -> Cell:
    return Cell(contender, kind="ours" if is_ours(contender) else "")


def _scaled(number: float | None, unit: float) -> Cell:
    return Cell(NOTHING) if number is None else Cell(three_digits(number / unit), number)


def headline(measurements: Sequence[Measurement]) -> Table:
    """A row for each measurement: the best plain eager, the best rival, the best of ours, and how they compare."""
    rows = []
    for measurement in measurements:
        right = right_timings(measurement)
        eager, rival, ours = best_eager(measurement), best_rival(measurement), best_of_ours(measurement)
        row = [Cell(measurement.title)]
        for name in (eager, rival):
            value = None if name is None or ours is None else times_faster(measurement, ours, name)
            is_tie = value is None or 1 / NOTICED < value < NOTICED
            row.append(Cell(times(value), value, "" if value is None or is_tie else "win" if value > 1 else "loss"))
        for name in (ours, rival, eager):
            seconds = None if name is None else right[name].median
            text = NOTHING if seconds is None else f"{name} {duration(seconds)}"
            row.append(Cell(text, seconds, "ours" if name and is_ours(name) else ""))
        rows.append(row)
    return Table(["measurement", "to eager", "to rival", "best of ours", "best rival", "best eager"], rows)


def reasons(measurements: Sequence[Measurement]) -> list[str]:
    """Who was absent, failed or wrong, and why: each contender, status and reason once."""
    titles: dict[tuple[str, str, str], list[str]] = {}
    for measurement in measurements:
        for name, outcome in measurement.outcomes.items():
            if outcome.status != RIGHT:
                key = (name, outcome.status, outcome.reason or "no reason given")
                titles.setdefault(key, []).append(measurement.title)
    order, lines = (FAILED, WRONG, ABSENT), []
    for (name, status, reason), where in sorted(titles.items(), key=lambda item: order.index(item[0][1])):
        few = "; ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        told = "everywhere" if len(where) == len(measurements) else f"in {len(where)} of {len(measurements)}: {few}"
        lines.append(f"{name} {status}, {told}: {reason}")
    return lines


def standing(measurements: Sequence[Measurement]) -> str:
    """In how many measurements ours was the fastest, of those in which it and a rival were right; the headline says by
    how much, and `reasons` who was not right."""
    ratios = []
    for measurement in measurements:
        ours, rival = best_of_ours(measurement), best_rival(measurement)
        if ours is not None and rival is not None:
            ratios.append(times_faster(measurement, ours, rival))
    won = sum(ratio > 1 / NOTICED for ratio in ratios)
    return f"Ours was the fastest, or as fast as the fastest, in {won} of {len(ratios)} measurements."
