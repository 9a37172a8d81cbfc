"""A run of the suite on contenders whose times, mistakes and exceptions are planted, on a clock of the test's own."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_resnet.bench.result import (
    ABSENT,
    FAILED,
    INFERENCE,
    MODEL,
    OP,
    RIGHT,
    TRAINING_STEP,
    WRONG,
    Outcome,
    Result,
)
from fused_resnet.bench.roofline import Ceilings
from fused_resnet.bench.suite import measure as measure_module
from fused_resnet.bench.suite import runner
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.measure import NO_TIME, is_out_of_memory, last_line, measure
from fused_resnet.bench.suite.peak_memory import available_bytes, peak_bytes
from fused_resnet.bench.suite.rounds import LEAST_ROUNDS, Method
from fused_resnet.bench.suite.runner import INTERRUPTED, LEFT_OUT, Listener, Settings, run, weight
from fused_resnet.bench.suite.task import Prepared, Task

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


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Neither a roofline, nor a search for garbage through all of what the tests have made."""
    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)
    monkeypatch.setattr(runner, "measure_ceilings", lambda device, dtype, rounds: Ceilings(100.0, 1000.0))


@pytest.fixture
def machine() -> Machine:
    return Machine()


def run_on(machine: Machine, tasks: list[Task], contenders: list[Contender], **changes: Any) -> Result:
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = {"method": METHOD} | {name: value for name, value in changes.items() if name in names}
    others = {name: value for name, value in changes.items() if name not in names}
    return run(
        tasks, contenders, Settings(torch.device("cpu"), **settings), clock=machine.clock, sleep=machine.sleep, **others
    )


def outcomes_of(machine: Machine, *contenders: Contender, **changes: Any) -> dict[str, Outcome]:
    task = FakeTask(**changes)
    return measure(task, contenders, METHOD, clock=machine.clock, sleep=machine.sleep).outcomes


def raising(error: BaseException, after: int = 0) -> Callable[[], None]:
    calls: list[None] = []

    def run() -> None:
        calls.append(None)
        if len(calls) > after:
            raise error

    return run


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


def test_a_resumed_run_measures_only_what_is_missing(machine, monkeypatch):
    monkeypatch.setattr(runner, "machine_facts", lambda device: {"commit": "abc", "device": "x"})
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


def test_a_sweep_ends_with_patience_and_with_memory(machine, monkeypatch):
    def contender() -> Contender:
        """A run takes as many seconds as the batch has images."""
        now: list[int] = []

        def prepare(task: Task) -> Prepared:
            now[:] = [task.batch_size]
            return Prepared(lambda: machine.sleep(now[0]), lambda: [torch.tensor(1.0)])

        return Contender("a", lambda task: [], prepare)

    def sweep(**changes: Any) -> tuple[list[int], list[str]]:
        result = run_on(machine, [FakeTask(2**n) for n in range(8)], [contender()], **changes)
        return [m.batch_size for m in result.measurements], result.arguments[LEFT_OUT]

    measured, left_out = sweep(longest_run=5.0)
    assert measured == [1, 2, 4, 8]
    assert left_out[0].endswith("a run of batch 8 took 8.0 s")
    monkeypatch.setattr(measure_module, "peak_bytes", lambda run, device: 1_000_000_000)
    monkeypatch.setattr(runner, "available_bytes", lambda device: 2_000_000_000)
    measured, left_out = sweep()
    assert measured == [1]
    assert left_out[0].endswith("it would take 2.0 GB, and 2.0 GB are available")


def test_a_sweep_ends_where_nobody_had_memory(machine):
    def prepare(task: Task) -> Prepared:
        if task.batch_size > 2:
            raise MemoryError("no more")
        return machine.contender("a").prepare(task)

    tasks = [FakeTask(n) for n in (1, 2, 4, 8, 16)] + [FakeTask(16, subject="other")]
    result = run_on(machine, tasks, [Contender("a", lambda task: [], prepare)])
    assert [(m.subject, m.batch_size) for m in result.measurements] == [
        ("fake", 1), ("fake", 2), ("fake", 4), ("other", 16),
    ]  # fmt: skip
    assert all("nobody managed batch 4" in line for line in result.arguments[LEFT_OUT])


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


def test_a_training_step_of_ours_brings_its_ledgers(machine):
    task = FakeTask(2, subject="resnet18", mode=TRAINING_STEP, image_size=64)
    again = FakeTask(4, subject="resnet18", mode=TRAINING_STEP, image_size=64)
    result = run_on(
        machine, [task, again, FakeTask(2, subject="alexnet", mode=TRAINING_STEP)], [machine.contender("a")]
    )
    assert list(result.ledgers) == ["resnet18"]
    levels = result.ledgers["resnet18"]
    totals = {level: sum(entry["bytes"] for entry in entries) for level, entries in levels.items()}
    assert list(levels) == ["eager", "level 0", "level 1", "level 2", "level 3", "level 3, masks"]
    assert totals["level 3"] < totals["level 0"] < totals["eager"]
    assert {"phase", "kind", "bytes"} == set(levels["eager"][0])


def test_the_weight_of_a_task_grows_with_its_work():
    assert weight(FakeTask(1)) < weight(FakeTask(8)) < weight(FakeTask(8, mode=TRAINING_STEP))


def test_peak_memory_counts_what_a_run_holds_at_once():
    """In a process of its own: among the free blocks that other tests have left in the heap, malloc may place the
    second of two buffers beside the first, which is free already, and the system counts both."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, timeout=300)
    size, one, two_in_turn, two_at_once, available = json.loads(done.stdout)
    if one is None:
        pytest.skip("this system does not tell")
    assert one == pytest.approx(size, rel=0.05)
    assert two_in_turn == pytest.approx(size, rel=0.05)
    assert two_at_once == pytest.approx(2 * size, rel=0.05)
    assert available > size


PEAKS = """
import json, torch
from fused_resnet.bench.suite.peak_memory import available_bytes, peak_bytes

SIZE = 48 << 20

def one():
    return torch.ones(SIZE, dtype=torch.uint8)

def two_in_turn():
    for _ in range(2):
        one()

print(json.dumps([
    SIZE, peak_bytes(one, "cpu"), peak_bytes(two_in_turn, "cpu"), peak_bytes(lambda: [one(), one()], "cpu"),
    available_bytes("cpu"),
]))
"""


def test_peak_memory_sees_the_buffers_of_this_packages_own_kernels():
    """They are not PyTorch's, and kept for the next output; a profiler of PyTorch's allocations is blind to them."""
    from fused_resnet.ops import bn_act, empty_cache

    x = torch.randn(4, 64, 128, 128).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(64), torch.zeros(64)

    def work() -> torch.Tensor:
        with torch.no_grad():
            return bn_act(x, weight, bias, None, None, training=True)

    work()
    found = peak_bytes(work, "cpu")
    empty_cache()
    if found is None:
        pytest.skip("this system does not tell")
    assert found >= 0.95 * x.nbytes


@pytest.mark.gpu
def test_peak_memory_of_a_gpu():
    size = 64 << 20
    assert peak_bytes(lambda: torch.ones(size, dtype=torch.uint8, device="cuda"), "cuda") == size
    assert peak_bytes(lambda: None, "cuda") is None
    assert available_bytes("cuda") > size
