"""This package: fused, frozen, as one CUDA graph, at each level of fusion, and by each backend."""

from __future__ import annotations

import contextlib
import functools
import warnings

import torch
from torch import nn

import fused_resnet
from fused_resnet.bench.suite.moved_bytes import EFFICIENT, FROZEN, FUSED, automatic_level
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import (
    Surroundings,
    cuda_only,
    inference_only,
    network_contender,
    prepared_inference,
    prepared_module,
    training_only,
    training_steps_only,
)
from fused_resnet.bench.suite.pytorch import no_float16, prepared_graph_step
from fused_resnet.bench.suite.subjects import Subject
from fused_resnet.bench.suite.task import Contender, Prepared
from fused_resnet.convert.sites import fusion_sites
from fused_resnet.ops import why_not
from fused_resnet.ops.route.fusion_level import HIGHEST_LEVEL
from fused_resnet.ops.route.reasons import MODULES, why_not_device

CHANNELS = 64


def our_contenders() -> list[Contender]:
    """By the automatic plan first, then level by level, then the backends: ``with use_backend(name):`` around the fused
    network; in inference around the frozen one, if the backend has its convolution."""
    ours = functools.partial(network_contender, ours=True)

    def of_level(level: int) -> Contender:
        prepare, why_none = functools.partial(_prepare_level, level), functools.partial(_why_no_level, level)
        return ours(f"fused level {level}", prepare, training_only, why_none, fusable)

    def of_backend(name: str) -> Contender:
        prepare, why_none = functools.partial(_prepare_on, name), functools.partial(_why_no_backend, name)
        return ours(f"fused {name}", prepare, why_none, fusable)

    def graph(task: NetworkTask) -> Prepared:
        return prepared_graph_step(task, fused_copy(task), way=FUSED)

    def efficient(task: NetworkTask) -> Prepared:
        return prepared_module(task, fused_copy(task, "efficient"), way=EFFICIENT)

    return [
        ours("fused", lambda task: prepared_module(task, fused_copy(task), way=FUSED), fusable),
        ours("frozen", functools.partial(_prepare_frozen, False), inference_only, fusable),
        ours("frozen graph", functools.partial(_prepare_frozen, True), inference_only, cuda_only, fusable),
        ours("fused graph", graph, training_steps_only, cuda_only, no_float16, fusable),
        ours("fused efficient", efficient, training_only, fusable),
        *map(of_level, range(HIGHEST_LEVEL + 1)),
        *map(of_backend, MODULES),
    ]


def fusable(task: NetworkTask) -> list[str]:
    """A network has to have something that ``fuse`` knows."""
    if _has_sites(task.network, task.path):
        return []
    return [
        "nothing in it was fused: fuse knows the exact classes of torchvision's ResNet blocks and this package's own, "
        f"and {task.subject} has none"
    ]


@functools.cache
def _has_sites(network: Subject, path: str) -> bool:
    module = network.without_memory(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing can be fused, which is what is asked here
        fused_resnet.fuse(module)
    return any(not site.reasons for part in module.modules() for site in fusion_sites(part))


def fused_copy(task: NetworkTask, memory: str = "default") -> nn.Module:
    """The task's module, after ``fuse``."""
    return fused_resnet.fuse(task.copy(), memory=memory)


def _prepare_frozen(
    cuda_graph: bool, task: NetworkTask, surroundings: Surroundings = contextlib.nullcontext
) -> Prepared:
    """``freeze`` in the task's dtype."""
    inputs = task.inputs_as(task.dtype, torch.channels_last)
    module = task.copy().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = fused_resnet.freeze(module, inputs[0], dtype=task.dtype, cuda_graph=cuda_graph)
    return prepared_inference(task, frozen, inputs, surroundings=surroundings, way=FROZEN)


def _prepare_level(level: int, task: NetworkTask) -> Prepared:
    around = functools.partial(fused_resnet.ops.use_fusion_level, level)
    return prepared_module(task, fused_copy(task), surroundings=around, way=level)


def _why_no_level(level: int, task: NetworkTask) -> list[str]:
    """Levels above those that the device's kernels have for this dtype would be the reference; without any, level 0 is
    what "fused" is."""
    if task.device.type == "cuda" or not why_not_device("triton", task.device):
        return []
    highest = automatic_level(task)
    if level <= highest and highest > 0:
        return []
    return [f"the kernels on {task.device.type} have levels up to {highest} in {task.dtype}; above, the reference runs"]


def _prepare_on(backend: str, task: NetworkTask) -> Prepared:
    around = functools.partial(fused_resnet.use_backend, backend)
    if task.training or _why_no_convolution(backend, task):
        return prepared_module(task, fused_copy(task), surroundings=around)
    with around():
        return _prepare_frozen(False, task, around)


def _why_no_backend(backend: str, task: NetworkTask) -> list[str]:
    """The backend's own reasons, asked for what the mode needs most: on this device, in this dtype."""
    if found := why_not_device(backend, task.device):
        return list(found)
    x, vector = _activation(task)
    if task.training:
        return why_not(backend, "bn_stats", x, None, None, 0.0, 1e-5)
    passes = why_not(backend, "bn_apply", x, vector, vector, None, None, None, True)
    return passes and _why_no_convolution(backend, task)


def _why_no_convolution(backend: str, task: NetworkTask) -> list[str]:
    x, vector = _activation(task)
    weight = x.new_empty(CHANNELS, CHANNELS, 1, 1)
    return why_not(backend, "conv_bn_act", x, weight, vector, vector, None, [1, 1], [0, 0], [1, 1], 1, True)


def _activation(task: NetworkTask) -> tuple[torch.Tensor, torch.Tensor]:
    """And a vector of its channels."""
    x = torch.empty(1, CHANNELS, 4, 4, dtype=task.dtype, device=task.device)
    return x.to(memory_format=torch.channels_last), torch.empty(CHANNELS, device=task.device)
