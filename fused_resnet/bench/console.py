"""The terminal that `bench`, `tune` and `demo` write to: its width, and a bar with the time left."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

WHOLE_RUN = 24 * 3600.0  # the time left follows from the speed since the beginning, not of the last seconds
WIDTH_OF_LINES = 160
"""Characters of a table where the output is no terminal."""


def make_console() -> Console:
    """On stdout; wide enough for a table where that is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH_OF_LINES)


class Bar:
    """How far something is; a context manager. Where the output is no terminal there is no bar, and
    whoever has one says lines instead."""

    def __init__(self, console: Console, how_far: ProgressColumn) -> None:
        self.console, self.is_terminal = console, console.is_terminal
        columns = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[what]}"))
        self.bar = Progress(
            *(TextColumn("{task.description}"), BarColumn(bar_width=24), how_far, *columns),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=WHOLE_RUN,
        )
        self._task: Any = None

    def __enter__(self) -> Any:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin_phase(self, description: str, total: float | None) -> None:
        """In place of the phase before."""
        if self._task is not None:
            self.bar.remove_task(self._task)
        self._task = self.bar.add_task(description, total=total, what="")

    def update(self, **changes: Any) -> None:
        """Fields of the task, as of ``rich.progress.Progress.update``."""
        self.bar.update(self._task, **changes)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=not self.is_terminal)
