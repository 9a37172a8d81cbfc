"""Figures as inline SVG that takes its colours from the page, so that one drawing suits light and dark.

Matplotlib knows no CSS variables: colours are drawn as numbers that nobody would choose, and replaced in the text.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fused_resnet.bench.report.roles import PLAIN_EAGER, is_ours

INK, GRID, OURS_INK = "ink", "grid", "ours"
EAGERS = ("eager-1", "eager-2", "eager-3")
OURS = ("ours-1", "ours-2", "ours-3", "ours-4", "ours-5", "ours-6", "ours-7", "ours-8")
RIVALS = ("rival-1", "rival-2", "rival-3", "rival-4", "rival-5", "rival-6")
FORWARDS = ("forward-1", "forward-2", "forward-3", "forward-4", "forward-5")
BACKWARDS = ("backward-1", "backward-2", "backward-3", "backward-4", "backward-5")
OTHER = "other"
VARIABLES = (INK, GRID, OURS_INK, *EAGERS, *OURS, *RIVALS, *FORWARDS, *BACKWARDS, OTHER)
"""Each is a CSS variable of the page, in ``page.html.jinja``, with a value for light and one for dark."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
FONT_SIZE = 10


def colour(variable: str) -> str:
    """What stands for a variable of the page in a drawing.

    Raises:
        ValueError: there is no such variable.
    """
    return f"#01fe{VARIABLES.index(variable):02x}"


def series(names: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each contender: plain eager in greys, this package's in blues, the rest in other hues.

    Of more contenders than hues some share one, and differ in the marker.
    """
    groups: dict[tuple[str, ...], int] = {}
    found = {}
    for index, name in enumerate(names):
        hues = EAGERS if name in PLAIN_EAGER else OURS if is_ours(name) else RIVALS
        place = groups[hues] = groups.get(hues, -1) + 1
        found[name] = (colour(hues[place % len(hues)]), MARKERS[index % len(MARKERS)])
    return found


@contextmanager
def drawing(width: float, height: float, columns: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """(figure, axes) in the style of the page, in inches; of several columns, a list of axes."""
    import matplotlib
    from matplotlib.figure import Figure

    ink, grid = colour(INK), colour(GRID)
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fused_resnet",
        "font.size": FONT_SIZE,
        "font.sans-serif": ["DejaVu Sans", "Helvetica Neue", "Arial", "sans-serif"],
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlesize": FONT_SIZE,
        "axes.edgecolor": grid,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "xtick.color": grid,
        "xtick.labelcolor": ink,
        "ytick.color": grid,
        "ytick.labelcolor": ink,
        "legend.frameon": False,
        "legend.fontsize": FONT_SIZE - 1,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        yield figure, figure.subplots(1, columns, **options)


def svg(figure: Any, name: str, description: str) -> str:
    """The figure as an element of a page.

    Args:
        name: of letters, digits and hyphens, of its own on the page: the drawing's own names begin with it.
        description: what a reader hears who does not see it.
    """
    target = io.StringIO()
    # inside the style of `drawing`: text becomes text there, and names are the same each time
    figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = target.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert box is not None
    head = (
        f'<svg role="img" aria-label="{html.escape(description)}" viewBox="{box[0][9:-1]}" '
        f'style="--drawn-width: {float(box[1]) * 4 / 3:.0f}px" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    text = head + re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">") + 1 :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return re.sub(r"#01fe([0-9a-f]{2})", lambda found: f"var(--{VARIABLES[int(found[1], 16)]})", text)
