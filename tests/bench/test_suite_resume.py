"""A run that goes on with an earlier result loses nothing of it, and measures nothing twice."""

from __future__ import annotations

import pytest

from fused_resnet.bench.result import ABSENT, Outcome, Result
from fused_resnet.bench.suite import runner
from fused_resnet.bench.suite.measure import NO_TIME
from fused_resnet.bench.suite.runner import INTERRUPTED, LEFT_OUT
from fused_resnet.bench.suite.task import Contender
from tests.bench.planted import FakeTask, raising, run_on


@pytest.fixture
def same_condition(monkeypatch) -> None:
    monkeypatch.setattr(runner, "machine_facts", lambda device: {"commit": "abc", "device": "x"})


@pytest.mark.usefixtures("same_condition")
def test_a_resumed_run_measures_only_what_is_missing(machine):
    contenders = [machine.contender("a")]
    before = run_on(machine, [FakeTask(1), FakeTask(2)], contenders)
    machine.calls.clear()
    now = run_on(machine, [FakeTask(1), FakeTask(2), FakeTask(4)], contenders, before=before)
    assert [m.batch_size for m in now.measurements] == [1, 2, 4]
    assert now.measurements[:2] == before.measurements
    once = len(machine.calls)
    machine.calls.clear()
    run_on(machine, [FakeTask(4)], contenders)
    assert once == len(machine.calls)


@pytest.mark.parametrize("change", ["commit", "dirty", "device", "dry", "contender", "time"])
def test_what_another_condition_measured_is_measured_again(machine, monkeypatch, change):
    facts = {"commit": "abc-dirty" if change == "dirty" else "abc", "device": "x"}
    monkeypatch.setattr(runner, "machine_facts", lambda device: dict(facts))
    contenders = [machine.contender("a")]
    before = run_on(machine, [FakeTask(1)], contenders, arguments={"dry": False})
    if change in facts:
        facts[change] = "other"
    if change == "contender":
        contenders.append(machine.contender("b"))
    if change == "time":
        (measured,) = before.measurements
        measured.outcomes["a"] = Outcome(ABSENT, NO_TIME)
    machine.calls.clear()
    run_on(machine, [FakeTask(1)], contenders, before=before, arguments={"dry": change == "dry"})
    assert machine.calls


NAMES = ("eager NCHW", "eager channels_last", "fused", "torch.compile")


@pytest.mark.usefixtures("same_condition")
def test_the_fuller_of_two_measurements_stays(machine):
    """With less time than before, a measurement that is made again may have fewer contenders than it had."""
    contenders = [machine.contender(name, setup=80.0) for name in NAMES]

    def go_on(before: Result | None, budget: float, *more: Contender) -> Result:
        return run_on(machine, [FakeTask()], [*contenders, *more], before=before, budget=budget)

    def had_a_turn(result: Result) -> list[str]:
        (measured,) = result.measurements
        return [name for name, outcome in measured.outcomes.items() if outcome.reason != NO_TIME]

    short = go_on(None, 100.0)
    assert had_a_turn(short) == ["eager NCHW", "eager channels_last", "fused"]
    whole = go_on(short, 10_000.0)
    assert had_a_turn(whole) == list(NAMES)
    one_more = machine.contender("onnxruntime", setup=80.0)
    machine.calls.clear()
    assert go_on(whole, 100.0, one_more).measurements == whole.measurements
    assert machine.calls  # it tried, and had less
    assert had_a_turn(go_on(whole, 10_000.0, one_more)) == [*NAMES, "onnxruntime"]


@pytest.mark.usefixtures("same_condition")
def test_a_measurement_with_contenders_that_are_not_asked_for_stays_and_is_told(machine):
    a, b, c = (machine.contender(name) for name in "abc")
    before = run_on(machine, [FakeTask()], [a, b])
    machine.calls.clear()
    fewer = run_on(machine, [FakeTask()], [a], before=before)
    assert fewer.measurements == before.measurements and fewer.arguments[LEFT_OUT] == []
    other = run_on(machine, [FakeTask()], [a, c], before=before)
    assert other.measurements == before.measurements
    assert other.arguments[LEFT_OUT] == ["fake, inference, batch 1, float32: it was measured with b, not asked for now"]
    assert machine.calls == []
    assert list(run_on(machine, [FakeTask()], [a, b, c], before=before).measurements[0].outcomes) == ["a", "b", "c"]


def test_the_load_is_the_highest_of_all_that_is_in_the_file(machine, monkeypatch):
    facts = {"commit": "abc", "load_average": 3.0}
    monkeypatch.setattr(runner, "machine_facts", lambda device: dict(facts))
    before = run_on(machine, [FakeTask(1)], [machine.contender("a")])
    facts["load_average"] = 0.5
    assert run_on(machine, [FakeTask(2)], [machine.contender("a")], before=before).machine["load_average"] == 3.0


@pytest.mark.usefixtures("same_condition")
def test_what_a_resumed_run_has_no_time_for_stays_as_it_was(machine):
    contenders = [machine.contender(name, setup=80.0) for name in NAMES]
    before = run_on(machine, [FakeTask(1), FakeTask(2)], contenders, budget=600.0)
    assert [m.outcomes["torch.compile"].reason for m in before.measurements] == [NO_TIME, NO_TIME]
    now = run_on(machine, [FakeTask(1), FakeTask(2), FakeTask(4)], contenders, before=before, budget=1.0)
    assert [m.batch_size for m in now.measurements] == [1, 2]
    assert now.measurements[1] == before.measurements[1]
    assert now.arguments[LEFT_OUT] == [f"fake, inference, batch 4, float32: {NO_TIME}"]


@pytest.mark.usefixtures("same_condition")
def test_a_resumed_run_keeps_what_it_was_not_asked_for_or_did_not_reach(machine):
    before = run_on(machine, [FakeTask(n) for n in (1, 2, 4)], [machine.contender("a")])
    saved: list[list[int]] = []
    interrupt = raising(KeyboardInterrupt(), after=12)
    stop = machine.contender("stop", run=lambda: (machine.sleep(1.0), interrupt()))
    now = run_on(
        machine,
        [FakeTask(1), FakeTask(8)],
        [machine.contender("a"), stop],
        before=before,
        save=lambda result: saved.append([m.batch_size for m in result.measurements]),
    )
    assert now.arguments[INTERRUPTED] is True
    assert saved == [[1, 2, 4], [1, 2, 4]]
    assert "stop" in now.measurements[0].outcomes
    assert now.measurements[1:] == before.measurements[1:]
