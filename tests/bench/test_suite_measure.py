"""One measurement of contenders whose times, mistakes and exceptions are planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_resnet.bench.result import ABSENT, FAILED, OP, RIGHT, WRONG, Outcome
from fused_resnet.bench.suite.measure import is_out_of_memory, last_line, measure
from fused_resnet.bench.suite.task import Contender, Prepared, Task
from tests.bench.planted import METHOD, FakeTask, Machine, raising, run_on


def outcomes_of(machine: Machine, *contenders: Contender, **changes: Any) -> dict[str, Outcome]:
    task = FakeTask(**changes)
    return measure(task, contenders, METHOD, clock=machine.clock, sleep=machine.sleep).outcomes


def test_everyone_gets_his_own_times(machine):
    found = outcomes_of(machine, machine.contender("slow", 3.0, setup=7.0), machine.contender("fast", 1.0))
    assert found["slow"].timing.samples == pytest.approx([3.0] * 6)
    assert found["fast"].timing.samples == pytest.approx([1.0] * 6)
    assert (found["slow"].setup_seconds, found["fast"].setup_seconds) == (7.0, 0.0)
    assert {outcome.status for outcome in found.values()} == {RIGHT}


def test_wrong_numbers_are_marked_and_still_timed(machine):
    found = outcomes_of(
        machine, machine.contender("right"), machine.contender("wrong", 0.5, results=lambda: [torch.tensor(1.5)])
    )
    assert (found["right"].status, found["right"].reason) == (RIGHT, None)
    wrong = found["wrong"]
    assert (wrong.status, wrong.reason, wrong.error) == (WRONG, "differs by 0.5", 0.5)
    assert wrong.timing.median == 0.5


def test_the_absent_say_why_and_are_not_prepared(machine):
    found = outcomes_of(
        machine, machine.contender("a", absent=["no GPU", "too old"], setup=9.0), machine.contender("b")
    )
    assert found["a"] == Outcome(ABSENT, "no GPU; too old")
    assert found["b"].status == RIGHT


@pytest.mark.parametrize(
    "changes",
    [
        {"fails": RuntimeError("first\n  the last line\n")},
        {"results": raising(RuntimeError("first\n  the last line\n"))},
        {"run": raising(RuntimeError("first\n  the last line\n"))},
        {"run": raising(RuntimeError("first\n  the last line\n"), after=4)},
    ],
    ids=["prepare", "numbers", "first run", "a later run"],
)
def test_whoever_raises_has_failed_and_the_others_go_on(machine, changes):
    found = outcomes_of(machine, machine.contender("bad", **changes), machine.contender("good"))
    assert (found["bad"].status, found["bad"].reason) == (FAILED, "RuntimeError: the last line")
    assert found["bad"].timing is None
    assert found["good"].timing.samples == pytest.approx([1.0] * 6)


def test_a_reason_that_raises_is_a_failure(machine):
    def why_absent(task: Task) -> list[str]:
        raise OSError("a library is damaged")

    found = outcomes_of(
        machine, Contender("bad", why_absent, machine.contender("x").prepare), machine.contender("good")
    )
    assert found["bad"].reason == "OSError: a library is damaged"
    assert found["good"].status == RIGHT


def test_everyone_is_closed_whatever_happens(machine):
    closed: list[str] = []
    contenders = [
        machine.contender("good", close=lambda: closed.append("good")),
        machine.contender("wrong", close=lambda: closed.append("wrong"), results=raising(ValueError())),
        machine.contender("bad", close=lambda: closed.append("bad"), run=raising(ValueError())),
        machine.contender("worse", close=raising(ValueError())),
    ]
    outcomes_of(machine, *contenders)
    assert sorted(closed) == ["bad", "good", "wrong"]
    closed.clear()
    with pytest.raises(KeyboardInterrupt):
        outcomes_of(machine, contenders[0], machine.contender("stop", run=raising(KeyboardInterrupt(), after=3)))
    assert closed == ["good"]


def test_who_runs_out_of_memory_beside_others_is_measured_alone(machine):
    held: list[str] = []

    def greedy(name: str) -> Contender:
        easy = machine.contender(name, 2.0, close=lambda: held.remove(name))

        def prepare(task: Task) -> Prepared:
            if held:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            held.append(name)
            return easy.prepare(task)

        return Contender(name, easy.why_absent, prepare)

    found = outcomes_of(machine, greedy("first"), greedy("second"), greedy("third"))
    assert list(found) == ["first", "second", "third"]
    assert all(outcome.timing.samples == pytest.approx([2.0] * 6) for outcome in found.values())
    assert held == []


def test_who_runs_out_of_memory_alone_has_failed(machine):
    calls: list[int] = []
    greedy = machine.contender("greedy", fails=MemoryError("no more"))
    counted = Contender("greedy", greedy.why_absent, lambda task: (calls.append(1), greedy.prepare(task))[1])
    assert outcomes_of(machine, counted)["greedy"] == Outcome(FAILED, "MemoryError: no more")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
            True,
        ),
        (RuntimeError("Failed to allocate memory for requested buffer of size 8"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_out_of_memory_in_everybodys_words(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_last_line_of_an_exception():
    assert last_line(KeyError()) == "KeyError"
    assert len(last_line(ValueError("x" * 5000))) == 300


def test_bytes_are_asked_once_and_their_absence_costs_nothing(machine):
    asked: list[str] = []
    found = outcomes_of(
        machine,
        machine.contender("a", moved_bytes=lambda: asked.append("a") or 700, saved_bytes=lambda: 50),
        machine.contender("b", moved_bytes=raising(NotImplementedError("no row")), saved_bytes=raising(ValueError())),
    )
    assert asked == ["a"]
    assert (found["a"].moved_bytes, found["a"].saved_bytes) == (700, 50)
    assert (found["b"].status, found["b"].moved_bytes, found["b"].saved_bytes) == (RIGHT, None, None)


def test_least_bytes_are_the_tasks_own_or_the_fewest_of_a_right_contender(machine):
    contenders = [
        machine.contender("a", moved_bytes=lambda: 700),
        machine.contender("b", moved_bytes=lambda: 500),
        machine.contender("wrong", moved_bytes=lambda: 5, results=lambda: [torch.tensor(9.0)]),
    ]
    (measured,) = run_on(machine, [FakeTask()], contenders).measurements
    assert (measured.least_bytes, measured.flop) == (500, 1000)
    (measured,) = run_on(machine, [FakeTask(level=OP, least_bytes=lambda: 300)], contenders).measurements
    assert measured.least_bytes == 300
