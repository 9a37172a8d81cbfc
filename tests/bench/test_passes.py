"""The passes of a norm as their benchmarks run them: bytes by hand, right and wrong results; the clock of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.device_clock import Moment, before_each_round
from fused_resnet import arguments
from fused_resnet.bench import norm_inputs
from fused_resnet.bench.accuracy import why_wrong
from fused_resnet.bench.norm_inputs import Norm
from fused_resnet.bench.passes import PASSES, STATS_APPLY, NormPass, PassTask
from fused_resnet.bench.sites import NormSite
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.ops import reference, use_backend
from tests.accuracy import assert_at_most_twice

SHAPE = (3, 40, 2, 5)  # 1200 elements; a row of the mask is 8 bytes, 30 rows
NAMED = {norm_pass.name: norm_pass for norm_pass in [*PASSES, STATS_APPLY]}
BYTES = {  # in float16, T = 2400 and a mask 240
    "bn_stats": 2400,
    "bn_apply": 4800,
    "bn_apply residual": 7200,
    "bn_apply_mask residual": 7440,
    "bn_apply_dual": 7200,
    "bn_apply_dual_mask": 7440,
    "bn_grad_stats no mask": 4800,
    "bn_grad_stats recomputed": 4800,
    "bn_grad_stats of out": 9600,
    "bn_grad_stats_mask": 5040,
    "bn_grad_stats_mask with dz": 7440,
    "bn_grad_apply no mask": 7200,
    "bn_grad_apply recomputed": 7200,
    "bn_grad_apply recomputed, constant statistics": 7200,
    "bn_grad_apply_mask": 7440,
    "bn_grad_apply_mask with dz": 9840,
    "bn_stats_apply residual": 7440,
}


def task_of(norm_pass: NormPass, dtype: torch.dtype) -> PassTask:
    return PassTask(norm_pass, NormSite(40, 2, 5, "residual"), 3, dtype, "cpu")


@pytest.mark.parametrize("norm_pass", NAMED.values(), ids=str)
def test_bytes_by_hand_are_those_that_are_counted_of_the_tensors(norm_pass: NormPass):
    task = task_of(norm_pass, torch.float16)
    with use_backend("reference"):
        tensors = [*norm_pass.arguments(task.first), *norm_pass.call(task.first)()]
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    assert sum(tensor.nbytes for tensor in found if tensor.dim() > 1) == BYTES[norm_pass.name]
    assert task.least_bytes() == sum(tensor.nbytes for tensor in found)  # each once, vectors too


@pytest.mark.parametrize("norm_pass", NAMED.values(), ids=str)
def test_a_wrong_result_is_marked(norm_pass: NormPass):
    task = task_of(norm_pass, torch.float32)
    with use_backend("reference"):
        right = norm_pass.call(task.first)()

    def why_wrong(results: list[Tensor | None]) -> str | None:
        return task.why_wrong(Prepared(run=lambda: None, results=lambda: results))[1]

    assert why_wrong(right) is None
    for index, result in enumerate(right):
        if result is None or result.numel() == 0:
            continue
        wrong, first = result.clone(), (0,) * result.dim()
        wrong[first] = ~wrong[first] if wrong.dtype == torch.uint8 else wrong[first] + 0.01
        message = why_wrong([*right[:index], wrong, *right[index + 1 :]])
        assert message is not None
        assert message.startswith(f"result {index}: ")


def wrong_by_the_tests(actual: Tensor, baseline: Tensor, exact: Tensor, **settings: Any) -> bool:
    try:
        assert_at_most_twice(actual, baseline, exact, **settings)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("terms", [1, 100])
@pytest.mark.parametrize("theirs", [0.0, 1e-3])
@pytest.mark.parametrize("error", [0.0, 1e-8, 3e-7, 1e-6, 1e-5, 1.9e-3, 2.1e-3, float("nan")])
def test_the_rule_is_that_of_the_tests(error: float, theirs: float, terms: int):
    exact = torch.linspace(-1, 1, 9, dtype=torch.float64)
    actual, baseline = exact.float(), exact.float()
    actual[2] += error
    baseline[5] += theirs
    for magnitude in (None, 10.0):
        settings = {"terms": terms, "magnitude": magnitude}
        found = why_wrong(actual, baseline, exact, **settings)
        assert (found is not None) == wrong_by_the_tests(actual, baseline, exact, **settings)


def test_gradients_come_where_rounding_does_not_decide():
    norm = Norm(SHAPE, torch.bfloat16, "cpu")
    z = reference.bn_apply(norm.x.double(), arguments.Norm(*(vector.double() for vector in norm.norm)), None, False)
    near = (z.abs() < norm_inputs.NEAR_ZERO / 2) | ((z + norm.residual).abs() < norm_inputs.NEAR_ZERO / 2)
    assert near.any()
    assert norm.grad_out[near].count_nonzero() == 0
    assert norm.grad_out.count_nonzero() > norm.grad_out.numel() // 2


def test_the_clock_of_the_device_counts_seconds(monkeypatch):
    class Event:
        now = 0.0  # milliseconds

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at, self.finished = Event.now, False

        def synchronize(self) -> None:
            self.finished = True

        def elapsed_time(self, later: Event) -> float:
            assert later.finished
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    start = Moment()
    Event.now += 2.5
    assert Moment() - start == 0.0025


def test_nothing_happens_in_front_of_a_round_on_the_cpu():
    assert before_each_round("cpu", flush=True)() is None


@pytest.mark.gpu
def test_the_device_is_busy_until_the_work_is_launched():
    x = torch.randn(1024, 1024, device="cuda")
    prepare = before_each_round("cuda", flush=True)
    for _ in range(3):
        prepare()
        start = Moment()
        x.add_(1)
        seconds = Moment() - start
    assert 0 < seconds < 100e-6
