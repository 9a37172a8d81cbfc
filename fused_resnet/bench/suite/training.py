"""A module in training on a task's rotating inputs, the same way for everybody."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.bench.suite.network_task import NetworkTask, loss_of
from fused_resnet.training.loop import MOMENTUM, WEIGHT_DECAY, autocast

LEARNING_RATE = 1e-3
LOSS_SCALE = 2.0**10
"""In float16, where the gradients of a loss that is a mean over images would be rounded to zero. Constant, for a scale
that follows the gradients asks the device after every step."""


class Training:
    """Forward, backward and update of a module that nobody else has.

    Inputs and targets are copied to the memory format and dtype that the module wants before anything runs.

    Args:
        task: a training step.
        module: in training mode on the task's device; its parameters and buffers are what is trained.
        call: what is called in its place, such as its compiled form.
        memory_format: of parameters and inputs.
        dtype: of everything, in place of the task's; with it there is no autocast.
    """

    def __init__(
        self,
        task: NetworkTask,
        module: nn.Module,
        call: Callable[[Tensor], Tensor] | None = None,
        memory_format: torch.memory_format = torch.channels_last,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.task = task
        self.module: nn.Module = module.to(dtype=dtype, memory_format=memory_format)  # type: ignore[call-overload]
        self.call = module if call is None else call
        self._autocast_dtype = task.autocast_dtype if dtype is None else None
        self._scale = LOSS_SCALE if self._autocast_dtype == torch.float16 else 1.0
        self._batches = batches(task, memory_format, dtype)
        self._turns = itertools.cycle(self._batches)
        self._leaf: Tensor | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def run(self) -> Tensor:
        """A step on the next input; the loss before the update."""
        if self._optimizer is None:
            self._optimizer = make_optimizer(self.module)
        self._optimizer.zero_grad()
        loss = self._loss(*next(self._turns))
        if self._scale == 1.0:
            loss.backward()
        else:
            (loss * self._scale).backward()
            torch._foreach_mul_([p.grad for p in self.module.parameters() if p.grad is not None], 1 / self._scale)
        self._optimizer.step()
        return loss.detach()

    def first_results(self) -> list[Tensor | None]:
        """Runs the task on the first input, which has to be the first run, and gives what `result_names` names."""
        return results_of(self.task, self.module, self.run(), self._leaf)

    def loss(self) -> Tensor:
        """Of the first input, with what its backward needs."""
        return self._loss(*self._batches[0])

    def _loss(self, x: Tensor, target: Tensor) -> Tensor:
        if self.task.takes_input_gradient:
            x = self._leaf = x.detach().requires_grad_()
        with autocast(x, self._autocast_dtype):
            return loss_of(self.call(x), target)


def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """SGD as ``training.loop.start_run`` makes it, in PyTorch's fastest form: one kernel for all parameters."""
    settings: dict[str, Any] = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "nesterov": True, "fused": True}
    return torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, **settings)


def batches(
    task: NetworkTask, memory_format: torch.memory_format, dtype: torch.dtype | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(input, target) in turn. A network's images are float32, which autocast casts; a block's activations are of the
    task's dtype already, as within a network."""
    inner = task.dtype if dtype is None else dtype
    outer = inner if task.takes_input_gradient or dtype is not None else torch.float32
    settings: dict[str, Any] = {"memory_format": memory_format, "copy": True}
    targets = [t.to(inner).to(**settings) if t.is_floating_point() else t for t in task.targets]
    return list(zip(task.inputs_as(outer, memory_format), targets, strict=True))


def result_names(task: NetworkTask) -> list[str]:
    """Of what a contender gives for a task, in order."""
    if not task.training:
        return ["output"]
    gradients = [f"gradient of {name}" for name, p in task.module.named_parameters() if p.requires_grad]
    buffers = [name for name, buffer in task.module.named_buffers() if buffer.is_floating_point()]
    return ["gradient of the input" if task.takes_input_gradient else "loss", *gradients, *buffers]


def results_of(task: NetworkTask, module: nn.Module, loss: Tensor, leaf: Tensor | None) -> list[Tensor | None]:
    """Copies of what `result_names` names, after the module has run once and gave this loss; None for a gradient
    that is not there."""
    first = loss.detach() if not task.takes_input_gradient else None if leaf is None else leaf.grad
    gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    return [None if tensor is None else tensor.clone() for tensor in (first, *gradients, *buffers)]
