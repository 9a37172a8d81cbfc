"""This package: fused, frozen, as one CUDA graph, and at each level of fusion."""

from __future__ import annotations

import contextlib
import functools
import warnings

import torch
from torch import nn

import fused_resnet
from fused_resnet.bench.suite.conditions import (
    cuda_only,
    inference_only,
    network_contender,
    training_only,
    training_steps_only,
)
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.graphed import no_float16, prepared_graph_step
from fused_resnet.bench.suite.moved_bytes import EFFICIENT, FROZEN, FUSED, automatic_level
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import Surroundings, prepared_inference, prepared_module
from fused_resnet.bench.suite.subjects import Subject
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.convert.sites import fusion_sites
from fused_resnet.ops.route.fusion_level import HIGHEST_LEVEL
from fused_resnet.ops.route.reasons import why_not_device


def our_contenders() -> list[Contender]:
    """By the automatic plan first, then level by level."""
    ours = functools.partial(network_contender, ours=True)
    return [
        ours("fused", _prepare_fused, fusable),
        ours("frozen", functools.partial(prepare_frozen, False), inference_only, fusable),
        ours("frozen graph", functools.partial(prepare_frozen, True), inference_only, cuda_only, fusable),
        ours("fused graph", _prepare_fused_graph, training_steps_only, cuda_only, no_float16, fusable),
        ours("fused efficient", _prepare_efficient, training_only, fusable),
        *(
            ours(
                f"fused level {level}",
                functools.partial(_prepare_level, level),
                training_only,
                functools.partial(_why_no_level, level),
                fusable,
            )
            for level in range(HIGHEST_LEVEL + 1)
        ),
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


def prepare_frozen(
    cuda_graph: bool, task: NetworkTask, surroundings: Surroundings = contextlib.nullcontext
) -> Prepared:
    """``freeze`` in the task's dtype."""
    inputs = task.inputs_as(task.dtype, torch.channels_last)
    module = task.copy().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = fused_resnet.freeze(module, inputs[0], dtype=task.dtype, cuda_graph=cuda_graph)
    return prepared_inference(task, frozen, inputs, surroundings=surroundings, way=FROZEN)


def _prepare_fused(task: NetworkTask) -> Prepared:
    return prepared_module(task, fused_copy(task), way=FUSED)


def _prepare_efficient(task: NetworkTask) -> Prepared:
    return prepared_module(task, fused_copy(task, "efficient"), way=EFFICIENT)


def _prepare_fused_graph(task: NetworkTask) -> Prepared:
    return prepared_graph_step(task, fused_copy(task), way=FUSED)


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
