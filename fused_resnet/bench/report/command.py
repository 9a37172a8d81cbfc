"""``bench report``: CSV, Markdown and the HTML page again, from results that were saved."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fused_resnet.bench.report.condition import merged
from fused_resnet.bench.report.files import write_reports
from fused_resnet.bench.result import Result

UNUSABLE = 2
TOGETHER = "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="results that `bench` has saved")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(default: where the first file is)")
    parser.add_argument("--name", help=f"of the files (default: that of the one FILE, {TOGETHER!r} of several)")


def main(arguments: argparse.Namespace) -> int:
    """Writes the files and prints their paths. Results of the same machine, versions and commit become one, the others
    stand beside each other. 0, or 2 if a file is not a result."""
    first, *others = arguments.files
    try:
        results = merged([Result.load(path) for path in arguments.files])
    except (OSError, ValueError) as error:
        print(f"bench report: {error}", file=sys.stderr)
        return UNUSABLE
    name = arguments.name or (TOGETHER if others else first.stem)
    for path in write_reports(results, arguments.output or first.parent, name):
        print(path)
    return 0
