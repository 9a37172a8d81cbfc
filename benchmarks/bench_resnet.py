"""Whole networks, with pytest-benchmark: ResNet-50, and ResNet-18 and ResNeXt-50 in inference.

    python -m pytest benchmarks/bench_resnet.py [-k training] [--benchmark-json=FILE]

Inference, and a training step (forward, backward, update). pytest-benchmark runs one contender after the other; for
numbers to quote, measured in turns, and for more contenders, see ``python -m fused_resnet bench``.
"""

from __future__ import annotations

from typing import Any

from benchmarks.by_pytest import DEVICE, DTYPES, ON_GPU, cases, device_time, measure, named
from fused_resnet.bench.result import INFERENCE, TRAINING_STEP
from fused_resnet.bench.suite.registry import contenders
from fused_resnet.bench.suite.task import Contender, Task
from fused_resnet.bench.suite.task_lists import model_tasks

INFERENCE_NETWORKS, TRAINING_NETWORKS = ("resnet50", "resnet18", "resnext50_32x4d"), ("resnet50",)
INFERENCE_BATCHES, TRAINING_BATCHES = ((1, 256), (256,)) if ON_GPU else ((1, 8), (16,))
PLAIN = ("eager NCHW", "eager channels_last", "torch.compile")
INFERENCE_CONTENDERS = named(contenders(), *PLAIN, "fused", "frozen", *(["frozen graph"] if ON_GPU else []))
TRAINING_CONTENDERS = named(contenders(), *PLAIN, "fused", *(["fused graph"] if ON_GPU else []))


def is_quick(task: Task) -> bool:
    return task.batch_size == 1 and task.subject in ("resnet18", "resnet50")


@device_time
@cases(model_tasks(INFERENCE_NETWORKS, [INFERENCE], INFERENCE_BATCHES, DTYPES, DEVICE), INFERENCE_CONTENDERS, is_quick)
def test_inference(benchmark: Any, task: Task, contender: Contender, is_quick: bool) -> None:
    measure(benchmark, task, contender)


@device_time
@cases(model_tasks(TRAINING_NETWORKS, [TRAINING_STEP], TRAINING_BATCHES, DTYPES, DEVICE), TRAINING_CONTENDERS)
def test_training(benchmark: Any, task: Task, contender: Contender, is_quick: bool) -> None:
    measure(benchmark, task, contender)
