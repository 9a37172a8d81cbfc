"""One measurement: everyone is made ready and checked, then timed in turns, then asked for its memory."""

from __future__ import annotations

import contextlib
import dataclasses
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
from fused_resnet.bench.timer import Timing

NO_TIME = "left out: the time budget was used up"
SETUP_SHARE = 0.6
"""Of a measurement's time, after which nobody more is made ready."""
NEVER_LEFT_OUT = 3
"""So many are made ready whatever time it takes: plain eager in both memory formats, and one of ours."""
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
    how: dict[str, Any] = {"clock": clock, "sleep": sleep, "stage": stage}
    outcomes, crowded_out = _measure_together(task, contenders, method, seconds, **how)
    for contender in crowded_out:
        _free(task.device)
        alone, _ = _measure_together(task, [contender], method, seconds / len(contenders), **how)
        outcomes |= alone
    outcomes = {contender.name: outcomes[contender.name] for contender in contenders}
    counted = [o.moved_bytes for o in outcomes.values() if o.status == RIGHT and o.moved_bytes is not None]
    least_bytes = task.least_bytes() if hasattr(task, "least_bytes") else min(counted, default=None)
    return describe(task, outcomes=outcomes, least_bytes=least_bytes, flop=_or_none(task.flop))


def _measure_together(
    task: Task,
    contenders: Sequence[Contender],
    method: Method,
    seconds: float,
    stage: Callable[[str, float], object],
    **clocks: Any,
) -> tuple[dict[str, Outcome], list[Contender]]:
    """The outcome of each, and those that ran out of memory beside others."""
    with Group(task, **clocks) as group:
        end = group.clock() + seconds
        last_setup = end - (1 - SETUP_SHARE) * seconds if seconds < math.inf else math.inf
        for index, contender in enumerate(in_order_of_setup(contenders)):
            stage(contender.name, 0.5 * index / len(contenders))
            group.prepare(contender, may_start=len(group.ready) < NEVER_LEFT_OUT or group.clock() < last_setup)
        timings = group.time(
            list(group.ready), method, end - group.clock(), lambda done: stage("rounds", 0.5 + 0.45 * done)
        )
        for name, timing in timings.items():
            stage(f"memory of {name}", 0.95)
            prepared = group.ready[name]
            group.outcomes[name] = dataclasses.replace(
                group.outcomes[name],
                timing=timing,
                peak_bytes=_or_none(lambda run=prepared.run: peak_bytes(run, task.device)),  # type: ignore[misc]
                saved_bytes=_or_none(prepared.saved_bytes),
                moved_bytes=_or_none(prepared.moved_bytes),
            )
        return group.outcomes, group.crowded_out


def describe(task: Task, outcomes: dict[str, Outcome] | None = None, **facts: Any) -> Measurement:
    """The measurement of a task, without outcomes where it is not made yet."""
    what = (task.level, task.subject, task.mode, task.batch_size, dtype_name(task.dtype), task.image_size)
    return Measurement(*what, outcomes or {}, **facts)


def in_order_of_setup(contenders: Sequence[Contender]) -> list[Contender]:
    """As they are made ready: who is last is the first to be left out for want of time. Plain eager, ours, everybody
    else, and then ``torch.compile``, which takes longer than everybody else together."""

    def rank(contender: Contender) -> int:
        return 3 if "compile" in contender.name else 0 if contender.name in PLAIN_EAGER else 1 if contender.ours else 2

    return sorted(contenders, key=rank)


@dataclass
class Group:
    """Contenders that are held in memory at the same time; a context manager, which closes them at its end.

    Attributes:
        ready: whoever could be made ready and has not failed since; his numbers may be wrong.
        outcomes: what is known so far of everyone.
        crowded_out: who ran out of memory beside others.
    """

    task: Task
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], object] = time.sleep
    ready: dict[str, Prepared] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    crowded_out: list[Contender] = field(default_factory=list)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        for prepared in self.ready.values():
            _close(prepared)
        self.ready.clear()

    def prepare(self, contender: Contender, may_start: bool = True) -> None:
        """Makes it ready and judges its numbers, if it can take part."""
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
            self.outcomes[name] = Outcome(status, reason, error=error, setup_seconds=setup_seconds)
            self.ready[name] = prepared
        except Exception as error:
            if prepared is not None:
                _close(prepared)
            if is_out_of_memory(error) and self.ready:
                self.crowded_out.append(contender)
            self.outcomes[name] = Outcome(FAILED, last_line(error))
            del error
            _free(self.task.device)

    def time(
        self,
        names: Sequence[str],
        method: Method,
        seconds: float,
        after_round: Callable[[float], object] = lambda done: None,
    ) -> dict[str, Timing]:
        """Of these, who take turns; whoever raises has failed, and is no longer ready."""
        runs = {name: self.ready[name].run for name in names}
        how: dict[str, Any] = {"clock": self.clock, "sleep": self.sleep, "after_round": after_round}
        how |= {"flush_cache": self.task.level == OP, "seconds": seconds}
        timings, failures = measure_rounds(runs, self.task.device, method, **how)
        for name, error in failures.items():
            _close(self.ready.pop(name))
            self.outcomes[name] = Outcome(FAILED, last_line(error), setup_seconds=self.outcomes[name].setup_seconds)
        return timings


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
