"""This package: fused, frozen, and either as one CUDA graph."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import nn

import fused_resnet
from fused_resnet.bench.suite.moved_bytes import EFFICIENT, FROZEN, FUSED
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import (
    cuda_only,
    inference_only,
    network_contender,
    prepared_inference,
    prepared_module,
    training_only,
)
from fused_resnet.bench.suite.pytorch import no_float16, prepared_graph_step
from fused_resnet.bench.suite.subjects import Subject
from fused_resnet.bench.suite.task import Contender, Prepared
from fused_resnet.convert.sites import fusion_sites


def our_contenders() -> list[Contender]:
    """At the level and on the backend that are asked for (FUSED_RESNET_LEVEL, FUSED_RESNET_BACKEND)."""
    ours = functools.partial(network_contender, ours=True)

    def graph(task: NetworkTask) -> Prepared:
        return prepared_graph_step(task, fused_copy(task), way=FUSED)

    def efficient(task: NetworkTask) -> Prepared:
        return prepared_module(task, fused_copy(task, "efficient"), way=EFFICIENT)

    return [
        ours("fused", lambda task: prepared_module(task, fused_copy(task), way=FUSED), fusable),
        ours("frozen", functools.partial(_prepare_frozen, False), inference_only, fusable),
        ours("frozen graph", functools.partial(_prepare_frozen, True), inference_only, cuda_only, fusable),
        ours("fused graph", graph, training_only, cuda_only, no_float16, fusable),
        ours("fused efficient", efficient, training_only, fusable),
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


def _prepare_frozen(cuda_graph: bool, task: NetworkTask) -> Prepared:
    """``freeze`` in the task's dtype."""
    inputs = task.inputs_as(task.dtype, torch.channels_last)
    module = task.copy().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = fused_resnet.freeze(module, inputs[0], dtype=task.dtype, cuda_graph=cuda_graph)
    return prepared_inference(task, frozen, inputs, way=FROZEN)
