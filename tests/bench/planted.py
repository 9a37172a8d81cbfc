"""Contenders whose times, mistakes and exceptions are planted, on a clock of the test's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fused_resnet.bench.result import INFERENCE, MODEL, Result
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.suite.runner import Settings, run
from fused_resnet.bench.suite.task import Contender, Prepared, Task

METHOD = Method(rounds=6, min_seconds=0.0)


class Machine:
    """Time passes only where somebody works or sleeps."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def contender(self, name: str, seconds: float = 1.0, setup: float = 0.0, **changes: Any) -> Contender:
        """Takes so long; ``changes`` are fields of `Prepared`, or "absent", "fails" (in prepare), "ours" and "run"."""
        absent, fails, ours = changes.pop("absent", []), changes.pop("fails", None), changes.pop("ours", False)

        def work() -> None:
            self.calls.append(name)
            self.now += seconds

        def prepare(task: Task) -> Prepared:
            self.now += setup
            if fails is not None:
                raise fails
            ready = Prepared(run=work, results=lambda: [torch.tensor(1.0)])
            return dataclasses.replace(ready, **changes)

        return Contender(name, lambda task: list(absent), prepare, ours)


class FakeTask(Task):
    level, subject, mode, image_size = MODEL, "fake", INFERENCE, None
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, batch_size: int = 1, **changes: Any) -> None:
        self.batch_size = batch_size
        self.__dict__.update(changes)

    def why_wrong(self, prepared: Prepared) -> tuple[float | None, str | None]:
        error = abs(prepared.results()[0].item() - 1)
        return error, f"differs by {error}" if error > 0.1 else None

    def flop(self) -> int:
        return 1000 * self.batch_size


def run_on(machine: Machine, tasks: list[Task], contenders: list[Contender], **changes: Any) -> Result:
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = {"method": METHOD} | {name: value for name, value in changes.items() if name in names}
    others = {name: value for name, value in changes.items() if name not in names}
    return run(
        tasks, contenders, Settings(torch.device("cpu"), **settings), clock=machine.clock, sleep=machine.sleep, **others
    )


def raising(error: BaseException, after: int = 0) -> Callable[[], None]:
    calls: list[None] = []

    def run() -> None:
        calls.append(None)
        if len(calls) > after:
            raise error

    return run
