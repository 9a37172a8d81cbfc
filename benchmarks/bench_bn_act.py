"""bn_act and each of its passes against PyTorch on the norms of ResNet-18 and 50, with pytest-benchmark.

    python -m pytest benchmarks/bench_bn_act.py [-k "step and residual"] [--benchmark-json=FILE]
    python -m pytest benchmarks/bench_bn_act.py -k "test_pass and not compile"

test_step is forward and backward of norm, add and ReLU by autograd. test_pass is every pass by itself where the
networks have it (``fused_resnet/bench/passes.py``); test_stats_apply the one launch that does two of them.
Tasks and contenders are those of ``python -m fused_resnet bench --level op``, which times them in turns.
"""

from __future__ import annotations

from typing import Any

from benchmarks.by_pytest import DEVICE, DTYPES, ON_GPU, cases, device_time, measure, named
from benchmarks.norm_step import NormStepTask
from fused_resnet.bench.passes import STATS_APPLY, PassTask
from fused_resnet.bench.result import TRAINING_STEP
from fused_resnet.bench.sites import norm_sites
from fused_resnet.bench.suite.op_base import COMPILE, EAGER
from fused_resnet.bench.suite.registry import op_contenders, ours
from fused_resnet.bench.suite.task import Contender, Task
from fused_resnet.bench.suite.task_lists import op_tasks

BATCH_SIZES = (256, 32, 1) if ON_GPU else (8,)
TASKS = op_tasks(["resnet50", "resnet18"], [TRAINING_STEP], BATCH_SIZES, DTYPES, DEVICE)
PASSES = [task for task in TASKS if isinstance(task, PassTask) and task.norm_pass is not STATS_APPLY]
STATS_APPLIES = [task for task in TASKS if isinstance(task, PassTask) and task.norm_pass is STATS_APPLY]
STEPS = [
    NormStepTask(site, batch, dtype, DEVICE)
    for dtype in DTYPES
    for batch in BATCH_SIZES
    for site in dict.fromkeys([*norm_sites("resnet50"), *norm_sites("resnet18")])
]
BACKENDS = ("cuda", "triton") if ON_GPU else ("native",)
CONTENDERS = named(op_contenders(), EAGER, COMPILE, *map(ours, BACKENDS))
QUICK_SHAPES = ("64x56x56", "512x7x7", "2048x7x7")
QUICK_PASSES = ("bn_stats 64", "bn_apply 64", "bn_grad_stats recomputed 64", "bn_grad_apply recomputed 64")


def is_quick(task: Task) -> bool:
    if isinstance(task, NormStepTask):
        return task.subject.endswith(QUICK_SHAPES)
    return task.subject.startswith(QUICK_PASSES) and task.subject.endswith("64x56x56")


@device_time
@cases(STEPS, CONTENDERS, is_quick)
def test_step(benchmark: Any, task: Task, contender: Contender, is_quick: bool) -> None:
    measure(benchmark, task, contender)


@device_time
@cases(PASSES, CONTENDERS, is_quick)
def test_pass(benchmark: Any, task: Task, contender: Contender, is_quick: bool) -> None:
    measure(benchmark, task, contender)


@device_time
@cases(STATS_APPLIES, named(op_contenders(), EAGER, COMPILE, *map(ours, ("cuda",))) if ON_GPU else [])
def test_stats_apply(benchmark: Any, task: Task, contender: Contender, is_quick: bool) -> None:
    measure(benchmark, task, contender)
