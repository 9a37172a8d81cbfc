"""How far a run of ``tune`` is, and what it found, in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fused_resnet.bench.tune.measure import Found
from fused_resnet.bench.tune.run import Outcome
from fused_resnet.bench.tune.subject import Subject

WHOLE_RUN = 24 * 3600.0  # the time left follows from the speed since the beginning, not of the last seconds


class TuneProgress:
    """A bar with the time left; a context manager. Where the output is no terminal, a line for each answer."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[title]}"),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=WHOLE_RUN,
        )
        self._task: Any = self._bar.add_task(what, total=total, title="")
        self._what, self._total, self._done = what, total, 0

    def __enter__(self) -> TuneProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.update(self._task, title="")
        self._bar.stop()

    def begin(self, subject: Subject) -> None:
        self._bar.update(self._task, title=subject.title)

    def finish(self, subject: Subject, found: Found | None) -> None:
        if not self._console.is_terminal:
            answer = "nothing ran" if found is None else answer_of(found)
            self._console.print(f"{self._done + 1} of {self._total}: {subject.title}: {answer}", markup=False)
        self.advance()

    def advance(self) -> None:
        self._done += 1
        self._bar.advance(self._task)


def answer_of(found: Found) -> str:
    """In a few words."""
    if math.isnan(found.ratio):
        return f"{found.winner}; {found.heuristic} cannot run"
    if found.winner == found.heuristic:
        alone = " (nothing else can run)" if len(found.seconds) == 1 else ""
        return f"{found.heuristic} stays{alone}"
    return f"{found.winner}, {found.ratio:.2f}x as fast as {found.heuristic}"


def table(results: Sequence[tuple[Subject, Found]]) -> Table:
    """A row for each shape: what is written, what was fastest and how much faster it is, those that gain most first."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("shape", overflow="fold")
    for title in ("as written", "fastest", "ratio"):
        found.add_column(title, justify="right" if title == "ratio" else "left", overflow="fold")
    for subject, each in sorted(results, key=lambda result: -_gain(result[1])):
        changed = each.winner != each.heuristic
        ratio = "-" if math.isnan(each.ratio) else f"{each.ratio:.2f}x"
        cells = (subject.title, each.heuristic, each.winner if changed else "the same", ratio if changed else "")
        found.add_row(*map(Text, cells), style="bold bright_blue" if changed else "")
    return found


def summary(outcome: Outcome, known: int, path: Path) -> list[str]:
    """Lines for behind the table."""
    changed = sum(found.winner != found.heuristic for _, found in outcome.found)
    lines = [f"{len(outcome.found)} measured, {changed} of them faster than as written; {known} were known before"]
    for subject, found in outcome.found:
        lines += [f"dropped: {name} of {subject.title}: {reason}" for name, reason in found.dropped.items()]
    lines += [f"not measured: {title}: {reason}" for title, reason in outcome.failed.items()]
    if outcome.left:
        shown = ", ".join(outcome.left[:3]) + (", ..." if len(outcome.left) > 3 else "")
        why = "interrupted" if outcome.interrupted else "the time was used up"
        lines.append(f"left: {len(outcome.left)} ({why}): {shown}; the same command goes on there")
    return [*lines, f"plan: {path}"]


def _gain(found: Found) -> float:
    return math.inf if math.isnan(found.ratio) else found.ratio
