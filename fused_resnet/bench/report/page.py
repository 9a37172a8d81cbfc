"""The HTML page: one file that asks nobody for anything, with the roofline inside it: matplotlib's SVG as it is."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from fused_resnet.bench.report import condition, tables
from fused_resnet.bench.report.figures import PLAIN_EAGER, figures, is_ours, right_timings
from fused_resnet.bench.result import Result

TEMPLATE = Path(__file__).with_name("page.html.jinja")
OPEN_AT_MOST = 4
"""With more measurements than this, the page shows the headline and each of them on a click."""
TERA = 1e12
MARKERS = "osD^vPX"
STYLE: Any = {
    **{"svg.fonttype": "none", "svg.hashsalt": "fused_resnet", "axes.grid": True, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.4, "legend.frameon": False},
}
BELOW: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "fontsize": 9}


def page(result: Result) -> str:
    """The whole page of a result."""
    found = tables.in_order(result.measurements)
    rooflines = [roofline(result, dtype) for dtype in dict.fromkeys(one.dtype for one in found)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE.name).render(
        condition=(condition.one_line(result), condition.lines(result)),
        reading=tables.READING,
        headline=tables.headline(found),
        standing=tables.standing(found),
        measurements=[(one.title, tables.measured(one, result.ceilings)) for one in found],
        all_open=len(found) <= OPEN_AT_MOST,
        rooflines=[plot for plot in rooflines if plot is not None],
        reasons=tables.reasons(found),
    )


@dataclass(frozen=True)
class Plot:
    """A drawing for the page; ``said`` is what a reader hears who does not see it."""

    caption: str
    said: str
    svg: str

    @property
    def source(self) -> str:
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


def looks(contenders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each: plain eager in greys, this package's in blues, the rest in other hues."""
    eager = [name for name in contenders if name in PLAIN_EAGER]
    ours = [name for name in contenders if is_ours(name)]
    rivals = [name for name in contenders if name not in eager and name not in ours]
    found: dict[str, dict[str, Any]] = {}
    for map_name, names in (("Greys", eager), ("Blues", ours), ("Set2", rivals)):
        colours = matplotlib.colormaps[map_name]
        for place, name in enumerate(names):
            colour = colours(place % 8 if map_name == "Set2" else 0.9 - 0.6 * place / len(names))
            found[name] = {"color": colour, "marker": MARKERS[len(found) % len(MARKERS)]}
    return found


def roofline(result: Result, dtype: str) -> Plot | None:
    """FLOP a second over FLOP a byte, of every right contender whose bytes are counted, under the two ceilings. None if
    there is nothing of this dtype, or no ceilings."""
    ceiling = result.ceilings.get(dtype)
    points: dict[str, list[tuple[float, float]]] = {}
    for measurement in [one for one in result.measurements if one.dtype == dtype]:
        for name in right_timings(measurement):
            figure = figures(measurement, name, result.ceilings)
            if figure.flop_per_byte is not None and figure.flop_per_second is not None:
                points.setdefault(name, []).append((figure.flop_per_byte, figure.flop_per_second / TERA))
    if ceiling is None or not points:
        return None
    bandwidth, peak = ceiling["bytes_per_second"] / TERA, ceiling["flop_per_second"] / TERA
    ridge, everything = peak / bandwidth, [x for some in points.values() for x, _ in some]
    left, right = min(*everything, ridge) / 2, max(*everything, ridge) * 2
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = drawing.subplots()
        axes.loglog(
            [left, ridge, right], [left * bandwidth, peak, peak], color="black", label=condition.ceiling_text(ceiling)
        )
        for name, look in looks(list(points)).items():
            axes.loglog(*zip(*points[name], strict=True), alpha=0.85, label=name, linestyle="none", **look)
        axes.set(xlabel="FLOP a byte that it moves", ylabel="TFLOP a second")
        axes.legend(ncols=2, **BELOW)
        target = io.StringIO()
        drawing.savefig(target, format="svg", metadata={"Date": None})
    best = {name: max(rate for _, rate in some) for name, some in points.items()}
    said = ", ".join(f"{name} up to {rate:.3g} TFLOP/s" for name, rate in best.items())
    said = f"Roofline, {dtype}: ceilings {bandwidth * 1e3:.3g} GB/s and {peak:.3g} TFLOP/s; {said}"
    return Plot(dtype, said, target.getvalue())
