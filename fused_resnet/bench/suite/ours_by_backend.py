"""This package's backends one by one."""

from __future__ import annotations

import functools

import torch

import fused_resnet
from fused_resnet.bench.suite.conditions import Condition, network_contender
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.ours import fusable, fused_copy, prepare_frozen
from fused_resnet.bench.suite.preparing import prepared_module
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.ops import why_not
from fused_resnet.ops.route.reasons import MODULES, why_not_device

CHANNELS = 64


def backend_contenders() -> list[Contender]:
    """Those named "fused cuda", "fused triton" and so on: ``with use_backend(name):`` around the fused network; in
    inference around the frozen one, if the backend has its convolution."""
    return [
        network_contender(f"fused {name}", functools.partial(_prepare, name), _able(name), fusable, ours=True)
        for name in MODULES
    ]


def _prepare(name: str, task: NetworkTask) -> Prepared:
    around = functools.partial(fused_resnet.use_backend, name)
    if task.training or _why_no_convolution(name, task):
        return prepared_module(task, fused_copy(task), surroundings=around)
    with around():
        return prepare_frozen(False, task, around)


def _able(name: str) -> Condition:
    """The backend's own reasons, asked for what the mode needs most: on this device, in this dtype."""

    def reasons(task: NetworkTask) -> list[str]:
        if found := why_not_device(name, task.device):
            return list(found)
        x, vector = _activation(task), torch.empty(CHANNELS, device=task.device)
        if task.training:
            return why_not(name, "bn_stats", x, None, None, 0.0, 1e-5)
        passes = why_not(name, "bn_apply", x, vector, vector, None, None, None, True)
        return passes and _why_no_convolution(name, task)

    return reasons


def _why_no_convolution(name: str, task: NetworkTask) -> list[str]:
    x, vector = _activation(task), torch.empty(CHANNELS, device=task.device)
    weight = x.new_empty(CHANNELS, CHANNELS, 1, 1)
    return why_not(name, "conv_bn_act", x, weight, vector, vector, None, [1, 1], [0, 0], [1, 1], 1, True)


def _activation(task: NetworkTask) -> torch.Tensor:
    x = torch.empty(1, CHANNELS, 4, 4, dtype=task.dtype, device=task.device)
    return x.to(memory_format=torch.channels_last)
