"""How far a run is, in a terminal, and the table of each measurement when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import TaskProgressColumn
from rich.table import Table
from rich.text import Text

from fused_resnet.bench.console import Bar
from fused_resnet.bench.report import tables
from fused_resnet.bench.report.tables import Ceilings
from fused_resnet.bench.result import ABSENT, FAILED, Measurement, Result
from fused_resnet.bench.suite.runner import Listener

STYLES = {"wrong": "orange1", "ours": "bold bright_blue"}
"""What matters is said in words; colour repeats it, in hues that the colour-blind tell apart."""


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
        self.console.print(terminal_table(measurement, result.ceilings))
        for line in [*footnotes(measurement, self._told), ""]:
            self.say(line)
        self._advance()

    def leave_out(self, title: str, reason: str) -> None:
        self.say(f"{title}: not measured; {reason}\n")
        self._advance()

    def _advance(self) -> None:
        self._done += self._weights[self._index]
        self.update(completed=self._done, what="", refresh=True)


def terminal_table(measurement: Measurement, ceilings: Ceilings) -> Table:
    """`tables.measured` for a terminal."""
    table = tables.measured(measurement, ceilings)
    found = Table(title=Text(measurement.title), title_justify="left", box=box.SIMPLE_HEAD)
    for name in table.header:
        justify: Any = "left" if name in ("contender", "numbers") else "right"
        found.add_column(name, justify=justify, no_wrap=name != "numbers", overflow="fold")
    for row in table.rows:
        kinds = [cell.kind for cell in row]
        style = next((style for kind, style in STYLES.items() if kind in kinds), "")
        found.add_row(*(Text(cell.text) for cell in row), style=style)
    return found


def footnotes(measurement: Measurement, told: set[tuple[str, str | None]]) -> list[str]:
    """Sentences beneath the table: who failed and who is absent, with reasons that were not ``told`` before."""
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
    return lines + ([f"absent: {'; '.join(parts)}"] if parts else [])
