"""Every op of some networks as tasks: the passes of their norms, their steps, and their convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fused_resnet.bench.contenders import builder_names
from fused_resnet.bench.passes import PASSES, STATS_APPLY
from fused_resnet.bench.result import INFERENCE, MODES, TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.bench.suite.op_contender import op_contenders
from fused_resnet.bench.suite.op_conv_inference import ConvInferenceTask
from fused_resnet.bench.suite.op_conv_training import PRODUCTS, ConvTrainingTask
from fused_resnet.bench.suite.op_norm_step import NormStepTask
from fused_resnet.bench.suite.op_pass import PassTask
from fused_resnet.bench.suite.op_sites import conv_sites, norm_sites
from fused_resnet.bench.suite.op_stem import LAYOUTS, StemTask
from fused_resnet.bench.suite.task import Task

__all__ = ["op_contenders", "op_tasks"]


def op_tasks(
    names: Sequence[str],
    modes: Sequence[str],
    batch_sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device | str,
    image_size: int = 224,
) -> list[Task]:
    """The ops of these networks as tasks, each shape once however many of them have it.

    An op belongs to the first mode that runs it: a training step's tasks include those of the training forward.

    ========================= ====================== ==================================================
    inference                 ``op_conv_inference``  convolution, norm, (add,) ReLU; ``op_stem``: the stem
    training forward          ``op_pass``            each pass of the forward over an activation
    (training forward)        ``op_conv_training``   convolution with the norms around it
    training step             ``op_pass``            each pass of the backward
    (training forward)        ``op_conv_training``   the gradients of input and weight
    (training step)           ``op_norm_step``       norm, (add,) ReLU: forward and backward by autograd
    ========================= ====================== ==================================================

    Args:
        names: builders of this package, such as "resnet50".
        modes: of ``result.MODES``.
        batch_sizes, dtypes: a task each.
        device: where the tasks run.
        image_size: pixels of an image's side, from which the shapes follow.

    Raises:
        ValueError: a name or a mode that is not known.
    """
    for name in names:
        if name not in builder_names():
            raise ValueError(f"at op level a model must be one of {', '.join(builder_names())}; got {name!r}")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"a mode must be one of {', '.join(MODES)}; got {mode!r}")
    wanted = {INFERENCE} if INFERENCE in modes else set()
    if TRAINING_FORWARD in modes or TRAINING_STEP in modes:
        wanted.add(TRAINING_FORWARD)
    if TRAINING_STEP in modes:
        wanted.add(TRAINING_STEP)
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
    tasks += [NormStepTask(site, batch, dtype, device) for site in norms]
    return [task for task in tasks if task.mode in wanted and task.exists]
