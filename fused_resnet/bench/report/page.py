"""The HTML page: one file that asks nobody for anything, with the plots inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fused_resnet.bench.report import condition, plots, plots_bytes, tables
from fused_resnet.bench.report.losses import contests, losses
from fused_resnet.bench.report.markdown import READING, TITLE
from fused_resnet.bench.report.sections import Section, letters, sections
from fused_resnet.bench.result import OP, TRAINING_FORWARD, TRAINING_STEP, Result

TEMPLATE = Path(__file__).with_name("page.html.jinja")
OPEN_AT_MOST = 4
"""With more sections than this, the page shows the headline and each of them on a click."""
MOST_OPS_DRAWN = 12
"""Sections at op level; of more of them one figure tells of all, and each has its table."""


@dataclass(frozen=True)
class Plot:
    svg: str
    caption: str


@dataclass
class Part:
    """What the page tells of one section."""

    title: str
    table: tables.Table
    plots: list[Plot] = field(default_factory=list)


def page(results: Sequence[Result]) -> str:
    """The whole page of these results, beside each other where they are several.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    import jinja2

    found = sections(results)
    order = list(dict.fromkeys(name for section in found for name in section.contenders))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    marks = letters(results)
    many_ops = sum(section.level == OP for section in found) > MOST_OPS_DRAWN
    drawn = [section for section in found if not (many_ops and section.level == OP)]
    return environment.get_template(TEMPLATE.name).render(
        title=TITLE,
        conditions=[
            (letter, condition.one_line(result), condition.lines(result))
            for letter, result in zip(marks, results, strict=True)
        ],
        reading=READING,
        headline=tables.headline(found),
        losses=losses(found),
        contests=contests(found),
        overview=_overview(found) if many_ops else [],
        parts=[_part(section, f"s{index}", order, section in drawn) for index, section in enumerate(found)],
        all_open=len(found) <= OPEN_AT_MOST,
        ledgers=_ledgers(results, marks),
        rooflines=_rooflines(found, marks, order),
        memory=_memory(drawn, order),
        appendix=[(title, table) for title, table in tables.appendix(found) if table.rows],
        reasons=tables.reasons(found),
    )


def _overview(found: Sequence[Section]) -> list[Plot]:
    text = plots.ops(found, "ops")
    return (
        []
        if text is None
        else [Plot(text, "Each op, a dot for each measurement: the best of ours against the fastest rival")]
    )


def _part(section: Section, name: str, order: list[str], is_drawn: bool) -> Part:
    part = Part(section.title, tables.speed(section))
    if not is_drawn:
        return part
    if (drawn := plots.speed_by_batch(section, f"{name}-batch", order)) is not None:
        part.plots.append(Plot(drawn, "Images a second by batch size"))
    smallest = section.columns[0].measurement.batch_size
    for index, column in enumerate(section.columns):
        if column.measurement.batch_size != smallest:
            continue
        if (drawn := plots.latency(column, section, f"{name}-time{index}", order)) is not None:
            caption = "Median time, whiskers from the 20th to the 80th percentile"
            part.plots.append(Plot(drawn, f"{column.letter}: {caption}" if column.letter else caption))
    return part


def _rooflines(found: Sequence[Section], marks: Sequence[str], order: list[str]) -> list[Plot]:
    drawn = []
    for letter in marks:
        for dtype in dict.fromkeys(section.dtype for section in found):
            name = f"roofline{letter}-{dtype}"
            if (text := plots_bytes.roofline(found, dtype, letter, name, order)) is not None:
                drawn.append(Plot(text, f"{letter + ': ' if letter else ''}{dtype}"))
    return drawn


def _ledgers(results: Sequence[Result], marks: Sequence[str]) -> list[Plot]:
    drawn: dict[str, Plot] = {}
    for result, letter in zip(results, marks, strict=True):
        for index, (model, levels) in enumerate(result.ledgers.items()):
            name = f"bytes{letter}-{index}"
            if (text := plots_bytes.step_bytes(model, levels, name)) is not None:
                drawn.setdefault(f"{letter}{model}", Plot(text, f"{letter + ': ' if letter else ''}{model}"))
    return list(drawn.values())


def _memory(found: Sequence[Section], order: list[str]) -> list[Plot]:
    """Of training, at the largest batch; of inference where nothing was trained."""
    training = [section for section in found if section.mode in (TRAINING_STEP, TRAINING_FORWARD)]
    drawn = []
    for index, section in enumerate(training or found):
        largest = section.columns[-1].measurement.batch_size
        for place, column in enumerate(section.columns):
            if column.measurement.batch_size == largest:
                text = plots.memory(column, f"memory{index}-{place}", order)
                if text is not None:
                    letter = f"{column.letter}: " if column.letter else ""
                    drawn.append(Plot(text, letter + column.measurement.title))
    return drawn
