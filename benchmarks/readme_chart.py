"""README's chart: how many times as fast as eager PyTorch each network is, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

INK, QUIET, COLORS = "#1f2933", "#7b8794", ("#0b8a6f", "#7cc4b1", "#1273de")
STYLE = {
    "svg.fonttype": "none",  # numbers stay text, which a test reads
    "svg.hashsalt": "fused_resnet",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def label(ratio: float) -> str:
    """Such as "1.59x"."""
    return f"{ratio:.2f}x"


def draw(rows: Mapping[str, Sequence[float | None]], tasks: Sequence[str], device: str, path: Path) -> None:
    """Writes the SVG. ``rows``: for each network a ratio for each task, None where it was not measured."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, len(tasks), sharey=True)
        for axes, task, place, color in zip(panels, tasks, range(len(tasks)), COLORS, strict=True):
            for row, ratios in enumerate(rows.values()):
                if (ratio := ratios[place]) is None:
                    continue
                axes.barh(row, ratio, color=color, height=0.7)
                axes.text(ratio + 0.03, row, label(ratio), va="center", fontsize=9)
            axes.axvline(1, color=QUIET, linewidth=0.9, linestyle="--")
            axes.set_xlim(0, 2.8)
            axes.set_title(task, fontsize=10.5, loc="left", fontweight="bold")
        panels[0].set_yticks(range(len(rows)), list(rows))
        panels[0].invert_yaxis()
        figure.supxlabel(f"times as fast as eager PyTorch in its faster memory format; {device}, float32", fontsize=9.5)
        figure.savefig(path, metadata={"Date": None})
