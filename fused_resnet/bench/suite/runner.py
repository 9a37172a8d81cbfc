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
from fused_resnet.bench.result import FAILED, TRAINING_FORWARD, TRAINING_STEP, Measurement, Result
from fused_resnet.bench.roofline import ROUNDS, measure_ceilings
from fused_resnet.bench.suite.condition import differences
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.measure import NO_TIME, key_of, measure, title_of
from fused_resnet.bench.suite.peak_memory import available_bytes
from fused_resnet.bench.suite.resume import Earlier
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.suite.step_ledgers import step_ledgers
from fused_resnet.bench.suite.task import Task

SETUP_WEIGHT = 8
"""What a measurement costs beside its runs, in images of inference."""
STEP_WEIGHT, FORWARD_WEIGHT = 4, 2
"""An image of a training step or forward, in images of inference."""
MOST_MEMORY = 0.8
"""Of what is available, that a batch may be expected to take; on a CPU nothing else would stop the system's killer."""
INTERRUPTED, LEFT_OUT = "interrupted", "left_out"
"""Keys of ``Result.arguments``: whether the run was stopped, and the titles of what it left out, with reasons."""


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        device: where the tasks run.
        method: the rounds of each measurement.
        budget: seconds for everything. Each measurement gets a share of what is left, by its weight.
        longest_run: a doubling of batch sizes ends once the quickest contender takes so many seconds.
        seed: of PyTorch's generator, in front of each measurement.
        ceiling_rounds: of measuring the roofline; 0 not to.
        arguments: what the run was asked for, for the file.
    """

    device: torch.device
    method: Method = field(default_factory=Method)
    budget: float = math.inf
    longest_run: float = math.inf
    seed: int = 0
    ceiling_rounds: int = ROUNDS
    arguments: dict[str, Any] = field(default_factory=dict)


class Listener:
    """Is told how far a run is; this one does nothing."""

    def start(self, weights: Sequence[float]) -> None:
        """There will be so many measurements, of these weights."""

    def begin(self, title: str) -> None:
        """A measurement begins."""

    def stage(self, what: str, done: float) -> None:
        """Of the present measurement ``done`` is over, from 0 to 1, and ``what`` comes now."""

    def finish(self, measurement: Measurement, result: Result) -> None:
        """It is over, and the last of the result."""

    def leave_out(self, title: str, reason: str) -> None:
        """A measurement is not made."""


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
    """Measures the tasks in their order. Ctrl-C ends it early, with what was measured until then.

    Args:
        tasks: emptied on the way, so that a task's tensors go when it is done.
        contenders: who takes part; of each task everyone is asked.
        settings: how.
        listener: is told how far it is.
        save: called with the result so far after each measurement, and at the end.
        before: an earlier result. What it has measured in the same condition and at the same commit is taken over:
            of these tasks what this run need not make, or cannot make better, and of others all (``resume.py``).
        clock, sleep: of this process.
    """
    return _Run(tasks, contenders, settings, listener or Listener(), save, before, clock, sleep).run()


def weight(task: Task) -> float:
    """About what a measurement costs, in images of inference."""
    per_image = {TRAINING_STEP: STEP_WEIGHT, TRAINING_FORWARD: FORWARD_WEIGHT}.get(task.mode, 1)
    return SETUP_WEIGHT + task.batch_size * per_image


class _Run:
    def __init__(
        self,
        tasks: list[Task],
        contenders: Sequence[Contender],
        settings: Settings,
        listener: Listener,
        save: Callable[[Result], object],
        before: Result | None,
        clock: Callable[[], float],
        sleep: Callable[[float], object],
    ) -> None:
        self._tasks, self._contenders, self._settings, self._listener = tasks, contenders, settings, listener
        self._save, self._clock, self._sleep = save, clock, sleep
        self._end = clock() + settings.budget
        self._measured_dtypes: list[torch.dtype] = []
        self._weights = [weight(task) for task in tasks]
        machine = machine_facts(settings.device)  # before the work, so that the load average is of others
        self.result = Result(machine, dict(settings.arguments) | {LEFT_OUT: []}, {}, [])
        self._earlier = Earlier(before, self.result, [contender.name for contender in contenders])

    def run(self) -> Result:
        self._listener.start(self._weights)
        try:
            while self._tasks:
                task = self._tasks.pop(0)
                self._one(task)
                del task
            for dtype in self._measured_dtypes:  # the machine may have been busy when it was asked first
                self._measure_ceilings(dtype)
        except KeyboardInterrupt:
            self.result.arguments[INTERRUPTED] = True
        self.result = self._so_far()
        self._save(self.result)
        return self.result

    def _one(self, task: Task) -> None:
        share, title, key = self._share(), title_of(task), key_of(task)
        self._listener.begin(title)
        measurement = self._earlier.complete(key)
        if measurement is None:
            if kept := self._earlier.why_kept(key):
                self.result.arguments[LEFT_OUT].append(f"{title}: {kept}")
            reason = kept or self._why_not(task)
            measurement = self._earlier.fuller(self._measure(task, share)) if reason is None else self._earlier.get(key)
            if measurement is None:
                self.result.arguments[LEFT_OUT].append(f"{title}: {reason}")
                self._listener.leave_out(title, str(reason))
                return
        self.result.measurements.append(measurement)
        for model, ledgers in step_ledgers(measurement, known=self.result.ledgers).items():
            self.result.ledgers[model] = ledgers
        self._save(self._so_far())
        self._listener.finish(measurement, self.result)

    def _measure(self, task: Task, seconds: float) -> Measurement:
        if task.dtype not in self._measured_dtypes:
            self._measured_dtypes.append(task.dtype)
            self._measure_ceilings(task.dtype)
        torch.manual_seed(self._settings.seed)
        return measure(
            task,
            self._contenders,
            self._settings.method,
            seconds=seconds,
            clock=self._clock,
            sleep=self._sleep,
            stage=self._listener.stage,
        )

    def _so_far(self) -> Result:
        """With what an earlier result has of all that is not measured yet."""
        measured = self.result.measurements
        return dataclasses.replace(self.result, measurements=measured + self._earlier.without(measured))

    def _share(self) -> float:
        """Seconds for the next measurement."""
        left = self._weights[-len(self._tasks) - 1 :]
        return (self._end - self._clock()) * left[0] / sum(left)

    def _why_not(self, task: Task) -> str | None:
        """Why the task is not measured: no time, no memory, or longer runs than wanted; None if it is."""
        if self._clock() >= self._end:
            return NO_TIME
        smaller = [m for m in self.result.measurements if _line(m) == _line_of(task) and m.batch_size < task.batch_size]
        if not smaller:
            return None
        last = max(smaller, key=lambda measurement: measurement.batch_size)
        medians = [outcome.timing.median for outcome in last.outcomes.values() if outcome.timing is not None]
        if not medians and any(outcome.status == FAILED for outcome in last.outcomes.values()):
            return f"nobody managed batch {last.batch_size}"
        if min(medians, default=0.0) > self._settings.longest_run:
            return f"a run of batch {last.batch_size} took {min(medians):.1f} s"
        peak = max((outcome.peak_bytes or 0 for outcome in last.outcomes.values()), default=0)
        expected, available = peak * task.batch_size / last.batch_size, available_bytes(task.device)
        if task.device.type == "cpu" and available is not None and expected > MOST_MEMORY * available:
            return f"it would take {expected / 1e9:.1f} GB, and {available / 1e9:.1f} GB are available"
        return None

    def _measure_ceilings(self, dtype: torch.dtype) -> None:
        """The most that was ever reached."""
        if not self._settings.ceiling_rounds:
            return
        found = measure_ceilings(self._settings.device, dtype, rounds=self._settings.ceiling_rounds)
        known = self.result.ceilings.setdefault(str(dtype).removeprefix("torch."), {})
        for name, value in dataclasses.asdict(found).items():
            known[name] = max(value, known.get(name, 0.0))


def reasons_to_start_anew(before: Result, settings: Settings) -> list[str]:
    """Why a run with these settings would take nothing over from an earlier result."""
    return differences(before, Result(machine_facts(settings.device), settings.arguments, {}, []))


def _line(measurement: Measurement) -> tuple[object, ...]:
    """What measurements at growing batch sizes have in common."""
    return tuple(part for index, part in enumerate(measurement.key) if index != 3)


def _line_of(task: Task) -> tuple[object, ...]:
    return tuple(part for index, part in enumerate(key_of(task)) if index != 3)
