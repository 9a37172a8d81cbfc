"""Bytes that a run of a contender reads and writes, counted from the ops that PyTorch runs (``bench/ledger.py``)."""

from __future__ import annotations

import copy

import torch
from torch import nn

import fused_resnet
from fused_resnet.bench.dry_run import DryRun
from fused_resnet.bench.ledger import ledger
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.training import Training
from fused_resnet.ops.route.context import asking
from fused_resnet.ops.route.reasons import unavailable
from fused_resnet.ops.route.request import AUTO, HIGHEST_LEVEL

EAGER, FROZEN, FUSED, EFFICIENT = "eager", "frozen", "fused", "efficient"


def moved_bytes(task: NetworkTask, way: str | None) -> int | None:
    """Of one run of a network in eager, fused (``EFFICIENT``: with ``memory="efficient"``) or frozen. Nothing is
    computed: as many operations as the run has, on memory that is not touched.

    None where nobody can count it: ``way`` is None, or the network has an op whose bytes nobody has written down.
    """
    if way is None:
        return None
    level = _level_of(task) if task.training else None
    natively = task.device.type == "cpu" and level in (1, 2)
    masks = level == HIGHEST_LEVEL and task.device.type == "cuda" and not unavailable("cuda")
    with DryRun(), asking(backend=AUTO if natively else "reference", level=level, masks=masks):
        try:
            return _count(task, way)
        except NotImplementedError:
            return None


def _count(task: NetworkTask, way: str) -> int:
    module: nn.Module = task.make_module().train(task.training)
    if way != EAGER:
        fused_resnet.fuse(module, memory="efficient" if way == EFFICIENT else "default")
    if way == FROZEN:
        module = fused_resnet.freeze(module, torch.empty(task.input_shape()), dtype=task.dtype)
    elif not task.training:
        module = module.to(dtype=task.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not task.training:
        x = torch.empty(task.input_shape(), dtype=task.dtype).to(memory_format=torch.channels_last)
        with torch.no_grad():
            return ledger(lambda: module(x), task.batch_size).total
    twin = copy.copy(task)  # whose inputs are of this dry run
    twin.device = torch.device("cpu")
    twin.__dict__ |= {"inputs": [torch.empty(task.input_shape())], "targets": [task.make_target()]}
    training = Training(twin, module)
    training.run()  # the first update makes the momenta
    return ledger(training.run, task.batch_size).total


def _level_of(task: NetworkTask) -> int:
    """At which most of a network trains: of a 3x3 convolution of 64 channels (``ops/route/fusion_level.py``)."""
    x, weight = (
        torch.empty(shape, dtype=task.dtype, device=task.device).to(memory_format=torch.channels_last)
        for shape in ((task.batch_size, 64, 8, 8), (64, 64, 3, 3))
    )
    return fused_resnet.ops.training_level(x, weight, (1, 1), (1, 1), (1, 1), 1)
