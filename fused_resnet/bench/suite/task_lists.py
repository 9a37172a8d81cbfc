"""Lists of tasks: whole networks, their residual blocks in the shapes in which the networks run them, and their ops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.bench.passes import PASSES, STATS_APPLY, PassTask
from fused_resnet.bench.result import INFERENCE, MODES, TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.sites import conv_sites, norm_sites
from fused_resnet.bench.suite.correctness import JudgedTask
from fused_resnet.bench.suite.network_task import Block
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.bench.suite.op_conv_inference import ConvInferenceTask
from fused_resnet.bench.suite.op_conv_training import PRODUCTS, ConvTrainingTask
from fused_resnet.bench.suite.op_stem import LAYOUTS, StemTask
from fused_resnet.bench.suite.subjects import Subject, builder_names, find_subject, is_residual_block
from fused_resnet.bench.suite.task import Task


def model_tasks(
    names: Sequence[str], modes: Sequence[str], batch_sizes: Sequence[int], dtypes: Sequence[torch.dtype], *where: Any
) -> list[Task]:
    """Each network (named as `find_subject` takes it) in each mode, dtype and batch size; ``where`` is the device and,
    if it is not 224, the pixels of an image's side."""
    return [
        JudgedTask(subject, mode, batch_size, dtype, *where)
        for subject in map(find_subject, names)
        for mode, dtype, batch_size in itertools.product(modes, dtypes, batch_sizes)
    ]


def block_tasks(
    names: Sequence[str], modes: Sequence[str], batch_sizes: Sequence[int], dtypes: Sequence[torch.dtype], *where: Any
) -> list[Task]:
    """Each residual block of these networks, alike ones once, in each mode, dtype and batch size; arguments as of
    `model_tasks`. A network without residual blocks has no tasks."""
    return [
        JudgedTask(subject, mode, batch_size, dtype, *where, block=block)
        for subject in map(find_subject, names)
        for block in residual_blocks(subject, *where[1:])
        for mode, dtype, batch_size in itertools.product(modes, dtypes, batch_sizes)
    ]


def residual_blocks(subject: Subject, image_size: int = 224) -> list[Block]:
    """Those of a network whose children have the names that torchvision's BasicBlock and Bottleneck give them, alike
    ones (in structure and shape) once, in the order in which they run. Found on tensors without memory."""
    found: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = {}
    with torch.device("meta"), torch.no_grad():
        model = subject.build()
        paths = {module: path for path, module in model.named_modules()}

        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            key = (repr(module), tuple(inputs[0].shape[1:]))
            found.setdefault(key, (paths[module], tuple(output.shape[1:])))

        for module in filter(is_residual_block, paths):
            module.register_forward_hook(note)
        model(torch.empty(1, 3, image_size, image_size))
    return [Block(path, shape, out) for (_, shape), (path, out) in found.items()]


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
