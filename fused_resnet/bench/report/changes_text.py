"""A comparison in words and tables, and as plain values."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fused_resnet.bench.report import condition
from fused_resnet.bench.report.changes import Bytes, Comparison, Speed, Status
from fused_resnet.bench.report.noise import BETWEEN_RUNS_ALONE, FEWEST_ROUNDS
from fused_resnet.bench.report.text_table import text_table
from fused_resnet.bench.report.wording import NOTHING, duration, megabytes

PROBE = 0.10
"""The change whose visibility is told."""


def comparison_text(found: Comparison) -> str:
    """Markdown: who is compared, what to beware of, tables of what changed, and a last line that sums it up."""
    parts = [
        f"before: {condition.one_line(found.before)}, {found.before.machine.get('date')}\n"
        f"after:  {condition.one_line(found.after)}, {found.after.machine.get('date')}",
        *warnings(found),
    ]
    if statuses := found.statuses:
        parts.append(text_table(["status", "contender", "before", "after", "reason"], [_status(s) for s in statuses]))
    if speeds := _changed([*found.overall, *found.speeds]):
        header = ["time", "contender", "before", "after", "ratio", "interval", ""]
        parts.append(text_table(header, [_speed(speed) for speed in speeds]))
    if found.bytes:
        header = ["bytes", "contender", "of", "MB before", "MB after", "ratio"]
        parts.append(text_table(header, [_bytes(change) for change in found.bytes]))
    return "\n\n".join([*parts, _sight(found), _summary(found)])


def as_plain(found: Comparison) -> dict[str, Any]:
    """For JSON. Ratios are of times, after over before and relative to the references; above 1 is slower."""
    return {
        "before": found.before.machine,
        "after": found.after.machine,
        "threshold": found.threshold,
        "warnings": warnings(found),
        "losses": len(found.losses),
        "speeds": [_plain_speed(speed) for speed in [*found.overall, *found.speeds]],
        "statuses": [{**dataclasses.asdict(change), "loss": change.is_loss} for change in found.statuses],
        "bytes": [dataclasses.asdict(change) for change in found.bytes],
        "turned_rivals": found.turned_rivals,
        "too_few_rounds": found.too_few_rounds,
        "between_runs": found.spreads,
        "peak_noise": found.peak_noise,
        "only_before": found.only_before,
        "only_after": found.only_after,
    }


def warnings(found: Comparison) -> list[str]:
    """What a reader has to know before he believes the comparison: sentences, none if the condition is the same."""
    lines = []
    differing = condition.differences(found.before, found.after)
    if differing:
        told = "; ".join(f"{name} {one} -> {other}" for name, (one, other) in differing.items())
        lines.append(
            f"The conditions differ: {told}. Times are held against contenders that this package does not run, which "
            "may have changed with them."
        )
    if found.turned_rivals:
        lines.append(
            f"{', '.join(found.turned_rivals)} changed against the other contenders that this package does not run; "
            "nothing is held against it."
        )
    alone = Counter(not speed.references for speed in found.speeds)
    if alone[True]:
        lines.append(
            f"{alone[True]} of {alone.total()} times have no contender to be held against that this package does not "
            "run and both results have: what the machine did between the runs is not cancelled in these, and a spread "
            f"of {100 * BETWEEN_RUNS_ALONE:g} % is reckoned with."
        )
    if found.only_before or found.only_after:
        lines.append(
            f"Measured in one of them only, and not compared: {len(found.only_before)} measurements before, "
            f"{len(found.only_after)} after."
        )
    if found.too_few_rounds:
        lines.append(f"{len(found.too_few_rounds)} times have fewer than {FEWEST_ROUNDS} rounds and are not judged.")
    return lines


def _changed(speeds: Sequence[Speed]) -> list[Speed]:
    """Those that changed: losses of ours first, the largest change first."""
    changed = [speed for speed in speeds if speed.kind]
    return sorted(changed, key=lambda speed: (not speed.is_loss, -abs(speed.verdict.value)))


def _speed(speed: Speed) -> list[str]:
    medians = [NOTHING if seconds is None else duration(seconds) for seconds in (speed.before, speed.after)]
    ratio, low, high = (math.exp(value) for value in (speed.verdict.value, speed.verdict.low, speed.verdict.high))
    mark = "LOSS" if speed.is_loss else str(speed.kind)
    return [speed.measurement, speed.contender, *medians, f"{ratio:.3f}", f"{low:.3f}-{high:.3f}", mark]


def _status(change: Status) -> list[str]:
    after = f"{change.after} (LOSS)" if change.is_loss else change.after
    return [change.measurement, change.contender, change.before, after, change.reason or NOTHING]


def _bytes(change: Bytes) -> list[str]:
    ratio = f"{change.after / change.before:.3f}" if change.before else NOTHING
    amounts = [megabytes(change.before), megabytes(change.after)]
    return [change.measurement, change.contender, change.what, *amounts, ratio]


def _sight(found: Comparison) -> str:
    """What the comparison could see."""
    if not found.speeds:
        return "No time was compared."
    spreads = ", ".join(f"{100 * spread:.1f} % of a {level}" for level, spread in found.spreads.items())
    blind = sum(speed.verdict.smallest > math.log1p(PROBE) for speed in found.speeds)
    least = sorted(speed.verdict.smallest for speed in found.speeds)[len(found.speeds) // 2]
    return (
        "A ratio is of times relative to the contenders that this package does not run, round by round; its interval "
        f"holds for all {len(found.speeds) + len(found.overall)} together, and reckons with a spread between runs of "
        f"{spreads}. Half of the times would have shown a change of {100 * math.expm1(least):.0f} %; "
        f"{blind} are too noisy to show one of {100 * PROBE:.0f} %. Peak memory is told where it changed by more than "
        f"that of anyone this package does not run did: {100 * found.peak_noise:.0f} %."
    )


def _summary(found: Comparison) -> str:
    speeds = [*found.overall, *found.speeds]
    slower, faster = (sum(speed.kind == kind for speed in speeds) for kind in ("slower", "faster"))
    threshold = f"{100 * found.threshold:g} %"
    if not (slower or faster or found.statuses or found.bytes):
        return f"No change beyond noise and {threshold}."
    return (
        f"Beyond noise and {threshold}: {slower} slower, {faster} faster; {len(found.statuses)} changes of status, "
        f"{len(found.bytes)} of bytes. Losses: {len(found.losses)}."
    )


def _plain_speed(speed: Speed) -> dict[str, Any]:
    verdict = speed.verdict
    return {
        "measurement": speed.measurement,
        "contender": speed.contender,
        "before_seconds": speed.before,
        "after_seconds": speed.after,
        "ratio": math.exp(verdict.value),
        "interval": [math.exp(verdict.low), math.exp(verdict.high)],
        "smallest_ratio_seen": math.exp(verdict.smallest),
        "change": speed.kind,
        "loss": speed.is_loss,
        "references": list(speed.references),
    }
