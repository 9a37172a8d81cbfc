"""How far a run is, in a terminal: a bar with the time left, and a table of each measurement when it is done.

Where the output is no terminal there is no bar, and a line says what begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fused_resnet.bench.result import Measurement, Result
from fused_resnet.bench.suite.runner import Listener
from fused_resnet.bench.suite.table import footnotes, table

WHOLE_RUN = 24 * 3600.0  # the time left follows from the speed since the beginning, not of the last seconds
WIDTH_OF_LINES = 140
"""Characters of a table where the output is no terminal."""


def make_console() -> Console:
    """On stdout; wide enough for a table where that is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH_OF_LINES)


class BenchProgress(Listener):
    """A `Listener` on a rich console; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}"),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=WHOLE_RUN,
        )
        self._task: Any = None
        self._weights: list[float] = []
        self._told: set[tuple[str, str | None]] = set()
        self._done, self._index, self._title = 0.0, -1, ""

    def __enter__(self) -> BenchProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, weights: Sequence[float]) -> None:
        self._weights = list(weights)
        self._task = self._bar.add_task("", total=sum(weights), what="")

    def begin(self, title: str) -> None:
        self._index, self._title = self._index + 1, title
        count = f"{self._index + 1} of {len(self._weights)}"
        self._bar.update(self._task, description=f"{count}: {title}", what="")
        if not self._console.is_terminal:
            self._say(f"{count}: {title} ...")

    def stage(self, what: str, done: float) -> None:
        self._bar.update(self._task, completed=self._done + done * self._weights[self._index], what=what)

    def finish(self, measurement: Measurement, result: Result) -> None:
        self._console.print(table(measurement, result.ceilings.get(measurement.dtype)))
        for line in footnotes(measurement, self._told):
            self._say(line)
        self._console.print()
        self._advance()

    def leave_out(self, title: str, reason: str) -> None:
        self._say(f"{title}: not measured; {reason}\n")
        self._advance()

    def _advance(self) -> None:
        self._done += self._weights[self._index]
        self._bar.update(self._task, completed=self._done, what="", refresh=True)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=not self._console.is_terminal)
