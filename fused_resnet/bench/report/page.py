"""The HTML page: one file that asks nobody for anything, with the plots inside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fused_resnet.bench.report import condition, plots, tables
from fused_resnet.bench.report.plots import Plot, Plots
from fused_resnet.bench.report.sections import READING, TITLE, Section, letters, sections
from fused_resnet.bench.result import INFERENCE, OP, Result

TEMPLATE = Path(__file__).with_name("page.html.jinja")
OPEN_AT_MOST = 4
"""With more sections than this, the page shows the headline and each of them on a click."""
MOST_OPS_DRAWN = 12
"""Sections at op level; of more of them one figure tells of all, and each has its table."""


def page(results: Sequence[Result]) -> str:
    """The whole page of these results, beside each other where they are several."""
    import jinja2

    found, marks = sections(results), letters(results)
    draw = Plots(list(dict.fromkeys(name for section in found for name in section.contenders)))
    many_ops = sum(section.level == OP for section in found) > MOST_OPS_DRAWN
    drawn = [section for section in found if not (many_ops and section.level == OP)]
    dtypes = dict.fromkeys(section.dtype for section in found)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE.name).render(
        title=TITLE,
        conditions=[
            (letter, condition.one_line(result), condition.lines(result))
            for letter, result in zip(marks, results, strict=True)
        ],
        reading=READING,
        headline=tables.headline(found),
        losses=tables.losses(found),
        contests=tables.contests(found),
        overview=_present([plots.ops(found)] if many_ops else []),
        parts=[
            (section.title, tables.speed(section), _plots(section, draw) if section in drawn else [])
            for section in found
        ],
        all_open=len(found) <= OPEN_AT_MOST,
        ledgers=_ledgers(results, marks),
        rooflines=_present(draw.roofline(found, dtype, letter) for letter in marks for dtype in dtypes),
        memory=_memory(drawn, draw),
        appendix=tables.appendix(found),
        reasons=tables.reasons(found),
    )


def _plots(section: Section, draw: Plots) -> list[Plot]:
    smallest = section.columns[0].measurement.batch_size
    first = [column for column in section.columns if column.measurement.batch_size == smallest]
    return _present([draw.speed_by_batch(section), *(draw.latency(column, section) for column in first)])


def _ledgers(results: Sequence[Result], marks: Sequence[str]) -> list[Plot]:
    everything = [
        (m, model, levels) for m, r in zip(marks, results, strict=True) for model, levels in r.ledgers.items()
    ]
    return _present(plots.step_bytes(model, levels, mark) for mark, model, levels in everything)


def _memory(found: Sequence[Section], draw: Plots) -> list[Plot]:
    """Of training, at the largest batch; of inference where nothing was trained."""
    training = [section for section in found if section.mode != INFERENCE]
    return _present(draw.memory(column) for section in training or found for column in section.largest)


def _present(drawn: Iterable[Any]) -> list[Plot]:
    return [plot for plot in drawn if plot is not None]
