"""What is measured, and how long: from the options of ``bench`` to a list of tasks."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_resnet.bench.options import dtype_name, find_device
from fused_resnet.bench.result import BLOCK, INFERENCE, MODEL, OP, TRAINING_STEP
from fused_resnet.bench.suite.networks import block_tasks, model_tasks
from fused_resnet.bench.suite.op_task import op_tasks
from fused_resnet.bench.suite.rounds import ONCE, Method
from fused_resnet.bench.suite.task import Task

CPU_BATCHES, GPU_BATCHES = ((1, 8), (16,)), ((1, 32, 256), (1, 32, 256))
"""Of inference, of training."""
MODES = {mode.replace(" ", "-"): mode for mode in (INFERENCE, TRAINING_STEP)}
MAKERS: dict[str, Callable[..., Any]] = {MODEL: model_tasks, BLOCK: block_tasks, OP: op_tasks}
DRY_IMAGE, DRY_BATCH = 32, 2


@dataclass(frozen=True)
class Selection:
    """What is measured.

    Attributes:
        batch_sizes: by mode.
        one_of_each: of the blocks of a model, and of the shapes of an op, the first only.
    """

    models: tuple[str, ...]
    levels: tuple[str, ...]
    batch_sizes: dict[str, tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    image_size: int
    one_of_each: bool = False

    @property
    def dtype_names(self) -> list[str]:
        return list(map(dtype_name, self.dtypes))


def select(options: argparse.Namespace) -> Selection:
    """What the options ask for; what was not given is chosen for the device."""
    device = find_device(options.device)
    return Selection(
        models=tuple(dict.fromkeys(options.model or ["resnet18" if options.dry else "resnet50"])),
        levels=tuple(dict.fromkeys(options.level or [MODEL])),
        batch_sizes={MODES[mode]: _batch_sizes(options, MODES[mode], device) for mode in options.mode or MODES},
        dtypes=tuple(dict.fromkeys(getattr(torch, name) for name in options.dtype or ["float32"])),
        device=device,
        image_size=options.image_size or (DRY_IMAGE if options.dry else 224),
        one_of_each=options.dry,
    )


def method_for(options: argparse.Namespace, device: torch.device) -> Method:
    """How long to measure. On a GPU nobody's threads are in the way of the next one, so nobody waits for them."""
    method = Method(pause=0.0) if device.type == "cuda" else Method()
    if options.dry:
        method = ONCE
    given = {name: getattr(options, name) for name in ("rounds", "min_seconds")}
    method = replace(method, **{name: value for name, value in given.items() if value is not None})
    return replace(method, most_rounds=max(method.rounds, method.most_rounds))


def make_tasks(selection: Selection) -> list[Task]:
    """The tasks, those of a model beside each other, with growing batch sizes."""
    where, once = (selection.device, selection.image_size), dict[tuple[object, ...], Task]()
    for name, level in itertools.product(selection.models, selection.levels):
        for (mode, sizes), dtype in itertools.product(selection.batch_sizes.items(), selection.dtypes):
            for task in MAKERS[level]([name], [mode], sizes, [dtype], *where):  # models share the shapes of ops
                # "bn_apply" of "bn_apply 64x56x56", "resnet18" of "resnet18 layer1.0"
                subject = task.subject.split()[0] if selection.one_of_each else task.subject
                key = (task.level, subject, task.mode, task.batch_size, task.dtype, task.image_size)
                once.setdefault(key, task)
    return list(once.values())


def _batch_sizes(options: argparse.Namespace, mode: str, device: torch.device) -> tuple[int, ...]:
    on_gpu = device.type == "cuda"
    if options.batch_size:
        return tuple(sorted(set(options.batch_size)))
    if options.dry:
        return (DRY_BATCH,)
    return (GPU_BATCHES if on_gpu else CPU_BATCHES)[mode != INFERENCE]
