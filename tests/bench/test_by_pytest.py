"""What the pytest-benchmark suites share: what a measurement says, rounds, ``--quick``; and that all are collected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import by_pytest as measuring
from benchmarks.by_pytest import FEWEST_ROUNDS, MOST_ROUNDS, cases, measure, named, rounds_for
from fused_resnet.bench.passes import PASSES, PassTask
from fused_resnet.bench.roofline import Ceilings
from fused_resnet.bench.sites import RELU, NormSite
from fused_resnet.bench.suite.registry import op_contenders
from fused_resnet.bench.suite.task import Contender, Prepared

ROOT = Path(__file__).resolve().parents[2]
SITE = NormSite(40, 2, 5, RELU)
APPLY = next(norm_pass for norm_pass in PASSES if norm_pass.name == "bn_apply")
BYTES = 2 * 3 * 40 * 2 * 5 * 2 + 4 * 40 * 4  # of three images in float16, read and written, and of the vectors


class Benchmark:
    """What the suites use of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.group, self.extra_info = "", {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=0.002))

    def pedantic(self, run: Callable[[], object], setup: Callable[[], None], rounds: int, warmup_rounds: int) -> None:
        setup()
        self.rounds = rounds
        run()


@pytest.fixture(autouse=True)
def fixed_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ceilings", lambda device, dtype: Ceilings(4e6, 1e9))


def test_what_a_measurement_says():
    benchmark, task = Benchmark(), PassTask(APPLY, SITE, 3, torch.float16, "cpu")
    (contender,) = named(op_contenders(), "ours reference")
    measure(benchmark, task, contender)
    found = benchmark.extra_info
    assert benchmark.group == "bn_apply 40x2x5, training forward, batch 3, float16"
    assert (found["contender"], found["accuracy"], found["dtype"]) == ("ours reference", "right", "float16")
    assert 0 <= found["error"] < 1e-3
    assert (found["bytes"], found["least_bytes"], found["flop"]) == (BYTES, BYTES, None)
    assert found["gigabytes_per_second"] == pytest.approx(BYTES / 0.002 / 1e9)
    assert found["roofline_fraction"] == pytest.approx(BYTES / 4e6 / 0.002)
    assert "input_sets" not in vars(task)  # the session's list of tasks holds no tensors
    json.dumps(found)


def test_a_wrong_contender_is_marked_and_closed():
    closed = []
    (right,) = named(op_contenders(), "eager")

    def prepare(task: Any) -> Prepared:
        prepared = right.prepare(task)
        wrong = lambda: [result + 1 for result in prepared.results()]  # noqa: E731
        return Prepared(wrong, wrong, close=lambda: closed.append(prepared.close()))

    benchmark = Benchmark()
    measure(benchmark, PassTask(APPLY, SITE, 3, torch.float16, "cpu"), Contender("planted", lambda task: [], prepare))
    assert benchmark.extra_info["accuracy"].startswith("wrong: result 0: its error is 1")
    assert benchmark.extra_info["bytes"] is None and "gigabytes_per_second" not in benchmark.extra_info
    assert len(closed) == 1


def test_who_is_absent_is_skipped_with_the_reasons():
    absent = Contender("nobody", lambda task: ["no GPU", "too wide"], lambda task: pytest.fail("it was prepared"))
    with pytest.raises(pytest.skip.Exception, match="no GPU; too wide"):
        measure(Benchmark(), PassTask(APPLY, SITE, 3, torch.float16, "cpu"), absent)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, MOST_ROUNDS), (0.02, 25), (10.0, FEWEST_ROUNDS)])
def test_rounds_fit_the_time(seconds: float, rounds: int):
    assert rounds_for(seconds) == rounds


def test_quick_leaves_out_compilers():
    tasks = [PassTask(APPLY, SITE, batch, torch.float32, "cpu") for batch in (1, 2)]
    chosen = named(op_contenders(), "eager", "torch.compile")
    marked = cases(tasks, chosen, lambda task: task.batch_size == 2)
    assert [parameter.values[2] for parameter in marked.args[1]] == [False, False, True, False]


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="a contender must be one of eager, .*; got 'nobody'"):
        named(op_contenders(), "nobody")


def pytest_on(paths: list[Path], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, paths), *words]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which this may be
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_suite_runs_and_its_json_has_the_machine(tmp_path: Path):
    output = tmp_path / "out.json"
    chosen = "test_pass and 2048x7x7 and bn_apply_dual and float32 and not mask and (eager or native)"
    run = pytest_on([ROOT / "benchmarks" / "bench_bn_act.py"], "-k", chosen, f"--benchmark-json={output}")
    assert run.returncode == 0, run.stdout[-3000:]
    found = json.loads(output.read_text())
    assert found["wrong"] == []
    assert found["machine_info"]["facts"]["threads"] >= 1
    assert "eager" in {entry["extra_info"]["contender"] for entry in found["benchmarks"]}


@pytest.mark.slow
def test_make_bench_runs_a_selection_of_every_suite():
    suites = [path for path in sorted((ROOT / "benchmarks").glob("bench_*.py")) if path.stem != "bench_launch"]
    quick = pytest_on(suites, "--quick", "--collect-only")
    kept, everything = quick.stdout.strip().splitlines()[-1].split(" tests collected")[0].split("/")
    assert 30 < int(kept) < 100 < int(everything)
    for suite in ("bench_block", "bench_bn_act", "bench_conv_bn_act", "bench_resnet"):
        assert suite in quick.stdout
