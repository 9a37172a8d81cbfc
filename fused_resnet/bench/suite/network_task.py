"""A network or one of its residual blocks as a task: one module, a few random inputs, a loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet.bench.options import dtype_name
from fused_resnet.bench.result import BLOCK, INFERENCE, MODEL
from fused_resnet.bench.suite.subjects import Subject, find_subject, settle_statistics
from fused_resnet.bench.suite.task import Task

ROTATING = 3
"""Inputs that a contender takes in turn."""
SETTLING = ROTATING + 1
"""The seed of what running statistics are taken of: not of an input, whose batch statistics they would be."""
SETTLING_PIXELS = 2**14
"""Running statistics of a network are taken of as many images as have about so many pixels, two at least."""


@dataclass(frozen=True)
class Block:
    """A residual block of a network, and the shape of one image's activation before and after it."""

    path: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


class NetworkTask(Task):
    """A module in one mode, on random images (or activations) of one shape.

    float32 is plain. In another dtype inference has the whole module in it where the contender can have that, and
    training is autocast with parameters in float32. ``path`` is that of the module in ``network``, "" for all of it;
    ``takes_input_gradient``: the input wants a gradient in training, as a block's does within a network.

    A network's training step begins with cross entropy and random labels; a block's backward with a fixed random
    gradient of its result.

    Args:
        subject: the network, or its name as `find_subject` takes it.
        image_size: of the network's image, also where the task is a block, whose shapes followed from it.
        block: of the network; the whole network where it is None.
    """

    made = ("module", "inputs", "targets", "expected")

    def __init__(
        self,
        subject: Subject | str,
        mode: str,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        image_size: int = 224,
        *,
        block: Block | None = None,
    ) -> None:
        self.network = find_subject(subject) if isinstance(subject, str) else subject
        self.block, self.path, self.takes_input_gradient = block, block.path if block else "", block is not None
        self.level = BLOCK if block else MODEL
        self.subject = f"{self.network.name} {self.path}".strip()
        self.mode, self.batch_size, self.dtype = mode, batch_size, dtype
        self.device, self.image_size, self.size = torch.device(device), image_size, image_size
        self.training = mode != INFERENCE
        self.autocast_dtype = None if dtype == torch.float32 else dtype  # of training; None is no autocast

    def __repr__(self) -> str:
        dtype = dtype_name(self.dtype)
        return f"{self.subject}, {self.mode}, batch {self.batch_size}, {dtype}, {self.size}px, {self.device}"

    def make_module(self) -> nn.Module:
        """The module on the CPU, in float32 and eval mode, with running statistics of its inputs' distribution."""
        module, images = self.network.build().get_submodule(self.path), max(2, SETTLING_PIXELS // self.size**2)
        shape = (max(2, min(8, self.batch_size)) if self.block else images, *self.input_shape()[1:])
        settle_statistics(module, torch.randn(shape, generator=torch.Generator().manual_seed(SETTLING)))
        return module

    def input_shape(self) -> tuple[int, ...]:
        """Of one batch."""
        return self.batch_size, *(self.block.input_shape if self.block else (3, self.size, self.size))

    def make_target(self) -> Tensor:
        """What the loss compares with, of the generator as it stands: labels; the gradient of a block's result."""
        if self.block:
            return torch.randn(self.batch_size, *self.block.output_shape)
        return torch.randint(_classes(self.network, self.size), (self.batch_size,))

    @cached_property
    def module(self) -> nn.Module:
        """The plain PyTorch module in float32 on the task's device, contiguous, in the mode that is measured. Nobody
        runs or changes it: `copy` it."""
        self.let_go_of_others()
        module = self.make_module()
        for norm in module.modules() if self.training else ():
            # Not the statistics of the inputs: whoever does not update them, or uses them, then gives other numbers.
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                assert norm.running_mean is not None and norm.running_var is not None
                norm.running_mean += norm.running_var.sqrt()
                norm.running_var *= 2
        return module.to(self.device).train(self.training)

    def copy(self) -> nn.Module:
        """A module of one's own."""
        return copy.deepcopy(self.module)

    @cached_property
    def inputs(self) -> list[Tensor]:
        """The rotating inputs, float32 and contiguous; their values are numbers of the task's dtype."""
        self.let_go_of_others()
        generators = [torch.Generator().manual_seed(seed) for seed in range(ROTATING)]
        made = [torch.randn(self.input_shape(), generator=generator).to(self.dtype) for generator in generators]
        return [x.float().to(self.device) for x in made]

    def inputs_as(
        self, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format
    ) -> list[Tensor]:
        """Copies in another dtype and memory format: outside of what is measured."""
        return [x.to(dtype).to(memory_format=memory_format, copy=True) for x in self.inputs]

    @cached_property
    def targets(self) -> list[Tensor]:
        """What belongs to each input for the loss."""
        self.let_go_of_others()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ROTATING)
            return [self.make_target().to(self.device) for _ in range(ROTATING)]

    def flop(self) -> int | None:
        """Counted on tensors without memory; a training step's includes its backward."""
        with torch.device("meta"):
            module = self.network.without_memory(self.path).train(self.training)
            x = torch.empty(self.input_shape(), requires_grad=self.takes_input_gradient and self.training)
            target = self.make_target()
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(self.training):
            out = module(x)
            if self.training:
                loss_of(out, target).backward()
        return counter.get_total_flops()


@cache
def _classes(network: Subject, size: int) -> int:
    """How many logits it gives."""
    with torch.device("meta"), torch.no_grad():
        return network.build()(torch.empty(1, 3, size, size)).shape[1]


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    """A scalar to call ``backward`` on: cross entropy with labels of int64; or 0, whose gradient by ``out`` is
    ``target``, if that is floating point. The latter reads nothing, as if the rest of a network had been there."""
    return _GivenGradient.apply(out, target) if target.is_floating_point() else F.cross_entropy(out, target)


class _GivenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient, ctx.dtype = gradient, out.dtype  # lives anyway: not saved, and so not counted as saved
        return torch.zeros((), device=out.device)

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> tuple[Tensor, None]:
        return ctx.gradient.to(ctx.dtype), None
