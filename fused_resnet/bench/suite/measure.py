"""One measurement: everyone is made ready and checked, then timed in turns, then asked for its memory."""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fused_resnet.bench.report.roles import PLAIN_EAGER
from fused_resnet.bench.result import ABSENT, FAILED, OP, RIGHT, WRONG, Measurement, Outcome
from fused_resnet.bench.suite.clocks import Clocks
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.peak_memory import peak_bytes
from fused_resnet.bench.suite.rounds import Method, measure_rounds
from fused_resnet.bench.suite.task import Prepared, Task

NO_TIME = "left out: the time budget was used up"
SETUP_SHARE = 0.6
"""Of a measurement's time, after which nobody more is made ready."""
NEVER_LEFT_OUT = 3
"""So many are made ready whatever time it takes: plain eager in both memory formats, and one of ours."""
SLOW_TO_SET_UP = ("*compile*", "*tensorrt*")
"""Patterns of the contenders whose compilers take longer than everybody else together."""
LONGEST_REASON = 300

Value = TypeVar("Value")


def key_of(task: Task) -> tuple[object, ...]:
    """``Measurement.key`` of what comes of the task."""
    return _measurement(task, {}).key


def title_of(task: Task) -> str:
    """``Measurement.title`` of what comes of the task."""
    return _measurement(task, {}).title


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
    alone, behind them: in rounds of its own.

    Args:
        seconds: for all of it. Who is not ready after `SETUP_SHARE` of it is left out, but never the first three.
        clock, sleep: of this process.
        stage: called with what happens now, and how much is done of all, from 0 to 1.
    """
    _free(task.device)  # what the measurement before has left
    clocks = Clocks(task.device)
    together = _Group(task, method, clock, sleep, stage, clock() + seconds)
    outcomes = together.measure(contenders, seconds)
    for contender in together.crowded_out:
        _free(task.device)
        alone = _Group(task, method, clock, sleep, stage, clock() + seconds / len(contenders))
        outcomes |= alone.measure([contender], math.inf)
    outcomes = {contender.name: outcomes[contender.name] for contender in contenders}
    return _measurement(task, outcomes, flop=_or_none(task.flop), clocks=clocks.facts())


def in_order_of_setup(contenders: Sequence[Contender]) -> list[Contender]:
    """As they are made ready: who is last is the first to be left out for want of time. Plain eager, ours, everybody
    else, and then those that are `SLOW_TO_SET_UP`."""

    def rank(contender: Contender) -> int:
        if any(fnmatch.fnmatchcase(contender.name.lower(), pattern) for pattern in SLOW_TO_SET_UP):
            return 3
        return 0 if contender.name in PLAIN_EAGER else 1 if contender.ours else 2

    return sorted(contenders, key=rank)


@dataclass
class _Ready:
    prepared: Prepared
    setup_seconds: float
    error: float | None
    reason: str | None


class _Group:
    """Contenders that are held in memory at the same time."""

    def __init__(
        self,
        task: Task,
        method: Method,
        clock: Callable[[], float],
        sleep: Callable[[float], object],
        stage: Callable[[str, float], object],
        end: float,
    ) -> None:
        self._task, self._method, self._end = task, method, end
        self._clock, self._sleep, self._stage = clock, sleep, stage
        self._ready: dict[str, _Ready] = {}
        self._outcomes: dict[str, Outcome] = {}
        self.crowded_out: list[Contender] = []

    def measure(self, contenders: Sequence[Contender], seconds: float) -> dict[str, Outcome]:
        """The outcome of each."""
        last_setup = self._end - (1 - SETUP_SHARE) * seconds if seconds < math.inf else math.inf
        try:
            for index, contender in enumerate(in_order_of_setup(contenders)):
                self._stage(contender.name, 0.5 * index / len(contenders))
                self._prepare(contender, may_start=len(self._ready) < NEVER_LEFT_OUT or self._clock() < last_setup)
            self._time()
        finally:
            for name in list(self._ready):
                self._close(self._ready.pop(name).prepared)
        return self._outcomes

    def _prepare(self, contender: Contender, may_start: bool) -> None:
        name = contender.name
        prepared: Prepared | None = None
        try:
            if reasons := contender.why_absent(self._task):
                self._outcomes[name] = Outcome(ABSENT, "; ".join(reasons))
                return
            if not may_start:
                self._outcomes[name] = Outcome(ABSENT, NO_TIME)
                return
            start = self._clock()
            prepared = contender.prepare(self._task)
            _synchronize(self._task.device)
            setup_seconds = self._clock() - start
            error, reason = self._task.why_wrong(prepared)
            self._ready[name] = _Ready(prepared, setup_seconds, error, reason)
        except Exception as error:
            if prepared is not None:
                self._close(prepared)
            if is_out_of_memory(error) and self._ready:
                self.crowded_out.append(contender)
            self._outcomes[name] = Outcome(FAILED, last_line(error))
            del error
            _free(self._task.device)

    def _time(self) -> None:
        rounds = measure_rounds(
            {name: ready.prepared.run for name, ready in self._ready.items()},
            self._task.device,
            self._method,
            flush_cache=self._task.level == OP,
            seconds=self._end - self._clock(),
            clock=self._clock,
            sleep=self._sleep,
            after_round=lambda done: self._stage("rounds", 0.5 + 0.45 * done),
        )
        for name, error in rounds.failures.items():
            self._outcomes[name] = Outcome(FAILED, last_line(error), setup_seconds=self._ready[name].setup_seconds)
        for name, timing in rounds.timings.items():
            self._stage(f"memory of {name}", 0.95)
            ready = self._ready[name]
            self._outcomes[name] = Outcome(
                RIGHT if ready.reason is None else WRONG,
                ready.reason,
                timing,
                error=ready.error,
                setup_seconds=ready.setup_seconds,
                peak_bytes=_or_none(lambda run=ready.prepared.run: peak_bytes(run, self._task.device)),  # type: ignore[misc]
                saved_bytes=_or_none(ready.prepared.saved_bytes),
                moved_bytes=_or_none(ready.prepared.moved_bytes),
            )

    def _close(self, prepared: Prepared) -> None:
        with contextlib.suppress(Exception):  # what it still holds is lost; its numbers are not
            prepared.close()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a lack of memory: PyTorch's, Python's, or a peer's in its own words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "can't allocate memory", "failed to allocate memory"))


def last_line(error: BaseException) -> str:
    """The kind of the exception and the last line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def _measurement(task: Task, outcomes: dict[str, Outcome], **facts) -> Measurement:
    return Measurement(
        level=task.level,
        subject=task.subject,
        mode=task.mode,
        batch_size=task.batch_size,
        dtype=str(task.dtype).removeprefix("torch."),
        image_size=task.image_size,
        outcomes=outcomes,
        least_bytes=_least_bytes(task, outcomes),
        **facts,
    )


def _least_bytes(task: Task, outcomes: dict[str, Outcome]) -> int | None:
    """What the task says where it knows; else the fewest counted bytes of a contender whose numbers are right."""
    if (told := getattr(task, "least_bytes", None)) is not None and outcomes:
        return told() if callable(told) else told
    counted = [o.moved_bytes for o in outcomes.values() if o.status == RIGHT and o.moved_bytes is not None]
    return min(counted, default=None)


def _or_none(ask: Callable[[], Value]) -> Value | None:
    """A number beside the timing must not cost it: None where asking raises."""
    try:
        return ask()
    except Exception:
        return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # the device may be in an error state; the next use of it will say so
            torch.cuda.empty_cache()
