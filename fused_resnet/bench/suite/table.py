"""The table of one measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fused_resnet.bench.report.roles import best_eager, is_ours
from fused_resnet.bench.result import ABSENT, FAILED, OP, RIGHT, WRONG, Measurement, Outcome
from fused_resnet.bench.roofline import Ceilings
from fused_resnet.bench.timer import Timing, ratio

NOTHING = "-"
Cell = Callable[[str, Outcome, Timing], str]


def table(measurement: Measurement, ceilings: dict[str, float] | None) -> Any:
    """A ``rich.table.Table``: a row for each contender that was timed, in the order of their speed; the wrong ones,
    whose speed does not count, last. Columns in which nobody has anything are left out.

    What matters is said in words; colour repeats it, in orange and blue, which the colour-blind tell apart.

    Args:
        ceilings: an entry of ``Result.ceilings``, or None where they are not known.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(title=Text(measurement.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("contender", overflow="fold")
    lines = rows(measurement, ceilings)
    header = [name for name in lines[0] if any(line[name] != NOTHING for line in lines)] if lines else []
    for name in header:
        found.add_column(name, justify="left" if name == "numbers" else "right", no_wrap=name != "numbers")
    order = timed(measurement)
    for name, line in zip(order, lines, strict=True):
        status = measurement.outcomes[name].status
        style = "orange1" if status == WRONG else "bold bright_blue" if is_ours(name) else ""
        found.add_row(Text(name), *(Text(line[column]) for column in header), style=style)
    return found


def timed(measurement: Measurement) -> list[str]:
    """Who has a time: the right ones by their speed, then the wrong ones."""
    medians = {name: o.timing.median for name, o in measurement.outcomes.items() if o.timing is not None}
    return sorted(medians, key=lambda name: (measurement.outcomes[name].status != RIGHT, medians[name]))


def rows(measurement: Measurement, ceilings: dict[str, float] | None) -> list[dict[str, str]]:
    """The cells of each of `timed`, by the title of their column."""
    eager = best_eager(measurement)
    limit = None if ceilings is None else Ceilings(ceilings["bytes_per_second"], ceilings["flop_per_second"])
    reference = None if eager is None else measurement.outcomes[eager].timing
    lines = []
    for name in timed(measurement):
        outcome = measurement.outcomes[name]
        timing = outcome.timing
        assert timing is not None
        moved = outcome.moved_bytes
        least, flop = measurement.least_bytes, measurement.flop
        lines.append(
            {
                "ms (20-80 %)": _milliseconds(timing),
                "images/s": NOTHING if measurement.level == OP else _number(measurement.batch_size / timing.median),
                "vs eager": NOTHING if reference is None else f"{_times(reference, timing):.2f}x",
                "setup s": NOTHING if outcome.setup_seconds is None else f"{outcome.setup_seconds:.1f}",
                "peak MB": _megabytes(outcome.peak_bytes),
                "saved MB": _megabytes(outcome.saved_bytes),
                "GB/s": NOTHING if moved is None else _number(moved / timing.median / 1e9),
                "% roof": NOTHING
                if limit is None or (least is None and flop is None)
                else f"{100 * limit.fraction(timing.median, least or 0, flop or 0):.0f}",
                "numbers": _verdict(outcome),
            }
        )
    return lines


def footnotes(measurement: Measurement, told: set[tuple[str, str | None]] | None = None) -> list[str]:
    """Sentences beneath the table: who failed and who is absent, with reasons, and what disturbed the measurement.

    Args:
        told: who has been said to be absent for which reason; those are only counted, and the others are added.
    """
    told = set() if told is None else told
    lines = [
        f"failed: {name}: {outcome.reason}"
        for name, outcome in measurement.outcomes.items()
        if outcome.status == FAILED
    ]
    absent = [(name, outcome.reason) for name, outcome in measurement.outcomes.items() if outcome.status == ABSENT]
    by_reason: dict[str | None, list[str]] = {}
    for name, reason in absent:
        if (name, reason) not in told:
            by_reason.setdefault(reason, []).append(name)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    if before := len(told.intersection(absent)):
        parts.append(f"{before} for reasons told above")
    if parts:
        lines.append(f"absent: {'; '.join(parts)}")
    told.update(absent)
    return lines + [f"note: {note}" for note in measurement.clocks.get("notes", ())]


def _times(reference: Timing, timing: Timing) -> float:
    """How many times as fast as the reference, round by round; of medians where one had its own rounds."""
    if len(reference.samples) != len(timing.samples):
        return reference.median / timing.median
    return ratio(reference, timing)


def _milliseconds(timing: Timing) -> str:
    median, low, high = (1e3 * seconds for seconds in (timing.median, timing.p20, timing.p80))
    digits = 3 if median < 1 else 2 if median < 10 else 1 if median < 1000 else 0
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _megabytes(value: int | None) -> str:
    return NOTHING if value is None else _number(value / 1e6)


def _verdict(outcome: Outcome) -> str:
    error = "" if outcome.error is None else f" ({outcome.error:.0e})"
    return f"right{error}" if outcome.status == RIGHT else f"WRONG: {outcome.reason}"
