"""Convolutions with what is fused into them, on every shape of three networks, with pytest-benchmark.

    python -m pytest benchmarks/bench_conv_bn_act.py [-k "test_inference and 3x3"] [--benchmark-json=FILE]

test_inference is convolution, norm, residual and ReLU; test_training the three products of a training step, each with
the norms around it: conv_stats, conv_grad_input and conv_grad_weight. "ours separate" is PyTorch's convolution (cuDNN,
oneDNN) with this package's passes beside it. The roofline of ``extra_info`` is that of the fused kernel's bytes.
Tasks and contenders are those of ``python -m fused_resnet bench --level op``, which times them in turns.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.by_pytest import DEVICE, ON_GPU, cases, device_time, measure, named
from fused_resnet.bench.result import INFERENCE, TRAINING_STEP
from fused_resnet.bench.suite.op_base import COMPILE, EAGER, SEPARATE
from fused_resnet.bench.suite.op_conv_inference import FOLDED, NCHW, PACKED, ConvInferenceTask
from fused_resnet.bench.suite.op_conv_training import ConvTrainingTask
from fused_resnet.bench.suite.registry import op_contenders, ours
from fused_resnet.bench.suite.task import Contender, Task
from fused_resnet.bench.suite.task_lists import op_tasks

NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d")
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float32,)
INFERENCE_BATCHES, TRAINING_BATCHES = ((256, 32, 1), (256, 32)) if ON_GPU else ((1, 8), (2,))
INFERENCES = [
    task
    for task in op_tasks(NETWORKS, [INFERENCE], INFERENCE_BATCHES, DTYPES, DEVICE)
    if isinstance(task, ConvInferenceTask)
]
TRAININGS = [
    task
    for task in op_tasks(NETWORKS, [TRAINING_STEP], TRAINING_BATCHES, DTYPES, DEVICE)
    if isinstance(task, ConvTrainingTask)
]
OTHERS = list(map(ours, ("cuda", "triton", SEPARATE) if ON_GPU else (SEPARATE, PACKED)))
INFERENCE_CONTENDERS = named(op_contenders(), EAGER, NCHW, FOLDED, COMPILE, *OTHERS)
TRAINING_CONTENDERS = named(op_contenders(), EAGER, COMPILE, *map(ours, [SEPARATE, "triton"] if ON_GPU else [SEPARATE]))
QUICK_INFERENCES = ("64x56x56 1x1 to 256 with add", "128x28x28 3x3 to 128", "512x7x7 3x3 to 512 with add")
QUICK_TRAININGS = ("64x56x56 3x3 to 64, behind a norm",)


def is_quick(task: Task) -> bool:
    return task.batch_size in (1, 2) and task.subject.endswith((*QUICK_INFERENCES, *QUICK_TRAININGS))


@device_time
@cases(INFERENCES, INFERENCE_CONTENDERS, is_quick)
def test_inference(benchmark: Any, task: Task, contender: Contender, is_quick: bool) -> None:
    measure(benchmark, task, contender)


@device_time
@cases(TRAININGS, TRAINING_CONTENDERS, is_quick)
def test_training(benchmark: Any, task: Task, contender: Contender, is_quick: bool) -> None:
    measure(benchmark, task, contender)
