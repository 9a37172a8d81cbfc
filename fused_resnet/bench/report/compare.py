"""``bench compare A.json B.json``: what changed between two results beyond noise, in words and tables."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fused_resnet.bench.options import missing_packages
from fused_resnet.bench.report import condition
from fused_resnet.bench.report.figures import NOTHING, duration, text_table
from fused_resnet.bench.result import Result

if TYPE_CHECKING:
    from fused_resnet.bench.report.comparison import Comparison, Speed

LOSS, UNUSABLE = 1, 2
PROBE = 0.10
"""The change whose visibility is told."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, threshold_help = parser.add_argument, "smaller changes are not told (default: %(default)s)"
    add("files", nargs=2, type=Path, metavar="FILE.json", help="two results: before and after")
    add("--threshold", type=float, default=5.0, metavar="PERCENT", help=threshold_help)


def main(arguments: argparse.Namespace) -> int:
    """Prints what changed. 0 if nothing got worse; 1 on a loss of ours past the threshold and beyond noise, or where
    somebody who was right is wrong or fails; 2 if the two cannot be compared."""
    try:
        if missing := missing_packages("bench", {"scipy": "scipy"}):
            raise ValueError(missing)
        from fused_resnet.bench.report.comparison import compare

        before, after = map(Result.load, arguments.files)
        found = compare(before, after, arguments.threshold / 100)
    except (OSError, ValueError) as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return UNUSABLE
    print(comparison_text(found))
    return LOSS if found.losses else 0


def comparison_text(found: Comparison) -> str:
    """Markdown: who is compared, what to beware of, tables of what changed, and a last line that sums it up."""
    parts = [
        f"before: {condition.one_line(found.before)}, {found.before.machine.get('date')}\n"
        f"after:  {condition.one_line(found.after)}, {found.after.machine.get('date')}",
        *warnings(found),
    ]
    statuses = [
        [s.measurement, s.contender, s.before, f"{s.after}{' (LOSS)' if s.is_loss else ''}", s.reason or NOTHING]
        for s in found.statuses
    ]
    speeds = [*found.overall, *found.speeds]
    changed = sorted(  # losses of ours first, the largest change first
        (speed for speed in speeds if speed.kind), key=lambda speed: (not speed.is_loss, -abs(speed.verdict.value))
    )
    for header, rows in (
        (["status", "contender", "before", "after", "reason"], statuses),
        (["time", "contender", "before", "after", "ratio", "interval", ""], [*map(_row, changed)]),
    ):
        parts += [text_table(header, rows)] if rows else []
    slower, faster = (sum(speed.kind == kind for speed in speeds) for kind in ("slower", "faster"))
    threshold = f"{100 * found.threshold:g} %"
    summary = f"No change beyond noise and {threshold}."
    if changed or statuses:
        summary = (
            f"Beyond noise and {threshold}: {slower} slower, {faster} faster; {len(statuses)} changes of status. "
            f"Losses: {len(found.losses)}."
        )
    return "\n\n".join([*parts, _sight(found), summary])


def warnings(found: Comparison) -> list[str]:
    """What a reader has to know before he believes the comparison: sentences, none if the condition is the same."""
    differing = condition.differences(found.before, found.after)
    told = "; ".join(f"{name} {one} -> {other}" for name, (one, other) in differing.items())
    alone = sum(not speed.references for speed in found.speeds)
    lines = {
        f"The conditions differ: {told}. Times are held against contenders that this package does not run, which "
        "may have changed with them.": differing,
        f"{', '.join(found.turned_rivals)} changed against the other contenders that this package does not run; "
        "nothing is held against it.": found.turned_rivals,
        f"{alone} of {len(found.speeds)} times have no contender to be held against that this package does not run and "
        "both results have: what the machine did between the runs is not cancelled in these, and a larger spread is "
        "reckoned with.": alone,
        f"Measured in one of them only, and not compared: {len(found.only_before)} measurements before, "
        f"{len(found.only_after)} after.": found.only_before or found.only_after,
        f"{len(found.too_few_rounds)} times have too few rounds and are not judged.": found.too_few_rounds,
    }
    return [line for line, is_so in lines.items() if is_so]


def _row(speed: Speed) -> list[str]:
    ratio, low, high = (math.exp(value) for value in (speed.verdict.value, speed.verdict.low, speed.verdict.high))
    medians, mark = map(duration, (speed.before, speed.after)), "LOSS" if speed.is_loss else str(speed.kind)
    return [speed.measurement, speed.contender, *medians, f"{ratio:.3f}", f"{low:.3f}-{high:.3f}", mark]


def _sight(found: Comparison) -> str:
    """What the comparison could see."""
    if not found.speeds:
        return "No time was compared."
    spreads = ", ".join(f"{100 * spread:.1f} % of a {level}" for level, spread in found.spreads.items())
    smallest = sorted(speed.verdict.smallest for speed in found.speeds)
    half, blind = math.expm1(smallest[len(smallest) // 2]), sum(each > math.log1p(PROBE) for each in smallest)
    return (
        "A ratio is of times relative to the contenders that this package does not run, round by round; its interval "
        f"holds for all {len(found.speeds) + len(found.overall)} together, and reckons with a spread between runs of "
        f"{spreads}. Half of the times would have shown a change of {100 * half:.0f} %; {blind} are too noisy to show "
        f"one of {100 * PROBE:.0f} %."
    )
