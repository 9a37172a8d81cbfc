"""Residual blocks of networks as tasks, in the shapes in which the networks run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_resnet.bench.contenders import settle_statistics
from fused_resnet.bench.result import BLOCK
from fused_resnet.bench.suite.network_task import SETTLING, NetworkTask, combinations
from fused_resnet.bench.suite.subjects import Subject, find_subject, is_residual_block
from fused_resnet.bench.suite.task import Task


@dataclass(frozen=True)
class Block:
    """A residual block of a network, and the shape of one image's activation in front of it and behind it."""

    path: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    count: int
    """How many blocks of the network are like it."""


def block_tasks(
    names: Sequence[str],
    modes: Sequence[str],
    batch_sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device | str,
    image_size: int = 224,
) -> list[Task]:
    """Each residual block of these networks, alike ones once, in each mode, dtype and batch size; arguments and errors
    as of `model_tasks`. A network without residual blocks has no tasks."""
    return [
        BlockTask(subject, block, mode, batch_size, dtype, device, image_size)
        for subject in map(find_subject, names)
        for block in residual_blocks(subject, image_size)
        for mode, batch_size, dtype in combinations(modes, batch_sizes, dtypes)
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

        for module in paths:
            if is_residual_block(module):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, image_size, image_size))
    return [Block(alike[0][0], shape, alike[0][1], len(alike)) for (_, shape), alike in found.items()]


class BlockTask(NetworkTask):
    """A block on activations like those in front of it. Its input wants a gradient in the training modes, and a
    training step's backward begins with a fixed random gradient of its result.

    Args:
        subject, mode, batch_size, dtype, device: as of `ModelTask`.
        block: which.
        image_size: of the network's image, from which the block's shapes followed.
    """

    level = BLOCK
    level_takes_input_gradient = True

    def __init__(
        self,
        subject: Subject,
        block: Block,
        mode: str,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        image_size: int = 224,
    ) -> None:
        super().__init__(subject, mode, batch_size, dtype, device, image_size)
        self.block, self.path = block, block.path
        self.subject = f"{subject.name} {block.path}"

    def make_module(self) -> nn.Module:
        block = self.network.build().get_submodule(self.path)
        images = max(2, min(8, self.batch_size))
        settle_statistics(block, torch.randn(images, *self.block.input_shape, generator=self._generator(SETTLING)))
        return block

    def input_shape(self) -> tuple[int, ...]:
        return self.batch_size, *self.block.input_shape

    def make_target(self) -> Tensor:
        return torch.randn(self.batch_size, *self.block.output_shape)
