"""``bench compare A.json B.json``: what changed between two results beyond noise."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fused_resnet.bench.report.changes import Comparison
from fused_resnet.bench.report.changes_text import as_plain, comparison_text
from fused_resnet.bench.report.comparison import compare
from fused_resnet.bench.report.merge import merged
from fused_resnet.bench.result import Result

LOSS, UNUSABLE = 1, 2
DEFAULT_THRESHOLD = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE.json", help="two results: before and after")
    add("--commits", nargs=2, metavar=("A", "B"), help="instead of files: commits, by their first digits")
    add("--folder", type=Path, help="where the results of --commits are")
    add(
        "--threshold",
        type=_percent,
        default=DEFAULT_THRESHOLD,
        metavar="PERCENT",
        help="smaller changes are not told (default: %(default)s)",
    )
    add("--only", metavar="PATTERN", help="a regular expression: what it finds in 'MEASUREMENT: CONTENDER' is compared")
    add("--json", action="store_true", help="print JSON instead of tables")


def main(arguments: argparse.Namespace) -> int:
    """Prints what changed. 0 if nothing got worse; 1 on a loss of ours past the threshold and beyond noise, or where
    somebody who was right is wrong or fails; 2 if the two cannot be compared."""
    try:
        before, after = _two_results(arguments)
        found = compare(before, after, arguments.threshold / 100, arguments.only)
    except (OSError, ValueError) as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return UNUSABLE
    print(json.dumps(as_plain(found), indent=1) if arguments.json else comparison_text(found))
    return _status(found)


def _status(found: Comparison) -> int:
    return LOSS if found.losses else 0


def _two_results(arguments: argparse.Namespace) -> tuple[Result, Result]:
    if arguments.commits is None:
        if len(arguments.files) != 2:
            raise ValueError(f"takes two files, or --commits A B --folder F; got {len(arguments.files)} files")
        if arguments.folder is not None:
            raise ValueError("--folder is for --commits; got it with two files")
        before, after = arguments.files
        return Result.load(before), Result.load(after)
    if arguments.files or arguments.folder is None:
        raise ValueError("--commits takes --folder, and no files beside it")
    first, second = arguments.commits
    results = _of_folder(arguments.folder)
    return _of_commit(results, first, arguments.folder), _of_commit(results, second, arguments.folder)


def _of_folder(folder: Path) -> list[Result]:
    """The results below a folder; other JSON files are passed over, with a line that says so."""
    results = []
    for path in sorted(folder.rglob("*.json")):
        try:
            results.append(Result.load(path))
        except ValueError as error:
            print(f"bench compare: passed over: {error}", file=sys.stderr)
    return results


def _of_commit(results: list[Result], digits: str, folder: Path) -> Result:
    found = [result for result in results if str(result.machine.get("commit") or "").startswith(digits)]
    conditions = merged(found)
    if not conditions:
        known = sorted({str(result.machine.get("commit")) for result in results})
        raise ValueError(f"no result in {folder} has a commit that begins with {digits!r}; it has {known}")
    if len(conditions) > 1:
        raise ValueError(
            f"the results in {folder} whose commit begins with {digits!r} are of {len(conditions)} different commits "
            "or conditions; name two files instead"
        )
    return conditions[0]


def _percent(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 100:
        raise argparse.ArgumentTypeError(f"must be a percentage from 0 to below 100; got {text!r}")
    return number
