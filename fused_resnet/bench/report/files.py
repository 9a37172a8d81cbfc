"""The files of a report: the data, CSV, Markdown and, where its packages are installed, the page; ``bench report``
makes them again from results that were saved."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import sys
import warnings
from pathlib import Path
from typing import Any

from fused_resnet.bench.report import condition, tables
from fused_resnet.bench.report.figures import figures, text_table
from fused_resnet.bench.result import Measurement, Result

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
    return [data, *write_reports(result, folder, name)]


def write_reports(result: Result, folder: Path, name: str) -> list[Path]:
    """Writes ``name``.csv, .md and .html of a result."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        _write(folder / f"{name}.csv", csv_text(result)),
        _write(folder / f"{name}.md", markdown_report(result)),
    ]
    if missing := [package for package in PAGE_NEEDS if importlib.util.find_spec(package) is None]:
        warnings.warn(f"{name}.html was not made: {' and '.join(missing)} not installed here", stacklevel=2)
        return written
    from fused_resnet.bench.report.page import page

    return [*written, _write(folder / f"{name}.html", page(result))]


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def csv_text(result: Result) -> str:
    """A row for each contender of each measurement, every number in SI units; an empty cell where nothing is known.

    ``times_best_eager`` is how many times as fast as the faster plain eager, ``roofline_fraction`` the part of the
    measured ceilings that was reached.
    """
    target = io.StringIO()
    writer = csv.DictWriter(target, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for measurement in tables.in_order(result.measurements):
        writer.writerows(_row(result, measurement, contender) for contender in measurement.outcomes)
    return target.getvalue()


def _row(result: Result, measurement: Measurement, contender: str) -> dict[str, Any]:
    outcome = measurement.outcomes[contender]
    row = vars(measurement) | vars(outcome) | vars(figures(measurement, contender, result.ceilings))
    if (timing := outcome.timing) is not None:
        row |= zip(TIMES, (timing.median, timing.p20, timing.p80, len(timing.samples)), strict=True)
    return row | {"contender": contender} | {name: result.machine.get(name) for name in MACHINE}


def markdown_report(result: Result) -> str:
    """Everything that the result holds."""
    found = tables.in_order(result.measurements)
    parts = ["# fused_resnet benchmark", "\n".join(f"- {title}: {text}" for title, text in condition.lines(result))]
    if not found:
        return "\n\n".join([*parts, "Nothing was measured."]) + "\n"
    parts += ["## Summary", tables.standing(found), _table(tables.headline(found)), "## Measured", tables.READING]
    for measurement in found:
        parts += [f"### {measurement.title}", _table(tables.measured(measurement, result.ceilings))]
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
    """Writes the files and prints their paths. Results of the same machine, versions and commit become one. 0, or 2 if
    a file is not a result or they are not of one condition."""
    first, *others = arguments.files
    try:
        results = condition.merged([Result.load(path) for path in arguments.files])
        if len(results) > 1:
            conditions = "; ".join(map(condition.one_line, results))
            raise ValueError(f"the files must be of one condition and commit; got {conditions}")
    except (OSError, ValueError) as error:
        print(f"bench report: {error}", file=sys.stderr)
        return UNUSABLE
    name = arguments.name or (TOGETHER if others else first.stem)
    for path in write_reports(results[0], arguments.output or first.parent, name):
        print(path)
    return 0
