"""How far the demo is: one bar in a terminal, a line now and then everywhere else."""

from __future__ import annotations

from rich.console import Console
from rich.progress import MofNCompleteColumn

from fused_resnet.bench.console import Bar

LINES_PER_PHASE = 4


class DemoProgress(Bar):
    """A `fused_resnet.training.comparison.Progress` on a rich console; a context manager."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, MofNCompleteColumn())
        self._phase, self._done, self._total = "Loading", 0, 0
        self.begin_phase(self._phase, None)

    def start(self, phase: str, total: int) -> None:
        self.begin_phase(phase, total)
        self._phase, self._done, self._total = phase, 0, total
        if not self.is_terminal:
            self.say(f"{phase} ...")

    def advance(self, note: str = "") -> None:
        self._done += 1
        self.update(advance=1, what=note)
        parts_before, parts = ((self._done - back) * LINES_PER_PHASE // self._total for back in (1, 0))
        if not self.is_terminal and note and parts > parts_before:
            self.say(f"{self._phase}: {self._done} of {self._total}, {note}")

    def stage(self, what: str, done: float) -> None:
        self.update(completed=round(done * self._total), what=what)
