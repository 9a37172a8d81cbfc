"""Plain PyTorch in its two memory formats."""

from __future__ import annotations

import functools

import torch

from fused_resnet.bench.suite.conditions import network_contender
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.moved_bytes import EAGER
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import prepared_module
from fused_resnet.bench.suite.task import Prepared

FORMATS = {"eager NCHW": torch.contiguous_format, "eager channels_last": torch.channels_last}


def eager_contenders() -> list[Contender]:
    """One for each memory format."""
    return [
        network_contender(name, functools.partial(_prepare, memory_format)) for name, memory_format in FORMATS.items()
    ]


def _prepare(memory_format: torch.memory_format, task: NetworkTask) -> Prepared:
    return prepared_module(task, task.copy(), memory_format=memory_format, way=EAGER)
