"""Lists of tasks: whole networks, and their residual blocks in the shapes in which the networks run them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.bench.suite.correctness import JudgedTask
from fused_resnet.bench.suite.network_task import Block
from fused_resnet.bench.suite.subjects import Subject, find_subject, is_residual_block
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
