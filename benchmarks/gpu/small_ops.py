"""Every op of one backend on small odd shapes, once, and whether it is right: a short program for compute-sanitizer.

compute-sanitizer --error-exitcode 9 python -m benchmarks.gpu.small_ops --backend cuda
python -m benchmarks.gpu.small_ops --backend reference --device cpu
"""

from __future__ import annotations

import argparse

import torch

from fused_resnet.bench.passes import PASSES, STATS_APPLY
from fused_resnet.bench.result import INFERENCE, TRAINING_STEP
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.bench.suite.op_contender import op_contenders, ours
from fused_resnet.bench.suite.op_pass import PassTask
from fused_resnet.bench.suite.op_sites import RELU, NormSite
from fused_resnet.bench.suite.op_task import op_tasks

ODD = NormSite("odd", 40, 5, 7, RELU, 1)
IMAGE_SIZE = 32
LARGEST = 2**19
"""Bytes that an op here moves at least: a watched kernel takes a hundred times as long."""


def main(words: list[str] | None = None) -> int:
    """0; 1 if something was wrong or raised, or nothing could run at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args(words)
    (contender,) = (each for each in op_contenders() if each.name == ours(arguments.backend))
    right, wrong = 0, 0
    for task in tasks(getattr(torch, arguments.dtype), arguments.device):
        if contender.why_absent(task):
            continue
        try:
            prepared = contender.prepare(task)
            why = task.why_wrong(prepared)[1]
            prepared.close()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        right, wrong = right + (why is None), wrong + (why is not None)
        if why is not None:
            print(f"{task!r}: {why}", flush=True)
    print(f"{arguments.backend} on {arguments.device}: {right} right, {wrong} wrong")
    return 0 if right and not wrong else 1


def tasks(dtype: torch.dtype, device: str) -> list[OpTask]:
    """The passes on an odd shape, and the smaller ops of ResNet-18 at a small size."""
    found: list[OpTask] = [PassTask(norm_pass, ODD, 3, dtype, device) for norm_pass in [*PASSES, STATS_APPLY]]
    others = op_tasks(["resnet18"], [INFERENCE, TRAINING_STEP], [2], [dtype], device, IMAGE_SIZE)
    found += [task for task in others if isinstance(task, OpTask) and not isinstance(task, PassTask)]
    for task in found:
        task.most_sets = 1  # of inputs
    return [task for task in found if task.least_bytes() <= LARGEST]


if __name__ == "__main__":
    raise SystemExit(main())
