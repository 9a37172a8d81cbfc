"""Plots of speed and memory, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fused_resnet.bench.report.figures import figures
from fused_resnet.bench.report.roles import (
    PLAIN_EAGER,
    best_of_ours,
    best_rival,
    is_ours,
    right_timings,
    times_faster,
)
from fused_resnet.bench.report.sections import Column, Section
from fused_resnet.bench.report.svg import INK, OURS, colour, drawing, series, svg
from fused_resnet.bench.report.wording import duration, three_digits
from fused_resnet.bench.result import OP

MOST_LINES = 4
"""Of ours, and of the rivals beside plain eager: more cannot be told apart."""
WIDTH = 6.4


def speed_by_batch(section: Section, name: str, order: list[str]) -> str | None:
    """Images a second over the batch size, of plain eager and the fastest others; None for an op or one batch size.

    Args:
        name: of the figure on the page.
        order: every contender of the report: a contender looks alike in all its plots.
    """
    batches = sorted({column.measurement.batch_size for column in section.columns})
    if section.level == OP or len(batches) < 2 or len({column.letter for column in section.columns}) > 1:
        return None
    looks = series(order)
    points: dict[str, list[tuple[int, float]]] = {}
    for column in section.columns:
        for contender in right_timings(column.measurement):
            rate = figures(column.measurement, contender, column.result.ceilings).images_per_second
            if rate is not None:
                points.setdefault(contender, []).append((column.measurement.batch_size, rate))
    if not points:
        return None
    chosen = _chosen({contender: max(rate for _, rate in found) for contender, found in points.items()})
    with drawing(WIDTH, 3.8) as (figure, axes):
        for contender in chosen:
            hue, marker = looks[contender]
            x, y = zip(*points[contender], strict=True)
            line, width = ("-", 2.4) if is_ours(contender) else ("--", 1.4)
            axes.plot(x, y, line, color=hue, marker=marker, markersize=6, linewidth=width, label=contender)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch size")
        axes.set_ylabel("images a second")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        said = ", ".join(f"{contender} {three_digits(points[contender][-1][1])}" for contender in chosen)
        return svg(figure, name, f"{section.title}: images a second by batch size; at batch {batches[-1]}: {said}")


def latency(column: Column, section: Section, name: str, order: list[str]) -> str | None:
    """Bars of the median time with whiskers from the 20th to the 80th percentile, the fastest on top; None if nobody
    was right."""
    timings = right_timings(column.measurement)
    if not timings:
        return None
    looks, (unit, second) = series(order), section.unit
    names = sorted(timings, key=lambda contender: -timings[contender].median)
    with drawing(WIDTH, 0.9 + 0.3 * len(names)) as (figure, axes):
        for place, contender in enumerate(names):
            timing = timings[contender]
            axes.barh(place, timing.median / second, color=looks[contender][0], height=0.66)
            axes.plot([timing.p20 / second, timing.p80 / second], [place, place], color=colour(INK), linewidth=1.4)
            _write_beside(axes, timing.median / second, max(timing.median, timing.p80) / second, place)
        _name_bars(axes, names, margin=0.12)
        axes.set_xlabel(f"{unit} a run, batch {column.measurement.batch_size}")
        said = ", ".join(f"{contender} {duration(timings[contender].median)}" for contender in reversed(names))
        return svg(figure, name, f"{column.measurement.title}: {said}")


def ops(found: Sequence[Section], name: str) -> str | None:
    """A row for each op, a dot for each of its measurements: how many times as fast the best of ours was as the fastest
    rival; None where no op has both."""
    factors: dict[str, list[float]] = {}
    for section in found:
        for column in section.columns if section.level == OP else ():
            ours, rival = best_of_ours(column.measurement), best_rival(column.measurement)
            if ours is not None and rival is not None:
                op = section.subject.split()[0]
                factors.setdefault(op, []).append(times_faster(column.measurement, ours, rival))
    if not factors:
        return None
    names = sorted(factors, reverse=True)
    with drawing(WIDTH, 1.0 + 0.3 * len(names)) as (figure, axes):
        axes.axvline(1, color=colour(INK), linewidth=1)
        for place, op in enumerate(names):
            axes.plot(factors[op], [place] * len(factors[op]), "o", color=colour(OURS[0]), markersize=6)
        every = [factor for some in factors.values() for factor in some]
        ends = (min(math.floor(math.log2(min(every))), 0), max(math.ceil(math.log2(max(every))), 1))
        ticks = [2.0**power for power in range(ends[0], ends[1] + 1)]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.04)
        axes.set_xlabel("as fast as the fastest rival")
        said = ", ".join(f"{op} {min(some):.2f}x to {max(some):.2f}x" for op, some in sorted(factors.items()))
        return svg(figure, name, f"The best of ours against the fastest rival, by op: {said}")


def memory(column: Column, name: str, order: list[str]) -> str | None:
    """Bars of peak memory and of the bytes saved for backward, by contender; None if nobody tells either."""
    outcomes = {contender: column.measurement.outcomes[contender] for contender in right_timings(column.measurement)}
    told = {
        c: (o.peak_bytes, o.saved_bytes) for c, o in outcomes.items() if (o.peak_bytes, o.saved_bytes) != (None, None)
    }
    if not told:
        return None
    looks, names = series(order), list(told)[::-1]
    titles = [
        title for side, title in enumerate(_MEMORY) if any(told[contender][side] is not None for contender in told)
    ]
    with drawing(WIDTH if len(titles) == 1 else 9, 0.9 + 0.3 * len(names), len(titles), squeeze=False, sharey=True) as (
        figure,
        grid,
    ):
        for axes, title in zip(grid[0], titles, strict=True):
            for place, contender in enumerate(names):
                number = told[contender][_MEMORY.index(title)]
                if number is None:
                    continue
                axes.barh(place, number / 1e6, color=looks[contender][0], height=0.66)
                _write_beside(axes, number / 1e6, number / 1e6, place)
            _name_bars(axes, names, margin=0.16)
            axes.locator_params(axis="x", nbins=5)
            axes.set_xlabel(f"{title}, MB")
        said = "; ".join(
            f"{contender} "
            + ", ".join(
                f"{three_digits(number / 1e6)} MB {title}"
                for number, title in zip(numbers, _MEMORY, strict=True)
                if number is not None
            )
            for contender, numbers in told.items()
        )
        return svg(figure, name, f"{column.measurement.title}: {said}")


_MEMORY = ("peak", "saved for backward")


def _chosen(speeds: dict[str, float]) -> list[str]:
    """Plain eager, and the fastest of ours and of the rivals, in that order."""
    fastest = sorted(speeds, key=lambda name: -speeds[name])
    eager = [name for name in fastest if name in PLAIN_EAGER]
    ours = [name for name in fastest if is_ours(name)][:MOST_LINES]
    return [*ours, *[name for name in fastest if name not in eager and not is_ours(name)][:MOST_LINES], *eager]


def _write_beside(axes: Any, number: float, end: float, place: int) -> None:
    """The number behind a bar that ends there."""
    offset = {"xytext": (5, 0), "textcoords": "offset points"}
    axes.annotate(three_digits(number), (end, place), **offset, va="center", fontsize=9)


def _name_bars(axes: Any, names: list[str], margin: float) -> None:
    """A name before each bar, and room for the numbers behind them."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=margin, y=0.02)
    axes.set_xlim(left=0)
