"""What contenders for networks and blocks need, the reasons why they are absent where they do not have it, and the way
from a module, a session or a compiled function to a `Prepared`."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.bench.ledger import saved_bytes
from fused_resnet.bench.options import dtype_name
from fused_resnet.bench.result import INFERENCE
from fused_resnet.bench.suite.moved_bytes import moved_bytes
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.task import Contender, Prepared
from fused_resnet.bench.suite.training import Training

Condition = Callable[[NetworkTask], list[str]]
"""The reasons against, none where the task meets it."""


def network_contender(
    name: str, prepare: Callable[[NetworkTask], Prepared], *conditions: Condition, ours: bool = False
) -> Contender:
    """One that takes networks and blocks, and of these what meets all conditions. Later conditions are not asked where
    an earlier one has reasons, so the cheap ones come first."""

    def why_absent(task: Any) -> list[str]:
        if not isinstance(task, NetworkTask):
            return ["it takes networks and blocks only"]
        return next((reasons for condition in conditions if (reasons := condition(task))), [])

    def prepare_in_turn(task: NetworkTask) -> Prepared:
        if task.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # for everyone, and for good: cuDNN's choices are measured ones
        return prepare(task)

    return Contender(name, why_absent, prepare_in_turn, ours)


def only(meets: Callable[[NetworkTask], bool], reason: str) -> Condition:
    """Where the task meets it; ``{device}`` in the reason is the task's."""
    return lambda task: [] if meets(task) else [reason.format(device=task.device)]


inference_only = only(lambda task: task.mode == INFERENCE, "it does inference only")
training_only = only(lambda task: task.training, "it does training only")
cuda_only = only(lambda task: task.device.type == "cuda", "it needs a CUDA device; the task is on {device}")
cpu_only = only(lambda task: task.device.type == "cpu", "it is measured on CPUs only; the task is on {device}")


def dtypes(*allowed: torch.dtype) -> Condition:
    """In one of these dtypes."""
    return only(lambda task: task.dtype in allowed, f"it takes {' and '.join(map(dtype_name, allowed))} here")


def installed(package: str) -> Condition:
    """With a package of this name to import."""
    return only(lambda task: _is_there(package), f"{package} is not installed")


@functools.cache
def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # of a parent package, or of one that stands in sys.modules without a spec
        return False


def module_in(task: NetworkTask, module: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """The module itself, in the task's dtype and this memory format."""
    return module.to(dtype=task.dtype, memory_format=memory_format)  # type: ignore[call-overload]


def prepared_inference(
    task: NetworkTask,
    call: Callable[[Any], Any],
    inputs: list[Any],
    *,
    guard: Callable[[], AbstractContextManager[Any]] = torch.inference_mode,
    output: Callable[[Any], Tensor] = lambda result: result,
    way: str | None = None,
) -> Prepared:
    """A function of one input in turn. It has run on each of them when this returns.

    Args:
        inputs: of `NetworkTask.inputs_as`, or what they are in the contender's own form.
        guard: makes what is entered around every run.
        output: from what a run returns to the tensor to hold against the exact one; not measured.
        way: for `moved_bytes`.
    """
    turns = itertools.cycle(inputs)

    def run() -> Any:
        with guard():
            return call(next(turns))

    def results() -> list[Tensor]:
        with guard():
            return [output(call(inputs[0])).clone()]

    for _ in inputs:
        run()
    return Prepared(run, results, moved_bytes=lambda: moved_bytes(task, way))


def prepared_training(task: NetworkTask, training: Training, way: str | None = None) -> Prepared:
    """A module in training. Its first run gives the results; it has run on each input when this returns."""
    first = training.first_results()
    for _ in task.inputs[1:]:
        training.run()

    def results() -> list[Tensor | None]:
        given = list(first)
        first.clear()  # they are as large as the parameters, and asked for once
        return given

    counts = (lambda: saved_bytes(training.module, training.loss), lambda: moved_bytes(task, way))
    return Prepared(training.run, results, *counts)


def prepared_module(
    task: NetworkTask,
    module: nn.Module,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    way: str | None = None,
) -> Prepared:
    """A module as it is, in the task's mode: in its dtype for inference, under autocast in training."""
    if task.training:
        return prepared_training(task, Training(task, module, memory_format=memory_format), way)
    inputs, module = task.inputs_as(task.dtype, memory_format), module_in(task, module, memory_format)
    return prepared_inference(task, module, inputs, way=way)
