"""One measurement: everyone is made ready and checked, then timed in turns, then asked for its memory."""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from fused_resnet.bench.options import dtype_name
from fused_resnet.bench.report.figures import PLAIN_EAGER
from fused_resnet.bench.result import ABSENT, FAILED, OP, RIGHT, WRONG, Measurement, Outcome
from fused_resnet.bench.suite.peak_memory import peak_bytes
from fused_resnet.bench.suite.rounds import Method, measure_rounds
from fused_resnet.bench.suite.task import Contender, Prepared, Task

NO_TIME = "left out: the time budget was used up"
SETUP_SHARE = 0.6
"""Of a measurement's time, after which nobody more is made ready."""
NEVER_LEFT_OUT = 3
"""So many are made ready whatever time it takes: plain eager in both memory formats, and one of ours."""
SLOW_TO_SET_UP = ("*compile*",)
"""Patterns of the contenders whose compilers take longer than everybody else together."""
LONGEST_REASON = 300
LACKS_OF_MEMORY = ("out of memory", "can't allocate memory", "failed to allocate memory")

Value = TypeVar("Value")


def measure(
    task: Task,
    contenders: Sequence[Contender],
    method: Method,
    *,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
    stage: Callable[[str, float], object] = lambda what, done: None,
) -> Measurement:
    """Measures all contenders that can do the task, and says of the others why they did not.

    Whoever raises has failed, and the others go on. One that runs out of memory beside the others has a second try
    alone, after them: in rounds of its own.

    Args:
        seconds: for all of it. Who is not ready after `SETUP_SHARE` of it is left out, but never the first three.
        clock, sleep: of this process.
        stage: called with what happens now, and how much is done of all, from 0 to 1.
    """
    _free(task.device)  # what the measurement before has left
    together = _Group(task, method, clock, sleep, stage, clock() + seconds)
    outcomes = together.measure(contenders, seconds)
    for contender in together.crowded_out:
        _free(task.device)
        alone = _Group(task, method, clock, sleep, stage, clock() + seconds / len(contenders))
        outcomes |= alone.measure([contender], math.inf)
    outcomes = {contender.name: outcomes[contender.name] for contender in contenders}
    counted = [o.moved_bytes for o in outcomes.values() if o.status == RIGHT and o.moved_bytes is not None]
    least_bytes = task.least_bytes() if hasattr(task, "least_bytes") else min(counted, default=None)
    flop = _or_none(task.flop)
    return describe(task, outcomes=outcomes, least_bytes=least_bytes, flop=flop)


def describe(task: Task, outcomes: dict[str, Outcome] | None = None, **facts: Any) -> Measurement:
    """The measurement of a task, without outcomes where it is not made yet."""
    what = (task.level, task.subject, task.mode, task.batch_size, dtype_name(task.dtype), task.image_size)
    return Measurement(*what, outcomes or {}, **facts)


def in_order_of_setup(contenders: Sequence[Contender]) -> list[Contender]:
    """As they are made ready: who is last is the first to be left out for want of time. Plain eager, ours, everybody
    else, and then those that are `SLOW_TO_SET_UP`."""

    def rank(contender: Contender) -> int:
        if any(fnmatch.fnmatchcase(contender.name.lower(), pattern) for pattern in SLOW_TO_SET_UP):
            return 3
        return 0 if contender.name in PLAIN_EAGER else 1 if contender.ours else 2

    return sorted(contenders, key=rank)


@dataclass
class _Group:
    """Contenders that are held in memory at the same time."""

    task: Task
    method: Method
    clock: Callable[[], float]
    sleep: Callable[[float], object]
    stage: Callable[[str, float], object]
    end: float
    ready: dict[str, tuple[Prepared, Outcome]] = field(default_factory=dict)
    """With what is known before it is timed."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    crowded_out: list[Contender] = field(default_factory=list)

    def measure(self, contenders: Sequence[Contender], seconds: float) -> dict[str, Outcome]:
        """The outcome of each."""
        last_setup = self.end - (1 - SETUP_SHARE) * seconds if seconds < math.inf else math.inf
        try:
            for index, contender in enumerate(in_order_of_setup(contenders)):
                self.stage(contender.name, 0.5 * index / len(contenders))
                self._prepare(contender, may_start=len(self.ready) < NEVER_LEFT_OUT or self.clock() < last_setup)
            self._time()
        finally:
            for prepared, _ in self.ready.values():
                _close(prepared)
            self.ready.clear()
        return self.outcomes

    def _prepare(self, contender: Contender, may_start: bool) -> None:
        name, prepared = contender.name, None
        try:
            if (reasons := contender.why_absent(self.task)) or not may_start:
                self.outcomes[name] = Outcome(ABSENT, "; ".join(reasons) or NO_TIME)
                return
            start = self.clock()
            prepared = contender.prepare(self.task)
            if self.task.device.type == "cuda":
                torch.cuda.synchronize(self.task.device)
            setup_seconds = self.clock() - start
            error, reason = self.task.why_wrong(prepared)
            status = RIGHT if reason is None else WRONG
            self.ready[name] = prepared, Outcome(status, reason, error=error, setup_seconds=setup_seconds)
        except Exception as error:
            if prepared is not None:
                _close(prepared)
            if is_out_of_memory(error) and self.ready:
                self.crowded_out.append(contender)
            self.outcomes[name] = Outcome(FAILED, last_line(error))
            del error
            _free(self.task.device)

    def _time(self) -> None:
        runs = {name: prepared.run for name, (prepared, _) in self.ready.items()}
        how: dict[str, Any] = {"clock": self.clock, "sleep": self.sleep, "flush_cache": self.task.level == OP}
        how |= {"after_round": lambda done: self.stage("rounds", 0.5 + 0.45 * done)}
        rounds = measure_rounds(runs, self.task.device, self.method, seconds=self.end - self.clock(), **how)
        for name, error in rounds.failures.items():
            setup_seconds = self.ready[name][1].setup_seconds
            self.outcomes[name] = Outcome(FAILED, last_line(error), setup_seconds=setup_seconds)
        for name, timing in rounds.timings.items():
            self.stage(f"memory of {name}", 0.95)
            prepared, known = self.ready[name]
            self.outcomes[name] = Outcome(
                *(known.status, known.reason, timing, known.error, known.setup_seconds),
                peak_bytes=_or_none(lambda run=prepared.run: peak_bytes(run, self.task.device)),  # type: ignore[misc]
                saved_bytes=_or_none(prepared.saved_bytes),
                moved_bytes=_or_none(prepared.moved_bytes),
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a lack of memory: PyTorch's, Python's, or a peer's in its own words."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error).lower() for words in LACKS_OF_MEMORY)


def last_line(error: BaseException) -> str:
    """The kind of the exception and the last line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def _or_none(ask: Callable[[], Value]) -> Value | None:
    """A number beside the timing must not cost it: None where asking raises."""
    try:
        return ask()
    except Exception:
        return None


def _close(prepared: Prepared) -> None:
    with contextlib.suppress(Exception):  # what it still holds is lost; its numbers are not
        prepared.close()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # the device may be in an error state; the next use of it will say so
            torch.cuda.empty_cache()
