"""A whole run: one measurement after another, within a budget, saved after each, and able to go on where it stopped."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_resnet.bench.machine import machine_facts
from fused_resnet.bench.options import dtype_name
from fused_resnet.bench.report.condition import reasons_to_start_anew
from fused_resnet.bench.result import TRAINING_FORWARD, TRAINING_STEP, Measurement, Result
from fused_resnet.bench.roofline import ROUNDS, measure_ceilings
from fused_resnet.bench.suite.measure import NO_TIME, describe, measure
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.suite.task import Contender, Task

SETUP_WEIGHT = 8
"""What a measurement costs beside its runs, in images of inference."""
IMAGE_WEIGHT = {TRAINING_STEP: 4, TRAINING_FORWARD: 2}
"""Of an image in training, in images of inference."""
INTERRUPTED, LEFT_OUT = "interrupted", "left_out"
"""Keys of ``Result.arguments``: whether the run was stopped, and the titles of what it left out, with reasons."""


@dataclass(frozen=True)
class Settings:
    """How a run measures: each measurement gets a share of what is left of the ``budget``, in seconds, by its weight;
    ``seed`` is that of PyTorch's generator; without ``ceiling_rounds`` there is no roofline; ``arguments`` are for the
    file."""

    device: torch.device
    method: Method = field(default_factory=Method)
    budget: float = math.inf
    seed: int = 0
    ceiling_rounds: int = ROUNDS
    arguments: dict[str, Any] = field(default_factory=dict)

    def new_result(self) -> Result:
        """Of a run that has measured nothing yet; the load average is that of others."""
        return Result(machine_facts(self.device), dict(self.arguments) | {LEFT_OUT: []}, {}, [])


class Listener:
    """Is told how far a run is: the weights of all measurements; of each when it begins, what comes now and how much of
    it is over, from 0 to 1, and its end or why it is not made. This one does nothing."""

    def start(self, weights: Sequence[float]) -> None: ...

    def begin(self, title: str) -> None: ...

    def stage(self, what: str, done: float) -> None: ...

    def finish(self, measurement: Measurement, result: Result) -> None: ...

    def leave_out(self, title: str, reason: str) -> None: ...


def run(
    tasks: list[Task],
    contenders: Sequence[Contender],
    settings: Settings,
    listener: Listener | None = None,
    *,
    save: Callable[[Result], object] = lambda result: None,
    before: Result | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> Result:
    """Measures the tasks in their order, which are let go on the way. Ctrl-C ends it early, with what was measured
    until then; ``save`` is called with the result so far after each measurement, and at the end.

    What an earlier result, ``before``, has measured in the same condition and at the same commit is taken over: of
    these tasks what this run need not make, or cannot make better, and of others all.
    """
    result, earlier = settings.new_result(), list[Measurement]()
    if before is not None and not reasons_to_start_anew(before, result):
        earlier = before.measurements
        loads = [load for one in (before, result) if (load := one.machine.get("load_average")) is not None]
        result.machine.update({"load_average": max(loads)} if loads else {})
        result.ceilings.update(before.ceilings)
    known = {measurement.key: measurement for measurement in earlier}
    return _Run(tasks, contenders, settings, listener or Listener(), save, clock, sleep, result, known).run()


def weight(task: Task) -> float:
    """About what a measurement costs, in images of inference."""
    return SETUP_WEIGHT + task.batch_size * IMAGE_WEIGHT.get(task.mode, 1)


@dataclass
class _Run:
    tasks: list[Task]
    contenders: Sequence[Contender]
    settings: Settings
    listener: Listener
    save: Callable[[Result], object]
    clock: Callable[[], float]
    sleep: Callable[[float], object]
    result: Result
    earlier: dict[tuple[Any, ...], Measurement]
    measured_dtypes: list[torch.dtype] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.end = self.clock() + self.settings.budget
        self.weights = [weight(task) for task in self.tasks]

    def run(self) -> Result:
        self.listener.start(self.weights)
        try:
            while self.tasks:
                task = self.tasks.pop(0)
                self._one(task)
                del task
            for dtype in self.measured_dtypes:  # the machine may have been busy when it was asked first
                self._measure_ceilings(dtype)
        except KeyboardInterrupt:
            self.result.arguments[INTERRUPTED] = True
        self.result = self._so_far()
        self.save(self.result)
        return self.result

    def _one(self, task: Task) -> None:
        share, like = self._share(), describe(task)
        self.listener.begin(like.title)
        measurement = known = self.earlier.get(like.key)
        had_a_turn = set() if known is None else _had_a_turn(known)
        names = {contender.name for contender in self.contenders}
        if known is None or not names <= had_a_turn:  # somebody is missing in it
            others = ", ".join(sorted(had_a_turn - names))
            kept = f"it was measured with {others}, not asked for now" if others else None
            reason = kept or (NO_TIME if self.clock() >= self.end else None)
            if reason is None:
                made = self._measure(task, share)
                measurement = made if had_a_turn <= _had_a_turn(made) else known  # the fuller one
            if kept or measurement is None:
                self.result.arguments[LEFT_OUT].append(f"{like.title}: {reason}")
            if measurement is None:
                self.listener.leave_out(like.title, str(reason))
                return
        assert measurement is not None
        self.result.measurements.append(measurement)
        self.save(self._so_far())
        self.listener.finish(measurement, self.result)

    def _measure(self, task: Task, seconds: float) -> Measurement:
        if task.dtype not in self.measured_dtypes:
            self.measured_dtypes.append(task.dtype)
            self._measure_ceilings(task.dtype)
        torch.manual_seed(self.settings.seed)
        how: dict[str, Any] = {"clock": self.clock, "sleep": self.sleep, "stage": self.listener.stage}
        return measure(task, self.contenders, self.settings.method, seconds=seconds, **how)

    def _so_far(self) -> Result:
        """With what an earlier result has of all that is not measured yet."""
        measured = {measurement.key: measurement for measurement in self.result.measurements}
        others = [measurement for key, measurement in self.earlier.items() if key not in measured]
        return dataclasses.replace(self.result, measurements=[*measured.values(), *others])

    def _share(self) -> float:
        """Seconds for the next measurement."""
        left = self.weights[-len(self.tasks) - 1 :]
        return (self.end - self.clock()) * left[0] / sum(left)

    def _measure_ceilings(self, dtype: torch.dtype) -> None:
        """The most that was ever reached."""
        if self.settings.ceiling_rounds:
            found = measure_ceilings(self.settings.device, dtype, rounds=self.settings.ceiling_rounds)
            known = self.result.ceilings.setdefault(dtype_name(dtype), {})
            for name, value in dataclasses.asdict(found).items():
                known[name] = max(value, known.get(name, 0.0))


def _had_a_turn(measurement: Measurement) -> set[str]:
    """Who was not left out for want of time."""
    return {name for name, outcome in measurement.outcomes.items() if outcome.reason != NO_TIME}
