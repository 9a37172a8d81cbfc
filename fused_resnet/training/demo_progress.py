"""How far the demo is: one bar in a terminal, a line now and then everywhere else."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES_PER_PHASE = 4


class DemoProgress:
    """A `fused_resnet.training.comparison.Progress` on a rich console; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._in_terminal = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._in_terminal,
        )
        self._task = self._bar.add_task("Loading", total=None, note="")
        self._phase, self._done, self._total = "Loading", 0, 0

    def __enter__(self) -> DemoProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, phase: str, total: int) -> None:
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(phase, total=total, note="")
        self._phase, self._done, self._total = phase, 0, total
        if not self._in_terminal:
            self._print(f"{phase} ...")

    def advance(self, note: str = "") -> None:
        self._done += 1
        self._bar.update(self._task, advance=1, note=note)
        parts_before, parts = ((self._done - back) * LINES_PER_PHASE // self._total for back in (1, 0))
        if not self._in_terminal and note and parts > parts_before:
            self._print(f"{self._phase}: {self._done} of {self._total}, {note}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
