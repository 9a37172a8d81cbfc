"""The files of a report: the data, CSV, Markdown and, where its packages are installed, the page; ``bench report``
makes them again from results that were saved."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_resnet.bench.report import condition, tables
from fused_resnet.bench.report.figures import figures, text_table
from fused_resnet.bench.report.tables import Entry, entries, letters
from fused_resnet.bench.result import Result

PAGE_NEEDS = ("jinja2", "matplotlib")
MEASUREMENT = ("level", "subject", "mode", "batch_size", "dtype", "image_size")
TIMES = ("median_seconds", "p20_seconds", "p80_seconds", "rounds")
OUTCOME = ("error", "setup_seconds", "peak_bytes", "saved_bytes", "moved_bytes")
RATES = ("bytes_per_second", "flop_per_second", "roofline_fraction")
MACHINE = ("device", "threads", "torch", "commit", "date")
COLUMNS = (
    *(*MEASUREMENT, "contender", "status", "reason", *TIMES, "images_per_second", "times_best_eager"),
    *(*OUTCOME, "least_bytes", "flop", *RATES, *MACHINE),
)
UNUSABLE = 2
TOGETHER = "report"


def write_all(result: Result, folder: Path, name: str) -> list[Path]:
    """Writes ``name``.json, .csv, .md and .html into ``folder`` and gives their paths.

    The page is left out, with a warning that says so, where jinja2 or matplotlib is not installed: ``bench report``
    makes it from the JSON file elsewhere. The data come first: nothing that fails later loses them.
    """
    data = folder / f"{name}.json"
    result.save(data)
    return [data, *write_reports([result], folder, name)]


def write_reports(results: Sequence[Result], folder: Path, name: str) -> list[Path]:
    """Writes ``name``.csv, .md and .html of these results, beside each other where they are several."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        _write(folder / f"{name}.csv", csv_text(results)),
        _write(folder / f"{name}.md", markdown_report(results)),
    ]
    if missing := [package for package in PAGE_NEEDS if importlib.util.find_spec(package) is None]:
        warnings.warn(f"{name}.html was not made: {' and '.join(missing)} not installed here", stacklevel=2)
        return written
    from fused_resnet.bench.report.page import page

    return [*written, _write(folder / f"{name}.html", page(results))]


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def csv_text(results: Sequence[Result]) -> str:
    """The rows of these results under one header, every number in SI units; an empty cell where nothing is known.

    ``times_best_eager`` is how many times as fast as the faster plain eager, ``roofline_fraction`` the part of the
    measured ceilings that was reached. ``commit`` and the columns beside it tell the results apart.
    """
    target = io.StringIO()
    writer = csv.DictWriter(target, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for entry in entries(results):
        writer.writerows(_row(entry, contender) for contender in entry.measurement.outcomes)
    return target.getvalue()


def _row(entry: Entry, contender: str) -> dict[str, Any]:
    measurement, outcome = entry.measurement, entry.measurement.outcomes[contender]
    row = vars(measurement) | vars(outcome) | vars(figures(measurement, contender, entry.result.ceilings))
    if (timing := outcome.timing) is not None:
        row |= zip(TIMES, (timing.median, timing.p20, timing.p80, len(timing.samples)), strict=True)
    return row | {"contender": contender} | {name: entry.result.machine.get(name) for name in MACHINE}


def markdown_report(results: Sequence[Result]) -> str:
    """Everything that the results hold; several stand beside each other, each under a letter."""
    found = entries(results)
    parts = ["# fused_resnet benchmark"]
    for result, letter in zip(results, letters(results), strict=True):
        parts.append(f"## Condition{' ' + letter if letter else ''}")
        parts.append("\n".join(f"- {title}: {text}" for title, text in condition.lines(result)))
    if not found:
        return "\n\n".join([*parts, "Nothing was measured."]) + "\n"
    parts += ["## Summary", tables.standing(found), _table(tables.headline(found)), "## Measured", tables.READING]
    for entry in found:
        parts += [f"### {entry.title}", _table(tables.measured(entry))]
    if reasons := tables.reasons(found):
        parts += ["## Absent, failed or wrong", "\n".join(f"- {line}" for line in reasons)]
    return "\n\n".join(parts) + "\n"


def _table(table: tables.Table) -> str:
    return text_table(table.header, [[cell.text for cell in row] for row in table.rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="results that `bench` has saved")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(default: where the first file is)")
    parser.add_argument("--name", help=f"of the files (default: that of the one FILE, {TOGETHER!r} of several)")


def main(arguments: argparse.Namespace) -> int:
    """Writes the files and prints their paths. Results of the same machine, versions and commit become one, the others
    stand beside each other. 0, or 2 if a file is not a result."""
    first, *others = arguments.files
    try:
        results = condition.merged([Result.load(path) for path in arguments.files])
    except (OSError, ValueError) as error:
        print(f"bench report: {error}", file=sys.stderr)
        return UNUSABLE
    name = arguments.name or (TOGETHER if others else first.stem)
    for path in write_reports(results, arguments.output or first.parent, name):
        print(path)
    return 0
