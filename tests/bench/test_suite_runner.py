"""A run of the suite on contenders whose times, mistakes and exceptions are planted, on a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_resnet.bench.result import ABSENT, RIGHT, TRAINING_STEP, Result
from fused_resnet.bench.roofline import Ceilings
from fused_resnet.bench.suite import runner
from fused_resnet.bench.suite.measure import NO_TIME
from fused_resnet.bench.suite.rounds import LEAST_ROUNDS, Method
from fused_resnet.bench.suite.runner import INTERRUPTED, LEFT_OUT, Listener, weight
from tests.bench.planted import FakeTask, raising, run_on


def test_a_run_is_saved_after_each_measurement_and_its_tasks_are_let_go(machine, tmp_path):
    path, seen = tmp_path / "new" / "run.json", []

    def save(result: Result) -> None:
        result.save(path)
        seen.append([m.batch_size for m in Result.load(path).measurements])

    tasks = [FakeTask(1), FakeTask(2)]
    result = run_on(machine, tasks, [machine.contender("a")], save=save, arguments={"dry": True})
    assert seen == [[1], [1, 2], [1, 2]]
    assert tasks == []
    assert Result.load(path) == result
    assert result.ceilings == {"float32": {"bytes_per_second": 100.0, "flop_per_second": 1000.0}}
    assert result.arguments["dry"] is True
    assert result.machine["packages"]["fused_resnet"]


def test_the_roofline_is_the_most_that_was_reached_before_and_after(machine, monkeypatch):
    found = iter([Ceilings(100.0, 900.0), Ceilings(80.0, 1000.0), Ceilings(1.0, 2.0), Ceilings(3.0, 1.0)])
    asked: list[torch.dtype] = []
    monkeypatch.setattr(runner, "measure_ceilings", lambda device, dtype, rounds: (asked.append(dtype), next(found))[1])
    result = run_on(machine, [FakeTask(1), FakeTask(2)], [machine.contender("a")])
    assert result.ceilings == {"float32": {"bytes_per_second": 100.0, "flop_per_second": 1000.0}}
    assert asked == [torch.float32] * 2
    assert run_on(machine, [FakeTask(1)], [machine.contender("a")], ceiling_rounds=0).ceilings == {}


def test_an_interrupt_keeps_what_was_measured(machine, tmp_path):
    path = tmp_path / "run.json"
    interrupt = raising(KeyboardInterrupt(), after=25)
    stop = machine.contender("stop", run=lambda: (machine.sleep(1.0), interrupt()))
    result = run_on(machine, [FakeTask(n) for n in range(1, 9)], [stop], save=lambda r: r.save(path))
    assert 0 < len(result.measurements) < 8
    assert Result.load(path) == result
    assert result.arguments[INTERRUPTED] is True


def test_a_budget_is_shared_and_what_it_left_out_is_told(machine):
    contenders = [machine.contender("a"), machine.contender("b")]
    result = run_on(machine, [FakeTask(n) for n in (1, 2, 4)], contenders, budget=3000.0, method=Method(rounds=10_000))
    rounds = [len(m.outcomes["a"].timing.samples) for m in result.measurements]
    assert len(rounds) == 3 and all(count > LEAST_ROUNDS for count in rounds)
    assert machine.now == pytest.approx(3000, rel=0.05)
    assert rounds[2] > rounds[0]  # by its weight
    assert result.arguments[LEFT_OUT] == []

    machine.now = 0.0
    result = run_on(machine, [FakeTask(n) for n in (1, 2, 4)], contenders, budget=1.0)
    assert [len(m.outcomes["a"].timing.samples) for m in result.measurements] == [LEAST_ROUNDS]
    assert result.arguments[LEFT_OUT] == [f"fake, inference, batch {batch}, float32: {NO_TIME}" for batch in (2, 4)]


def test_who_is_not_ready_in_time_is_left_out_but_never_eager_and_ours(machine):
    names = ["torch.compile", "openvino", "eager NCHW", "eager channels_last", "fused", "frozen"]
    contenders = [machine.contender(name, setup=80.0, ours=name.startswith("f")) for name in names]
    result = run_on(machine, [FakeTask()], contenders, budget=100.0)
    outcomes = result.measurements[0].outcomes
    assert list(outcomes) == names
    assert [outcomes[name].status for name in names] == [ABSENT, ABSENT, RIGHT, RIGHT, RIGHT, ABSENT]
    assert outcomes["frozen"].reason == NO_TIME
    outcomes = run_on(machine, [FakeTask()], contenders, budget=650.0).measurements[0].outcomes
    assert [name for name in names if outcomes[name].status == ABSENT] == ["torch.compile"]


def test_the_listener_is_told_all_of_it(machine):
    told: list[Any] = []

    class Ear(Listener):
        def start(self, weights):
            told.append(("start", len(weights)))

        def begin(self, title):
            told.append(("begin", title))

        def stage(self, what, done):
            assert 0 <= done <= 1
            told.append(done)

        def finish(self, measurement, result):
            told.append(("finish", measurement is result.measurements[-1]))

        def leave_out(self, title, reason):
            told.append(("left out", reason))

    run_on(machine, [FakeTask(1), FakeTask(2)], [machine.contender("a", 10.0)], listener=Ear(), budget=2.0)
    kinds = [entry for entry in told if not isinstance(entry, float)]
    assert kinds[0] == ("start", 2)
    assert kinds[1][1].startswith("fake, inference, batch 1")
    assert kinds[2] == ("finish", True) and kinds[4] == ("left out", NO_TIME)
    stages = [entry for entry in told if isinstance(entry, float)]
    assert stages == sorted(stages)


def test_the_weight_of_a_task_grows_with_its_work():
    assert weight(FakeTask(1)) < weight(FakeTask(8)) < weight(FakeTask(8, mode=TRAINING_STEP))
