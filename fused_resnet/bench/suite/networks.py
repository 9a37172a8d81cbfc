"""Whole networks, and their residual blocks in the shapes in which the networks run them, as tasks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.bench.result import BLOCK, MODEL
from fused_resnet.bench.suite.correctness import JudgedTask
from fused_resnet.bench.suite.network_task import ROTATING
from fused_resnet.bench.suite.subjects import Subject, find_subject, is_residual_block, settle_statistics
from fused_resnet.bench.suite.task import Task

SETTLING = ROTATING + 1
"""The seed of what running statistics are taken of: not of an input, whose batch statistics they would be."""
SETTLING_PIXELS = 2**14
"""Running statistics of a network are taken of as many images as have about so many pixels, two at least."""


@dataclass(frozen=True)
class Block:
    """A residual block of a network, the shape of one image's activation before and after it, and how many blocks of
    the network are like it."""

    path: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    count: int


def model_tasks(
    names: Sequence[str], modes: Sequence[str], batch_sizes: Sequence[int], dtypes: Sequence[torch.dtype], *where: Any
) -> list[Task]:
    """Each network (named as `find_subject` takes it) in each mode, dtype and batch size; ``where`` is the device and,
    if it is not 224, the pixels of an image's side."""
    return [
        ModelTask(subject, mode, batch_size, dtype, *where)
        for subject in map(find_subject, names)
        for mode, dtype, batch_size in itertools.product(modes, dtypes, batch_sizes)
    ]


def block_tasks(
    names: Sequence[str], modes: Sequence[str], batch_sizes: Sequence[int], dtypes: Sequence[torch.dtype], *where: Any
) -> list[Task]:
    """Each residual block of these networks, alike ones once, in each mode, dtype and batch size; arguments as of
    `model_tasks`. A network without residual blocks has no tasks."""
    return [
        BlockTask(subject, block, mode, batch_size, dtype, *where)
        for subject in map(find_subject, names)
        for block in residual_blocks(subject, *where[1:])
        for mode, dtype, batch_size in itertools.product(modes, dtypes, batch_sizes)
    ]


def residual_blocks(subject: Subject, image_size: int = 224) -> list[Block]:
    """Those of a network whose children have the names that torchvision's BasicBlock and Bottleneck give them, alike
    ones (in structure and shape) once, in the order in which they run. Found on tensors without memory."""
    found: dict[tuple[str, tuple[int, ...]], list[tuple[str, tuple[int, ...]]]] = {}
    with torch.device("meta"), torch.no_grad():
        model = subject.build()
        paths = {module: path for path, module in model.named_modules()}

        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            key = (repr(module), tuple(inputs[0].shape[1:]))
            found.setdefault(key, []).append((paths[module], tuple(output.shape[1:])))

        for module in filter(is_residual_block, paths):
            module.register_forward_hook(note)
        model(torch.empty(1, 3, image_size, image_size))
    return [Block(alike[0][0], shape, alike[0][1], len(alike)) for (_, shape), alike in found.items()]


class ModelTask(JudgedTask):
    """A network on images (N, 3, S, S). A training step's loss is cross entropy with random labels."""

    level = MODEL

    def make_module(self) -> nn.Module:
        return _settled(self.network.build(), max(2, SETTLING_PIXELS // self.size**2), self.input_shape()[1:])

    def input_shape(self) -> tuple[int, ...]:
        return self.batch_size, 3, self.size, self.size

    def make_target(self) -> Tensor:
        return torch.randint(_classes(self.network, self.size), (self.batch_size,))


class BlockTask(JudgedTask):
    """A block on activations like those before it. Its input wants a gradient in the training modes, and a training
    step's backward begins with a fixed random gradient of its result."""

    level, takes_input_gradient = BLOCK, True

    def __init__(self, subject: Subject | str, block: Block, *settings: Any, **named: Any) -> None:
        super().__init__(subject, *settings, **named)
        self.block, self.path, self.subject = block, block.path, f"{self.network.name} {block.path}"

    def make_module(self) -> nn.Module:
        block = self.network.build().get_submodule(self.path)
        return _settled(block, max(2, min(8, self.batch_size)), self.block.input_shape)

    def input_shape(self) -> tuple[int, ...]:
        return self.batch_size, *self.block.input_shape

    def make_target(self) -> Tensor:
        return torch.randn(self.batch_size, *self.block.output_shape)


def _settled(module: nn.Module, images: int, shape: tuple[int, ...]) -> nn.Module:
    settle_statistics(module, torch.randn(images, *shape, generator=torch.Generator().manual_seed(SETTLING)))
    return module


@functools.cache
def _classes(network: Subject, size: int) -> int:
    """How many logits it gives; TypeError if it gives something else."""
    with torch.device("meta"), torch.no_grad():
        out = network.build()(torch.empty(1, 3, size, size))
    if not isinstance(out, Tensor) or out.dim() != 2:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"{network.name} must give logits, a tensor (N, classes); got {got}")
    return out.shape[1]
