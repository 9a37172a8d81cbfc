"""The plots of a page: matplotlib's SVG as it is, each with its numbers in words."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fused_resnet.bench.report.condition import ceiling_text
from fused_resnet.bench.report.figures import (
    PLAIN_EAGER,
    best_of_ours,
    best_rival,
    duration,
    figures,
    is_ours,
    right_timings,
    three_digits,
    times_faster,
)
from fused_resnet.bench.report.sections import Column, Section
from fused_resnet.bench.result import OP

MOST_LINES = 4
"""Of ours, and of the rivals beside plain eager: more cannot be told apart."""
MOST_KINDS = 5
"""Of passes that are told apart, in each phase."""
LAST_LEVEL = "level 3"
TERA = 1e12
MARKERS = "osD^vPX"
STYLE: Any = {
    **{"svg.fonttype": "none", "svg.hashsalt": "fused_resnet", "axes.grid": True, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.4, "legend.frameon": False},
}
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "fontsize": 9}
Levels = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Plot:
    """A drawing for the page; ``said`` is what a reader hears who does not see it."""

    caption: str
    said: str
    svg: str

    @property
    def source(self) -> str:
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


class Plots:
    """Draws for one report, in which a contender looks alike in all plots: plain eager in greys, this package's in
    blues, the rest in other hues.

    Args:
        contenders: all of the report.
    """

    def __init__(self, contenders: Sequence[str]) -> None:
        eager = [name for name in contenders if name in PLAIN_EAGER]
        ours = [name for name in contenders if is_ours(name)]
        rivals = [name for name in contenders if name not in eager and name not in ours]
        self.colours: dict[str, Any] = {}
        for map_name, names in (("Greys", eager), ("Blues", ours), ("Set2", rivals)):
            colours = matplotlib.colormaps[map_name]
            for place, name in enumerate(names):
                self.colours[name] = colours(place % 8 if map_name == "Set2" else 0.9 - 0.6 * place / len(names))
        self.markers = {name: MARKERS[place % len(MARKERS)] for place, name in enumerate(contenders)}

    def speed_by_batch(self, section: Section) -> Plot | None:
        """Images a second over the batch size, of eager and the fastest others; None for an op or one batch size."""
        batches = sorted({column.measurement.batch_size for column in section.columns})
        points: dict[str, list[tuple[int, float]]] = {}
        for column in section.columns:
            for name, timing in right_timings(column.measurement).items():
                batch = column.measurement.batch_size
                points.setdefault(name, []).append((batch, batch / timing.median))
        several = len({column.letter for column in section.columns}) > 1
        if section.level == OP or len(batches) < 2 or several or not points:
            return None
        fastest = sorted(points, key=lambda name: -max(rate for _, rate in points[name]))
        eager = [name for name in fastest if name in PLAIN_EAGER]
        rivals = [name for name in fastest if name not in eager and not is_ours(name)]
        chosen = [*filter(is_ours, fastest)][:MOST_LINES] + rivals[:MOST_LINES] + eager
        figure, axes = _drawing(6.4, 3.8)
        for name in chosen:
            style = {"linestyle": "-" if is_ours(name) else "--", "color": self.colours[name]}
            axes.plot(*zip(*points[name], strict=True), marker=self.markers[name], label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches], minor=False)
        axes.set(ylim=(0, None), xlabel="batch size", ylabel="images a second")
        axes.legend(ncols=2, **BELOW)
        said = ", ".join(f"{name} {three_digits(points[name][-1][1])}" for name in chosen)
        said = f"{section.title}: images a second by batch size; at batch {batches[-1]}: {said}"
        return _plot(figure, "Images a second by batch size", said)

    def latency(self, column: Column, section: Section) -> Plot | None:
        """Bars of the median time with whiskers from the 20th to the 80th percentile, the fastest on top; None if
        nobody was right."""
        timings, (unit, second) = right_timings(column.measurement), section.unit
        if not timings:
            return None
        names = sorted(timings, key=lambda name: -timings[name].median)
        found = [timings[name] for name in names]
        whiskers = [[t.median - t.p20 for t in found], [t.p80 - t.median for t in found]]
        figure, axes = _drawing(6.4, 0.9 + 0.3 * len(names))
        scaled = [[value / second for value in side] for side in whiskers]
        self._bars(axes, names, [timing.median / second for timing in found], xerr=scaled)
        axes.set_xlabel(f"{unit} a run, batch {column.measurement.batch_size}")
        said = ", ".join(f"{name} {duration(timings[name].median)}" for name in reversed(names))
        caption = column.lettered("Median time, whiskers from the 20th to the 80th percentile")
        return _plot(figure, caption, f"{column.measurement.title}: {said}")

    def memory(self, column: Column) -> Plot | None:
        """Bars of peak memory and of the bytes saved for backward, by contender; None if nobody tells either."""
        outcomes = {name: column.measurement.outcomes[name] for name in right_timings(column.measurement)}
        told = {
            title: {name: value / 1e6 for name, o in outcomes.items() if (value := getattr(o, attribute)) is not None}
            for title, attribute in (("peak", "peak_bytes"), ("saved for backward", "saved_bytes"))
        }
        told = {title: numbers for title, numbers in told.items() if numbers}
        if not told:
            return None
        names = [name for name in outcomes if any(name in numbers for numbers in told.values())]
        figure, grid = _drawing(3 + 3.2 * len(told), 0.9 + 0.3 * len(names), len(told))
        for axes, (title, numbers) in zip([grid] if len(told) == 1 else grid, told.items(), strict=True):
            self._bars(axes, names[::-1], [numbers.get(name, 0.0) for name in reversed(names)])
            axes.set_xlabel(f"{title}, MB")
        said = "; ".join(
            f"{name} " + ", ".join(f"{three_digits(told[t][name])} MB {t}" for t in told if name in told[t])
            for name in names
        )
        return _plot(figure, column.title, f"{column.measurement.title}: {said}")

    def roofline(self, found: Sequence[Section], dtype: str, letter: str) -> Plot | None:
        """FLOP a second over FLOP a byte, of every right contender whose bytes are counted, under the two ceilings; of
        each section at its largest batch size. None if there is nothing of this dtype and result, or no ceilings."""
        largest = [column for section in found if section.dtype == dtype for column in section.largest]
        columns = [column for column in largest if column.letter == letter]
        ceiling = columns[0].result.ceilings.get(dtype) if columns else None
        points: dict[str, list[tuple[float, float]]] = {}
        for column in columns:
            for name in right_timings(column.measurement):
                figure = figures(column.measurement, name, column.result.ceilings)
                if figure.flop_per_byte is not None and figure.flop_per_second is not None:
                    points.setdefault(name, []).append((figure.flop_per_byte, figure.flop_per_second / TERA))
        if ceiling is None or not points:
            return None
        bandwidth, peak = ceiling["bytes_per_second"] / TERA, ceiling["flop_per_second"] / TERA
        ridge, everything = peak / bandwidth, [x for some in points.values() for x, _ in some]
        left, right = min(*everything, ridge) / 2, max(*everything, ridge) * 2
        figure, axes = _drawing(7.2, 4.6)
        axes.loglog([left, ridge, right], [left * bandwidth, peak, peak], color="black", label=ceiling_text(ceiling))
        for name in (name for name in self.colours if name in points):
            style = {"marker": self.markers[name], "color": self.colours[name], "linestyle": "none"}
            axes.loglog(*zip(*points[name], strict=True), alpha=0.85, label=name, **style)
        axes.set(xlabel="FLOP a byte that it moves", ylabel="TFLOP a second")
        axes.legend(ncols=2, **BELOW)
        best = {name: max(rate for _, rate in some) for name, some in points.items()}
        said = ", ".join(f"{name} up to {rate:.3g} TFLOP/s" for name, rate in best.items())
        said = f"Roofline, {dtype}: ceilings {bandwidth * 1e3:.3g} GB/s and {peak:.3g} TFLOP/s; {said}"
        return _plot(figure, f"{letter}: {dtype}" if letter else dtype, said)

    def _bars(self, axes: Any, names: Sequence[str], numbers: Sequence[float], **settings: Any) -> None:
        """One for each name, its number beside it."""
        bars = axes.barh(names, numbers, color=[self.colours[name] for name in names], height=0.66, **settings)
        axes.bar_label(bars, [three_digits(number) if number else "" for number in numbers], padding=5, fontsize=9)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.14)


def ops(found: Sequence[Section]) -> Plot | None:
    """A row for each op, a dot for each of its measurements: how many times as fast the best of ours was as the fastest
    rival; None where no op has both."""
    factors: dict[str, list[float]] = {}
    for section in found:
        for column in section.columns if section.level == OP else ():
            ours, rival = best_of_ours(column.measurement), best_rival(column.measurement)
            if ours is not None and rival is not None:
                name = section.subject.split()[0]
                factors.setdefault(name, []).append(times_faster(column.measurement, ours, rival))
    if not factors:
        return None
    figure, axes = _drawing(6.4, 1.0 + 0.3 * len(factors))
    axes.axvline(1, color="black", linewidth=1)
    for name in sorted(factors, reverse=True):
        axes.plot(factors[name], [name] * len(factors[name]), "o", color="tab:blue")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("as fast as the fastest rival")
    said = ", ".join(f"{name} {min(some):.2f}x to {max(some):.2f}x" for name, some in sorted(factors.items()))
    caption = "Each op, a dot for each measurement: the best of ours against the fastest rival"
    return _plot(figure, caption, f"The best of ours against the fastest rival, by op: {said}")


def step_bytes(model: str, levels: Levels, letter: str) -> Plot | None:
    """Two panels, in MB an image: the bytes of a training step by phase and kind of pass, a bar for each level of
    fusion; and the way from the first of them (eager) down to level 3, level by level. None without two levels."""
    if len(levels) < 2:
        return None
    totals = {level: sum(entry["bytes"] for entry in entries) / 1e6 for level, entries in levels.items()}
    figure, (stacked, waterfall) = _drawing(10.4, 5, 2)
    _draw_stacked(stacked, levels)
    names = list(totals)
    way = names[: names.index(LAST_LEVEL) + 1] if LAST_LEVEL in names else names
    steps = [totals[after] - totals[before] for before, after in itertools.pairwise(way)]
    heights, bottoms = [totals[way[0]], *map(abs, steps), totals[way[-1]]], [0.0, *_lower(totals, way), 0.0]
    colours = ["grey", *("tab:blue" if step <= 0 else "tab:orange" for step in steps), "tab:green"]
    bars = waterfall.bar(range(len(heights)), heights, bottom=bottoms, color=colours)
    signed = (f"{step:+.3g}".replace("-", "\N{MINUS SIGN}") for step in steps)
    waterfall.bar_label(bars, [three_digits(heights[0]), *signed, three_digits(heights[-1])], fontsize=9)
    _name_levels(waterfall, [way[0], *(f"to\n{level}" for level in way[1:]), way[-1]], "level by level")
    said = ", ".join(f"{level} {three_digits(total)} MB" for level, total in totals.items())
    caption = f"{letter}: {model}" if letter else model
    return _plot(figure, caption, f"{model}: bytes read and written by a training step, an image: {said}")


def _lower(totals: Mapping[str, float], way: Sequence[str]) -> list[float]:
    return [min(totals[before], totals[after]) for before, after in itertools.pairwise(way)]


def _draw_stacked(axes: Any, levels: Levels) -> None:
    """The largest kinds of pass of each phase, the rest as "other"."""
    sizes: dict[tuple[str, str], dict[str, float]] = {}
    for level, entries in levels.items():
        for entry in entries:
            sizes.setdefault((entry["phase"], entry["kind"]), {})[level] = entry["bytes"] / 1e6
    shown: dict[str, tuple[Any, dict[str, float]]] = {}
    other: dict[str, float] = {}
    for phase, map_name in (("forward", "Blues_r"), ("backward", "Oranges_r")):
        largest = sorted((k for k in sizes if k[0] == phase), key=lambda key: -max(sizes[key].values()))[:MOST_KINDS]
        for place, key in enumerate(largest):
            shown[" ".join(key)] = matplotlib.colormaps[map_name](0.15 + 0.14 * place), sizes.pop(key)
    for numbers in sizes.values():
        other = {level: other.get(level, 0.0) + numbers.get(level, 0.0) for level in levels}
    shown |= {"other": ("lightgrey", other)} if any(other.values()) else {}
    left = dict.fromkeys(levels, 0.0)
    for label, (colour, numbers) in shown.items():
        heights = {level: numbers.get(level, 0.0) for level in levels}
        axes.bar(range(len(levels)), heights.values(), bottom=[*left.values()], color=colour, label=label)
        left = {level: left[level] + heights[level] for level in levels}
    axes.set_ylabel("MB an image, read and written")
    axes.legend(ncols=2, **BELOW)
    _name_levels(axes, list(levels), "by pass")


def _name_levels(axes: Any, names: Sequence[str], title: str) -> None:
    axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=9)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(visible=False, axis="x")


def _drawing(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """(figure, axes), in inches; of several columns, all axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(1, columns)


def _plot(figure: Any, caption: str, said: str) -> Plot:
    target = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(target, format="svg", metadata={"Date": None})
    return Plot(caption, said, target.getvalue())
