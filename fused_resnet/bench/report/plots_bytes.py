"""Plots of where the bytes go: the roofline, and the passes of a training step at each level of fusion."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fused_resnet.bench.ledger import BACKWARD, FORWARD
from fused_resnet.bench.report.figures import figures
from fused_resnet.bench.report.roles import right_timings
from fused_resnet.bench.report.sections import Column, Section
from fused_resnet.bench.report.svg import BACKWARDS, FORWARDS, GRID, INK, OTHER, OURS, colour, drawing, series, svg
from fused_resnet.bench.report.wording import three_digits

MOST_KINDS = 5
"""Of passes that are told apart, in each phase."""
LAST_LEVEL = "level 3"
TERA = 1e12

Levels = Mapping[str, Sequence[Mapping[str, Any]]]


def roofline(sections: Sequence[Section], dtype: str, letter: str, name: str, order: list[str]) -> str | None:
    """FLOP a second over FLOP a byte, of every right contender whose bytes are counted, under the two ceilings; of each
    section at its largest batch size.

    None if there are no such measurements of this dtype and result, or no ceilings.
    """
    columns = [
        column
        for section in sections
        if section.dtype == dtype
        for column in section.columns
        if column.letter == letter and column.measurement.batch_size == section.columns[-1].measurement.batch_size
    ]
    ceiling = columns[0].result.ceilings.get(dtype) if columns else None
    points = _points(columns)
    if ceiling is None or not points:
        return None
    from matplotlib.ticker import LogLocator, NullFormatter

    looks = series(order)
    bandwidth, peak = ceiling["bytes_per_second"] / TERA, ceiling["flop_per_second"] / TERA
    everything = [point for found in points.values() for point in found]
    low, high = (reduce(x for x, _ in everything) for reduce in (min, max))
    ridge = peak / bandwidth
    left, right = min(low, ridge) / 2, max(high, ridge) * 2
    with drawing(7.2, 4.6) as (figure, axes):
        axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color=colour(INK), linewidth=1.6)
        axes.annotate(
            f"{three_digits(bandwidth * 1e3)} GB/s copied",
            (math.sqrt(left * ridge), math.sqrt(left * ridge) * bandwidth),
            xytext=(8, -10),
            textcoords="offset points",
            va="center",
        )
        axes.annotate(
            f"{three_digits(peak)} TFLOP/s in matrix products",
            (right, peak),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
        )
        for contender in (name for name in order if name in points):
            hue, marker = looks[contender]
            x, y = zip(*points[contender], strict=True)
            axes.plot(x, y, marker, color=hue, markersize=6, alpha=0.85, label=contender, markeredgewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left, right)
        bottom = min(y for _, y in everything)
        axes.set_ylim(min(bottom, left * bandwidth) / 1.5, max(peak, max(y for _, y in everything)) * 2.2)
        axes.set_xlabel("FLOP a byte that it moves")
        axes.set_ylabel("TFLOP a second")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        best = {contender: max(y for _, y in found) for contender, found in points.items()}
        said = ", ".join(f"{contender} up to {rate:.3g} TFLOP/s" for contender, rate in best.items())
        return svg(
            figure,
            name,
            f"Roofline, {dtype}: ceilings {bandwidth * 1e3:.3g} GB/s and {peak:.3g} TFLOP/s; {said}",
        )


def step_bytes(model: str, levels: Levels, name: str) -> str | None:
    """Two panels, in MB an image: the bytes of a training step by phase and kind of pass, a bar for each level of
    fusion; and the way from the first of them (eager) down to level 3, level by level. None without two levels."""
    if len(levels) < 2:
        return None
    totals = {level: sum(entry["bytes"] for entry in entries) / 1e6 for level, entries in levels.items()}
    kinds = _kinds(levels)
    with drawing(10.4, 4.8, 2) as (figure, (stacked, waterfall)):
        _draw_stacked(stacked, levels, kinds)
        _draw_waterfall(waterfall, totals)
        said = ", ".join(f"{level} {three_digits(total)} MB" for level, total in totals.items())
        return svg(figure, name, f"{model}: bytes read and written by a training step, an image: {said}")


def _points(columns: Sequence[Column]) -> dict[str, list[tuple[float, float]]]:
    points: dict[str, list[tuple[float, float]]] = {}
    for column in columns:
        for contender in right_timings(column.measurement):
            found = figures(column.measurement, contender, column.result.ceilings)
            if found.flop_per_byte is not None and found.flop_per_second is not None:
                points.setdefault(contender, []).append((found.flop_per_byte, found.flop_per_second / TERA))
    return points


def _kinds(levels: Levels) -> dict[tuple[str, str], str]:
    """By (phase, kind), the colour: the largest of each phase, the rest as "other", which is not in here."""
    largest: dict[tuple[str, str], float] = {}
    for entries in levels.values():
        for entry in entries:
            key = (entry["phase"], entry["kind"])
            largest[key] = max(largest.get(key, 0), entry["bytes"])
    hues: dict[tuple[str, str], str] = {}
    for phase, shades in ((FORWARD, FORWARDS), (BACKWARD, BACKWARDS)):
        chosen = sorted((key for key in largest if key[0] == phase), key=lambda key: -largest[key])[:MOST_KINDS]
        hues |= {key: colour(shade) for key, shade in zip(chosen, shades, strict=False)}
    return hues


def _draw_stacked(axes: Any, levels: Levels, kinds: Mapping[tuple[str, str], str]) -> None:
    left = [0.0] * len(levels)
    others = ("all", "other")
    for key, hue in [*kinds.items(), (others, colour(OTHER))]:
        heights = [
            sum(
                entry["bytes"] / 1e6
                for entry in entries
                if (pair := (entry["phase"], entry["kind"])) == key or (key == others and pair not in kinds)
            )
            for entries in levels.values()
        ]
        if any(heights):
            label = "other" if key == others else " ".join(key)
            axes.bar(range(len(levels)), heights, bottom=left, color=hue, label=label, width=0.72)
            left = [base + height for base, height in zip(left, heights, strict=True)]
    _label_levels(axes, list(levels))
    axes.set_ylabel("MB an image, read and written")
    axes.set_title("by pass", loc="left")
    axes.margins(y=0.08)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def _draw_waterfall(axes: Any, totals: Mapping[str, float]) -> None:
    """The first level whole, then what each step takes away or adds, then the last one whole."""
    names = list(totals)
    last = names.index(LAST_LEVEL) if LAST_LEVEL in names else len(names) - 1
    way = names[: last + 1]
    place = 0
    axes.bar(place, totals[way[0]], color=colour(OTHER), width=0.72)
    _annotate(axes, place, totals[way[0]], three_digits(totals[way[0]]))
    labels = [way[0]]
    for before, after in itertools.pairwise(way):
        place += 1
        low, high = sorted((totals[before], totals[after]))
        less = totals[after] <= totals[before]
        hue = colour(FORWARDS[0] if less else BACKWARDS[0])
        axes.plot([place - 1, place + 0.36], [totals[before]] * 2, color=colour(GRID), linewidth=1)
        axes.bar(place, high - low, bottom=low, color=hue, width=0.72)
        _annotate(axes, place, high, f"{totals[after] - totals[before]:+.3g}".replace("-", "\N{MINUS SIGN}"))
        labels.append(f"to {after}")
    axes.plot([place, place + 1.36], [totals[way[-1]]] * 2, color=colour(GRID), linewidth=1)
    axes.bar(place + 1, totals[way[-1]], color=colour(OURS[0]), width=0.72)
    _annotate(axes, place + 1, totals[way[-1]], three_digits(totals[way[-1]]))
    _label_levels(axes, [*labels, way[-1]])
    axes.set_title("level by level", loc="left")
    axes.margins(y=0.08)


def _annotate(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)


def _label_levels(axes: Any, labels: Sequence[str]) -> None:
    axes.set_xticks(range(len(labels)), [label.replace(", ", ",\n").replace("to ", "to\n") for label in labels])
    axes.tick_params(axis="x", length=0, labelsize=9)
    axes.grid(visible=False, axis="x")
