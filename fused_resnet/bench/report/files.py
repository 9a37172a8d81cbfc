"""The files of a report."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

from fused_resnet.bench.report.csv_file import csv_text
from fused_resnet.bench.report.markdown import markdown_report
from fused_resnet.bench.result import Result

PAGE_NEEDS = ("jinja2", "matplotlib")


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
    texts = {"csv": csv_text(results), "md": markdown_report(results)}
    written = [_write(folder / f"{name}.{ending}", text) for ending, text in texts.items()]
    missing = [package for package in PAGE_NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        warnings.warn(f"{name}.html was not made: {' and '.join(missing)} not installed here", stacklevel=2)
        return written
    from fused_resnet.bench.report.page import page

    return [*written, _write(folder / f"{name}.html", page(results))]


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
