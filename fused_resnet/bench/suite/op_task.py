"""Every op of some networks as tasks (the passes of their norms, their convolutions), and who does them: PyTorch, this
package's backends one by one, and what else PyTorch offers for an op."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from fused_resnet.bench.passes import PASSES, STATS_APPLY, PassTask
from fused_resnet.bench.result import INFERENCE, MODES, TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.sites import conv_sites, norm_sites
from fused_resnet.bench.suite.op_base import BACKENDS, COMPILE, EAGER, OpTask
from fused_resnet.bench.suite.op_conv_inference import FOLDED, NCHW, PACKED, ConvInferenceTask
from fused_resnet.bench.suite.op_conv_training import PRODUCTS, ConvTrainingTask
from fused_resnet.bench.suite.op_stem import LAYOUTS, StemTask
from fused_resnet.bench.suite.subjects import builder_names
from fused_resnet.bench.suite.task import Contender, Prepared, Task

WAYS = (EAGER, NCHW, FOLDED, COMPILE)


def op_tasks(
    names: Sequence[str],
    modes: Sequence[str],
    batch_sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device | str,
    image_size: int = 224,
) -> list[Task]:
    """The ops of these networks as tasks, each shape once however many of them have it.

    An op belongs to the first mode that runs it: a training step's tasks include those of the training forward."""
    for name in names:
        if name not in builder_names():
            raise ValueError(f"at op level a model must be one of {', '.join(builder_names())}; got {name!r}")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"a mode must be one of {', '.join(MODES)}; got {mode!r}")
    wanted = {*modes, TRAINING_FORWARD} if TRAINING_STEP in modes else {*modes}
    found: dict[tuple[object, ...], OpTask] = {}
    for name in names:
        for dtype in dtypes:
            for batch_size in batch_sizes:
                for task in _of_network(name, wanted, batch_size, dtype, torch.device(device), image_size):
                    found.setdefault((task.subject, task.mode, batch_size, dtype), task)
    return [*found.values()]


def _of_network(
    name: str, wanted: set[str], batch: int, dtype: torch.dtype, device: torch.device, image_size: int
) -> list[OpTask]:
    norms, convs = norm_sites(name, image_size), conv_sites(name, image_size)
    tasks: list[OpTask] = []
    if INFERENCE in wanted:
        tasks += [ConvInferenceTask(site, batch, dtype, device) for site in convs]
        tasks += [StemTask(image_size, batch, dtype, device, layout) for layout in LAYOUTS]
    for norm_pass in [*PASSES, STATS_APPLY]:
        tasks += [PassTask(norm_pass, s, batch, dtype, device) for s in norms if s.ending in norm_pass.endings]
    tasks += [ConvTrainingTask(site, product, batch, dtype, device) for product in PRODUCTS for site in convs]
    return [task for task in tasks if task.mode in wanted and task.exists]


def op_contenders() -> list[Contender]:
    """All of them; who cannot do a task says why, of the task and of this machine.

    "ours separate" is PyTorch's convolution (cuDNN, oneDNN) with this package's passes beside it, "ours packed oneDNN"
    what ``freeze`` runs on a CPU. "eager" is channels_last, the format that the fused kernels take; "eager NCHW" is
    there for inference convolutions.
    """
    return [
        *(Contender(name, functools.partial(_why_absent, name), functools.partial(_prepare, name)) for name in WAYS),
        *(
            Contender(ours(name), functools.partial(_why_absent, name), functools.partial(_prepare, name), ours=True)
            for name in (*BACKENDS, PACKED)
        ),
    ]


def ours(name: str) -> str:
    """The name of the contender that is a backend of this package, or a way that this package runs."""
    return f"ours {name}"


def _why_absent(name: str, task: Any) -> list[str]:
    return task.why_not(name) if isinstance(task, OpTask) else ["it takes tasks at op level only"]


def _prepare(name: str, task: OpTask) -> Prepared:
    return task.prepare(name, task.ways()[name])
