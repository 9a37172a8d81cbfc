"""The tables and sentences of a report, for Markdown and for the page: text in cells, and the number that a column is
sorted by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from fused_resnet.bench.report.sections import Column, Section
from fused_resnet.bench.result import ABSENT, FAILED, OP, RIGHT, WRONG, Outcome

NOTICED = 1.005
"""Less is written 1.00x, and is no loss."""
ROOFLINE_NOTE = (
    "Bytes and FLOP (additions and multiplications of convolutions and matrix products) are counted, not measured. The "
    "roofline is the least time that the task takes at the ceilings measured in the same run; the fewest bytes anyone "
    "can move, not those that a contender moves, are held against it."
)
PEAK_NOTE = "The most held during a run beyond what was held before; on the CPU, of pages that the system sees."
SETUP_NOTE = "Once, before the first run, and in no other number: compiling, tuning, packing weights, capture."


@dataclass(frozen=True)
class Cell:
    """``order`` is what a column is sorted by, None of what has no number; ``kind`` is "best", "ours", "wrong",
    "failed", "win", "loss" or empty."""

    text: str
    order: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""


def speed(section: Section) -> Table:
    """A row for each contender; for each batch size its time, images a second and times the best plain eager."""
    header = ["contender"]
    for column in section.columns:
        header.append(f"{column.lettered(f'batch {column.measurement.batch_size}')}, {section.unit[0]}")
        header += ["to eager"] if section.level == OP else ["images/s", "to eager"]
    rows = [
        [_name(name), *(cell for column in section.columns for cell in _speed_cells(section, column, name))]
        for name in section.contenders
    ]
    return Table(header, rows)


def _speed_cells(section: Section, column: Column, name: str) -> list[Cell]:
    outcome = column.measurement.outcomes.get(name)
    nothing = [Cell(NOTHING)] * (1 if section.level == OP else 2)
    if outcome is None or outcome.timing is None:
        text = NOTHING if outcome is None or outcome.status == ABSENT else outcome.status
        return [Cell(text, kind=text if text == FAILED else ""), *nothing]
    timing, figure = outcome.timing, figures(column.measurement, name, column.result.ceilings)
    text = spread(timing, section.unit[1])
    if outcome.status == WRONG:
        return [Cell(f"wrong: {text}", kind="wrong"), *nothing]
    right = right_timings(column.measurement)
    best = "best" if name == min(right, key=lambda name: right[name].median) else ""
    rate, to_eager = figure.images_per_second, figure.times_best_eager
    rates = [] if rate is None else [Cell(three_digits(rate), rate, best)]
    return [Cell(text, timing.median, best), *rates, Cell(times(to_eager), to_eager, best)]


def headline(found: Sequence[Section]) -> Table:
    """A row for each measurement: the best plain eager, the best rival, the best of ours, and how they compare."""
    rows = []
    for column in _columns(found):
        measurement = column.measurement
        right = right_timings(measurement)
        eager, rival, ours = best_eager(measurement), best_rival(measurement), best_of_ours(measurement)
        row = [Cell(column.title)]
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


def appendix(found: Sequence[Section]) -> list[tuple[str, Table]]:
    """(title, table) of what is told beside the speed, where somebody tells it."""
    everything = [
        ("Roofline", roofline(found)),
        ("Peak memory, MB", _by_contender(found, PEAK_NOTE, lambda outcome: outcome.peak_bytes, megabytes)),
        ("Saved for backward, MB", _by_contender(found, "", lambda outcome: outcome.saved_bytes, megabytes)),
        ("Setup", _by_contender(found, SETUP_NOTE, lambda outcome: outcome.setup_seconds, duration)),
    ]
    return [(title, table) for title, table in everything if table.rows]


def roofline(found: Sequence[Section]) -> Table:
    """Who moves how much how fast: a row for each measurement and contender of which bytes or FLOP are known."""
    header = ["measurement", "contender", "MB moved", "GB/s", "GFLOP", "TFLOP/s", "of the roofline"]
    rows = []
    for column in _columns(found):
        measurement = column.measurement
        for name in right_timings(measurement):
            figure = figures(measurement, name, column.result.ceilings)
            rates = (figure.bytes_per_second, figure.flop_per_second, figure.roofline_fraction)
            if any(number is not None for number in rates):
                fraction, moved = figure.roofline_fraction, measurement.outcomes[name].moved_bytes
                percent = NOTHING if fraction is None else f"{100 * fraction:.0f} %"
                cells = [Cell(megabytes(moved), moved), _scaled(rates[0], 1e9), _scaled(measurement.flop, 1e9)]
                cells += [_scaled(rates[1], 1e12), Cell(percent, fraction)]
                rows.append([Cell(column.title), _name(name), *cells])
    return Table(header, rows, ROOFLINE_NOTE)


def _by_contender(
    found: Sequence[Section],
    note: str,
    value: Callable[[Outcome], float | None],
    written: Callable[[float | None], str],
) -> Table:
    """A row for each measurement and a column for each contender, of those that tell it."""
    told: dict[str, dict[str, float]] = {}
    for column in _columns(found):
        for name, outcome in column.measurement.outcomes.items():
            if outcome.timing is not None and (number := value(outcome)) is not None:
                told.setdefault(column.title, {})[name] = number
    names = list(dict.fromkeys(name for numbers in told.values() for name in numbers))
    rows = [
        [Cell(title), *(Cell(written(numbers.get(name)), numbers.get(name)) for name in names)]
        for title, numbers in told.items()
    ]
    return Table(["measurement", *names], rows, note)


def reasons(found: Sequence[Section]) -> list[str]:
    """Who was absent, failed or wrong, and why: each contender, status and reason once."""
    titles: dict[tuple[str, str, str], list[str]] = {}
    columns = _columns(found)
    for column in columns:
        for name, outcome in column.measurement.outcomes.items():
            if outcome.status != RIGHT:
                key = (name, outcome.status, outcome.reason or "no reason given")
                titles.setdefault(key, []).append(column.title)
    order, lines = (FAILED, WRONG, ABSENT), []
    for (name, status, reason), where in sorted(titles.items(), key=lambda item: order.index(item[0][1])):
        few = "; ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        told = "everywhere" if len(where) == len(columns) else f"in {len(where)} of {len(columns)}: {few}"
        lines.append(f"{name} {status}, {told}: {reason}")
    return lines


def losses(found: Sequence[Section]) -> list[str]:
    """A sentence for each measurement where ours was not the fastest."""
    return [text for column in _columns(found) if (text := _loss(column)) is not None]


def contests(found: Sequence[Section]) -> int:
    """The number of measurements in which ours and a rival were right."""
    entries = [column.measurement for column in _columns(found)]
    return sum(best_of_ours(entry) is not None and best_rival(entry) is not None for entry in entries)


def _loss(column: Column) -> str | None:
    """A sentence on who was faster than the best of ours, and by how much; None where nobody was.

    None too where ours had no timing because none was there to take part; where ours was wrong or failed, it says so.
    """
    measurement = column.measurement
    ours, rival = best_of_ours(measurement), best_rival(measurement)
    if rival is None:
        return None
    right = right_timings(measurement)
    if ours is None:
        outcomes = measurement.outcomes.items()
        tried = [f"{name} {o.status}" for name, o in outcomes if is_ours(name) and o.status != ABSENT]
        told = f"({', '.join(tried)}); {rival} took {duration(right[rival].median)}."
        return f"{column.title}: none of ours was right {told}" if tried else None
    factor = times_faster(measurement, rival, ours)
    if factor < NOTICED:
        return None
    return (
        f"{column.title}: {rival} was {factor:.2f}x as fast as {ours}, the best of ours "
        f"({duration(right[rival].median)} to {duration(right[ours].median)})."
    )


def _columns(found: Sequence[Section]) -> list[Column]:
    return [column for section in found for column in section.columns]


def _name(contender: str) -> Cell:
    return Cell(contender, kind="ours" if is_ours(contender) else "")


def _scaled(number: float | None, unit: float) -> Cell:
    return Cell(NOTHING) if number is None else Cell(three_digits(number / unit), number)
