"""The HTML page: one file that asks nobody for anything, with the roofline inside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fused_resnet.bench.report import condition, tables
from fused_resnet.bench.report.roofline_plot import roofline
from fused_resnet.bench.result import Result

TEMPLATE = Path(__file__).with_name("page.html.jinja")
OPEN_AT_MOST = 4
"""With more measurements than this, the page shows the headline and each of them on a click."""


def page(results: Sequence[Result]) -> str:
    """The whole page of these results, beside each other where they are several."""
    import jinja2

    found, marks = tables.entries(results), tables.letters(results)
    dtypes = dict.fromkeys(entry.measurement.dtype for entry in found)
    rooflines = [roofline(found, dtype, letter) for letter in marks for dtype in dtypes]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE.name).render(
        conditions=[
            (letter, condition.one_line(result), condition.lines(result))
            for letter, result in zip(marks, results, strict=True)
        ],
        reading=tables.READING,
        headline=tables.headline(found),
        losses=tables.losses(found),
        contests=tables.contests(found),
        measurements=[(entry.title, tables.measured(entry)) for entry in found],
        all_open=len(found) <= OPEN_AT_MOST,
        rooflines=[plot for plot in rooflines if plot is not None],
        reasons=tables.reasons(found),
    )
