"""How far a run is, and the table of each measurement when it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.progress import TaskProgressColumn
from rich.table import Table
from rich.text import Text

from fused_resnet.bench.console import Bar
from fused_resnet.bench.report.figures import NOTHING, figures, is_ours, megabytes, spread, three_digits, times
from fused_resnet.bench.result import ABSENT, FAILED, RIGHT, WRONG, Measurement, Outcome, Result
from fused_resnet.bench.suite.runner import Listener


class BenchProgress(Bar, Listener):
    """A `Listener` on a rich console."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, TaskProgressColumn())
        self._weights: list[float] = []
        self._told: set[tuple[str, str | None]] = set()
        self._done, self._index = 0.0, -1

    def start(self, weights: Sequence[float]) -> None:
        self._weights = list(weights)
        self.begin_phase("", sum(weights))

    def begin(self, title: str) -> None:
        self._index += 1
        line = f"{self._index + 1} of {len(self._weights)}: {title}"
        self.update(description=line, what="")
        if not self.is_terminal:
            self.say(f"{line} ...")

    def stage(self, what: str, done: float) -> None:
        self.update(completed=self._done + done * self._weights[self._index], what=what)

    def finish(self, measurement: Measurement, result: Result) -> None:
        self.console.print(table(measurement, result.ceilings))
        for line in [*footnotes(measurement, self._told), ""]:
            self.say(line)
        self._advance()

    def leave_out(self, title: str, reason: str) -> None:
        self.say(f"{title}: not measured; {reason}\n")
        self._advance()

    def _advance(self) -> None:
        self._done += self._weights[self._index]
        self.update(completed=self._done, what="", refresh=True)


def table(measurement: Measurement, ceilings: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each contender that was timed, in the order of their speed; the wrong ones, whose speed does not count,
    last. Columns in which nobody has anything are left out.

    What matters is said in words; colour repeats it, in orange and blue, which the colour-blind tell apart."""
    found = Table(title=Text(measurement.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("contender", overflow="fold")
    lines = {name: cells(measurement, name, ceilings) for name in timed(measurement)}
    header = dict.fromkeys(name for line in lines.values() for name in line)
    header = dict.fromkeys(name for name in header if any(line[name] != NOTHING for line in lines.values()))
    for name in header:
        found.add_column(name, justify="left" if name == "numbers" else "right", no_wrap=name != "numbers")
    for name, line in lines.items():
        is_wrong = measurement.outcomes[name].status == WRONG
        style = "orange1" if is_wrong else "bold bright_blue" if is_ours(name) else ""
        found.add_row(Text(name), *(Text(line[column]) for column in header), style=style)
    return found


def timed(measurement: Measurement) -> list[str]:
    """Who has a time: the right ones by their speed, then the wrong ones."""
    medians = {name: o.timing.median for name, o in measurement.outcomes.items() if o.timing is not None}
    return sorted(medians, key=lambda name: (measurement.outcomes[name].status != RIGHT, medians[name]))


def cells(measurement: Measurement, name: str, ceilings: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Of one of `timed`, by the title of their column."""
    outcome, found = measurement.outcomes[name], figures(measurement, name, ceilings)
    assert outcome.timing is not None
    roof, speed = found.roofline_fraction, found.bytes_per_second
    return {
        "ms (20-80 %)": spread(outcome.timing, 1e-3),
        "images/s": NOTHING if found.images_per_second is None else three_digits(found.images_per_second),
        "vs eager": times(found.times_best_eager),
        "setup s": NOTHING if outcome.setup_seconds is None else f"{outcome.setup_seconds:.1f}",
        "peak MB": megabytes(outcome.peak_bytes),
        "saved MB": megabytes(outcome.saved_bytes),
        "GB/s": NOTHING if speed is None else three_digits(speed / 1e9),
        "% roof": NOTHING if roof is None else f"{100 * roof:.0f}",
        "numbers": _verdict(outcome),
    }


def footnotes(measurement: Measurement, told: set[tuple[str, str | None]] | None = None) -> list[str]:
    """Sentences beneath the table: who failed and who is absent, with reasons, and what disturbed the measurement."""
    told = set() if told is None else told
    outcomes = measurement.outcomes.items()
    lines = [f"failed: {name}: {outcome.reason}" for name, outcome in outcomes if outcome.status == FAILED]
    absent = [(name, outcome.reason) for name, outcome in outcomes if outcome.status == ABSENT]
    by_reason: dict[str | None, list[str]] = {}
    for name, reason in absent:
        if (name, reason) not in told:
            by_reason.setdefault(reason, []).append(name)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    if before := len(told.intersection(absent)):
        parts.append(f"{before} for reasons told above")
    told.update(absent)
    lines += [f"absent: {'; '.join(parts)}"] if parts else []
    return lines + [f"note: {note}" for note in measurement.clocks.get("notes", ())]


def _verdict(outcome: Outcome) -> str:
    error = "" if outcome.error is None else f" ({outcome.error:.0e})"
    return f"right{error}" if outcome.status == RIGHT else f"WRONG: {outcome.reason}"
