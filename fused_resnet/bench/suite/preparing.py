"""From a module, a session or a compiled function to a `Prepared`: what all contenders do alike."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.bench.saved_bytes import saved_bytes
from fused_resnet.bench.suite.moved_bytes import Way, moved_bytes
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.bench.suite.training import Training

Surroundings = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes what is entered around every run."""


def module_in(task: NetworkTask, module: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """The module itself, in the task's dtype and this memory format."""
    return module.to(dtype=task.dtype, memory_format=memory_format)  # type: ignore[call-overload]


def prepared_inference(
    task: NetworkTask,
    call: Callable[[Any], Any],
    inputs: list[Any],
    *,
    guard: Surroundings = torch.inference_mode,
    surroundings: Surroundings = contextlib.nullcontext,
    output: Callable[[Any], Tensor] = lambda result: result,
    way: Way = None,
) -> Prepared:
    """A function of one input in turn. It has run on each of them when this returns.

    Args:
        inputs: of `NetworkTask.inputs_as`, or what they are in the contender's own form.
        guard: entered around every run, such as ``torch.inference_mode``.
        surroundings: likewise, within.
        output: from what a run returns to the tensor to hold against the exact one; not measured.
        way: for `moved_bytes`.
    """
    turns = itertools.cycle(inputs)

    def run() -> Any:
        with guard(), surroundings():
            return call(next(turns))

    def results() -> list[Tensor]:
        with guard(), surroundings():
            return [output(call(inputs[0])).clone()]

    for _ in inputs:
        run()
    return Prepared(run, results, moved_bytes=lambda: moved_bytes(task, way))


def prepared_training(
    task: NetworkTask, training: Training, surroundings: Surroundings = contextlib.nullcontext, way: Way = None
) -> Prepared:
    """A module in training. Its first run gives the results; it has run on each input when this returns."""

    def run() -> Tensor:
        with surroundings():
            return training.run()

    with surroundings():
        first = training.first_results()
    for _ in task.inputs[1:]:
        run()

    def saved() -> int:
        with surroundings():
            return saved_bytes(training.module, training.loss)

    def results() -> list[Tensor | None]:
        given = list(first)
        first.clear()  # they are as large as the parameters, and asked for once
        return given

    return Prepared(run, results, saved, lambda: moved_bytes(task, way))


def prepared_module(
    task: NetworkTask,
    module: nn.Module,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    surroundings: Surroundings = contextlib.nullcontext,
    way: Way = None,
) -> Prepared:
    """A module as it is, in the task's mode: in its dtype for inference, under autocast in training."""
    if task.training:
        return prepared_training(task, Training(task, module, memory_format=memory_format), surroundings, way)
    module = module_in(task, module, memory_format)
    inputs = task.inputs_as(task.dtype, memory_format)
    return prepared_inference(task, module, inputs, surroundings=surroundings, way=way)
