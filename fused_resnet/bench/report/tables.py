"""The tables of a report, for Markdown and for the page: text in cells, and the number that a column is sorted by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fused_resnet.bench.report.figures import figures
from fused_resnet.bench.report.losses import NOTICED
from fused_resnet.bench.report.roles import best_eager, best_of_ours, best_rival, is_ours, right_timings, times_faster
from fused_resnet.bench.report.sections import Column, Section
from fused_resnet.bench.report.wording import NOTHING, duration, megabytes, percent, spread, three_digits, times
from fused_resnet.bench.result import ABSENT, FAILED, OP, RIGHT, WRONG, Outcome


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
        header += [f"{column.title}, {section.unit[0]}"]
        header += [] if section.level == OP else ["images/s"]
        header += ["to eager"]
    rows = []
    for name in section.contenders:
        row = [Cell(name, kind="ours" if is_ours(name) else "")]
        for column in section.columns:
            row += _speed_cells(section, column, name)
        rows.append(row)
    return Table(header, rows)


def headline(found: Sequence[Section]) -> Table:
    """A row for each measurement: the best plain eager, the best rival, the best of ours, and how they compare."""
    header = ["measurement", "to eager", "to rival", "best of ours", "best rival", "best eager"]
    rows = []
    for section in found:
        for column in section.columns:
            measurement = column.measurement
            right = right_timings(measurement)
            eager, rival, ours = best_eager(measurement), best_rival(measurement), best_of_ours(measurement)
            row = _of(column)[:1]
            for name in (eager, rival):
                known = name is not None and ours is not None
                value = times_faster(measurement, ours, name) if known else None  # type: ignore[arg-type]
                row.append(Cell(times(value), value, _win_or_loss(value)))
            for name in (ours, rival, eager):
                seconds = None if name is None else right[name].median
                text = NOTHING if seconds is None else f"{name} {duration(seconds)}"
                row.append(Cell(text, seconds, "ours" if name and is_ours(name) else ""))
            rows.append(row)
    return Table(header, rows)


def appendix(found: Sequence[Section]) -> list[tuple[str, Table]]:
    """(title, table) of what is told beside the speed; tables without rows are of what nobody told."""
    return [
        ("Roofline", roofline(found)),
        (
            "Peak memory, MB",
            _by_contender(
                found,
                "The most held during a run beyond what was held before; on the CPU, of allocations that PyTorch sees.",
                lambda outcome: outcome.peak_bytes,
                megabytes,
            ),
        ),
        (
            "Saved for backward, MB",
            _by_contender(found, "", lambda outcome: outcome.saved_bytes, megabytes),
        ),
        (
            "Setup",
            _by_contender(
                found,
                "Once, before the first run, and in no other number: compiling, tuning, packing weights, capture.",
                lambda outcome: outcome.setup_seconds,
                lambda seconds: NOTHING if seconds is None else duration(seconds),
            ),
        ),
    ]


def roofline(found: Sequence[Section]) -> Table:
    """Who moves how much how fast: a row for each measurement and contender of which bytes or FLOP are known."""
    header = ["measurement", "contender", "MB moved", "GB/s", "GFLOP", "TFLOP/s", "of the roofline"]
    rows = []
    for column, name in _right(found):
        measurement = column.measurement
        figure = figures(measurement, name, column.result.ceilings)
        moved, flop = measurement.outcomes[name].moved_bytes, measurement.flop
        numbers = (figure.bytes_per_second, figure.flop_per_second)
        if all(number is None for number in (*numbers, figure.roofline_fraction)):
            continue
        cells = [
            Cell(megabytes(moved), moved),
            _scaled(figure.bytes_per_second, 1e9),
            _scaled(flop, 1e9),
            _scaled(figure.flop_per_second, 1e12),
            Cell(percent(figure.roofline_fraction), figure.roofline_fraction),
        ]
        rows.append([*_of(column, name), *cells])
    note = (
        "Bytes and FLOP (additions and multiplications of convolutions and matrix products) are counted, not measured. "
        "The roofline is the least time that the task takes at the ceilings measured in the same run; the fewest bytes "
        "anyone can move, not those that a contender moves, are held against it."
    )
    return Table(header, rows, note)


def reasons(found: Sequence[Section]) -> list[str]:
    """Who was absent, failed or wrong, and why: each contender, status and reason once."""
    titles: dict[tuple[str, str, str], list[str]] = {}
    of = sum(len(section.columns) for section in found)
    for section in found:
        for column in section.columns:
            for name, outcome in column.measurement.outcomes.items():
                if outcome.status != RIGHT:
                    key = (name, outcome.status, outcome.reason or "no reason given")
                    letter = f"{column.letter}: " if column.letter else ""
                    titles.setdefault(key, []).append(letter + column.measurement.title)
    order = (FAILED, WRONG, ABSENT)
    lines = []
    for (name, status, reason), where in sorted(titles.items(), key=lambda item: order.index(item[0][1])):
        # where it was not measured is of interest only if it was elsewhere
        told = "everywhere" if len(where) == of else f"in {len(where)} of {of}: " + _few(where)
        lines.append(f"{name} {status}, {told}: {reason}")
    return lines


def _win_or_loss(value: float | None) -> str:
    if value is None or 1 / NOTICED < value < NOTICED:
        return ""
    return "win" if value > 1 else "loss"


def _few(titles: Sequence[str], at_most: int = 3) -> str:
    more = f" and {len(titles) - at_most} more" if len(titles) > at_most else ""
    return "; ".join(titles[:at_most]) + more


def _speed_cells(section: Section, column: Column, name: str) -> list[Cell]:
    outcome = column.measurement.outcomes.get(name)
    rest = 1 if section.level == OP else 2
    if outcome is None or outcome.timing is None:
        text = NOTHING if outcome is None or outcome.status == ABSENT else outcome.status
        return [Cell(text, kind=text if text == FAILED else ""), *[Cell(NOTHING)] * rest]
    timing, figure = outcome.timing, figures(column.measurement, name, column.result.ceilings)
    text = spread(timing, section.unit[1])
    if outcome.status == WRONG:
        return [Cell(f"wrong: {text}", kind="wrong"), *[Cell(NOTHING)] * rest]
    right = right_timings(column.measurement)
    best = "best" if name == min(right, key=lambda name: right[name].median) else ""
    cells = [Cell(text, timing.median, best)]
    if section.level != OP:
        rate = figure.images_per_second
        cells.append(Cell(NOTHING if rate is None else three_digits(rate), rate, best))
    return [*cells, Cell(times(figure.times_best_eager), figure.times_best_eager, best)]


def _by_contender(
    found: Sequence[Section],
    note: str,
    value: Callable[[Outcome], float | None],
    written: Callable[[float | None], str],
) -> Table:
    """A row for each measurement and a column for each contender, of those that tell it."""
    columns = [column for section in found for column in section.columns]
    told = {
        (index, name): number
        for index, column in enumerate(columns)
        for name, outcome in column.measurement.outcomes.items()
        if outcome.timing is not None and (number := value(outcome)) is not None
    }
    names = list(dict.fromkeys(name for _, name in told))
    rows = []
    for index in dict.fromkeys(index for index, _ in told):
        numbers = [told.get((index, name)) for name in names]
        rows.append([_of(columns[index])[0], *(Cell(written(number), number) for number in numbers)])
    return Table(["measurement", *names], rows, note)


def _of(column: Column, name: str = "") -> list[Cell]:
    letter = f"{column.letter}: " if column.letter else ""
    return [Cell(letter + column.measurement.title), Cell(name, kind="ours" if is_ours(name) else "")]


def _right(found: Sequence[Section]) -> Iterable[tuple[Column, str]]:
    for section in found:
        for column in section.columns:
            for name in right_timings(column.measurement):
                yield column, name


def _scaled(number: float | None, unit: float) -> Cell:
    return Cell(NOTHING) if number is None else Cell(three_digits(number / unit), number)
