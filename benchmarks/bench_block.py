"""The residual blocks of ResNet-18 and ResNet-50, alike ones once, with pytest-benchmark.

    python -m pytest benchmarks/bench_block.py [-k "layer2 and training"] [--benchmark-json=FILE]

Inference, and a training step (forward, backward, update), of a block on activations like those that it gets in its
network. pytest-benchmark runs one contender after the other; for numbers to quote, measured in turns, see
``python -m fused_resnet bench --level block``.
"""

from __future__ import annotations

from typing import Any

from benchmarks.by_pytest import DEVICE, DTYPES, ON_GPU, cases, device_time, measure, named
from fused_resnet.bench.result import INFERENCE, TRAINING_STEP
from fused_resnet.bench.suite.registry import contenders
from fused_resnet.bench.suite.task import Contender, Task
from fused_resnet.bench.suite.task_lists import block_tasks

NETWORKS = ("resnet18", "resnet50")
INFERENCE_BATCHES, TRAINING_BATCHES = ((1, 256), (256,)) if ON_GPU else ((1, 8), (4,))
PLAIN = ("eager NCHW", "eager channels_last", "torch.compile")
INFERENCE_CONTENDERS = named(contenders(), *PLAIN, "fused", "frozen", *(["frozen graph"] if ON_GPU else []))
TRAINING_CONTENDERS = named(contenders(), *PLAIN, "fused", *(["fused graph"] if ON_GPU else []))
QUICK_BLOCKS = ("resnet18 layer1.0", "resnet50 layer3.1")


def is_quick(task: Task) -> bool:
    return task.batch_size in (1, TRAINING_BATCHES[0]) and task.subject in QUICK_BLOCKS


@device_time
@cases(block_tasks(NETWORKS, [INFERENCE], INFERENCE_BATCHES, DTYPES, DEVICE), INFERENCE_CONTENDERS, is_quick)
def test_inference(benchmark: Any, task: Task, contender: Contender, is_quick: bool) -> None:
    measure(benchmark, task, contender)


@device_time
@cases(block_tasks(NETWORKS, [TRAINING_STEP], TRAINING_BATCHES, DTYPES, DEVICE), TRAINING_CONTENDERS, is_quick)
def test_training(benchmark: Any, task: Task, contender: Contender, is_quick: bool) -> None:
    measure(benchmark, task, contender)
