"""The first layers of a ResNet in inference as one kernel, against convolution with pooling behind it.

    python -m pytest benchmarks/bench_stem.py [-k "batch 1" ] [--benchmark-json=FILE]     on a GPU

"ours cuda" is the fused stem; "eager" is cuDNN's convolution in channels_last with the norm folded into its weight,
ReLU and pooling; "torch.compile" is max-autotune of that. Images are channels_last, contiguous, or bytes in
channels_last, which all but the fused stem scale to the weight's dtype first.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.by_pytest import DEVICE, ON_GPU, cases, device_time, measure, named
from fused_resnet.bench.suite.op_base import COMPILE, EAGER
from fused_resnet.bench.suite.op_stem import DTYPES, LAYOUTS, StemTask
from fused_resnet.bench.suite.registry import op_contenders, ours
from fused_resnet.bench.suite.task import Contender, Task

BATCH_SIZES = (256, 32, 1) if ON_GPU else (8,)
TASKS = [
    StemTask(224, batch, dtype, DEVICE, layout)
    for layout in LAYOUTS
    for batch in BATCH_SIZES
    for dtype in (DTYPES if ON_GPU else (torch.bfloat16,))
]
CONTENDERS = named(op_contenders(), EAGER, COMPILE, *([ours("cuda")] if ON_GPU else []))


@device_time
@cases(TASKS, CONTENDERS)
def test_stem(benchmark: Any, task: Task, contender: Contender, is_quick: bool) -> None:
    measure(benchmark, task, contender)
