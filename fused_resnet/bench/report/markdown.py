"""The Markdown report."""

from __future__ import annotations

from collections.abc import Sequence

from fused_resnet.bench.report import condition, tables
from fused_resnet.bench.report.losses import contests, losses
from fused_resnet.bench.report.sections import letters, sections
from fused_resnet.bench.report.text_table import text_table
from fused_resnet.bench.result import Result

TITLE = "fused_resnet benchmark"
READING = (
    'Times are medians, with the 20th to 80th percentile in brackets. "to eager" is how many times as fast as the '
    "faster plain eager PyTorch: the median of the quotients of each round. Who was wrong is not compared."
)


def markdown_report(results: Sequence[Result]) -> str:
    """Everything that the results hold; several stand beside each other, each under a letter."""
    found = sections(results)
    parts = [f"# {TITLE}"]
    for result, letter in zip(results, letters(results), strict=True):
        parts.append(f"## Condition{' ' + letter if letter else ''}")
        parts.append("\n".join(f"- {title}: {text}" for title, text in condition.lines(result)))
    if not found:
        return "\n\n".join([*parts, "Nothing was measured."]) + "\n"
    parts += ["## Where ours is not the fastest", _losses(losses(found), contests(found))]
    parts += ["## Measured", READING]
    for section in found:
        parts += [f"### {section.title}", _table(tables.speed(section))]
    for title, table in tables.appendix(found):
        if table.rows:
            parts += [f"## {title}", *([table.note] if table.note else []), _table(table)]
    if reasons := tables.reasons(found):
        parts += ["## Absent, failed or wrong", "\n".join(f"- {line}" for line in reasons)]
    return "\n\n".join(parts) + "\n"


def _losses(sentences: Sequence[str], of: int) -> str:
    if not sentences:
        return f"Nowhere, in {of} measurements."
    head = f"In {len(sentences)} of {of} measurements:"
    return "\n".join([head, "", *(f"- {sentence}" for sentence in sentences)])


def _table(table: tables.Table) -> str:
    return text_table(table.header, [[cell.text for cell in row] for row in table.rows])
