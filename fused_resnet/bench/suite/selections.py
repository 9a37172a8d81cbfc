"""What is measured: from the options of ``bench`` to a list of tasks and of contenders."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_resnet.bench.options import dtype_name, find_device
from fused_resnet.bench.result import BLOCK, INFERENCE, MODEL, OP, TRAINING_STEP
from fused_resnet.bench.suite.measure import SLOW_TO_SET_UP
from fused_resnet.bench.suite.rounds import ONCE, Method
from fused_resnet.bench.suite.task import Contender, Task

CPU_BATCHES, GPU_BATCHES = ((1, 8), (16,)), ((1, 32, 256), (1, 32, 256))
"""Of inference, of training."""
QUICK_SECONDS = 60.0
NOT_QUICKLY = (*SLOW_TO_SET_UP, "ours reference")
"""Patterns of the contenders that a quick run leaves out."""
DRY_IMAGE, DRY_BATCH, QUICK_BATCH = 32, 2, 4


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
    modes = tuple(dict.fromkeys(mode.replace("-", " ") for mode in options.mode or (INFERENCE, TRAINING_STEP)))
    is_small = options.quick or options.dry
    return Selection(
        models=tuple(dict.fromkeys(options.model or (["resnet18"] if is_small else ["resnet50"]))),
        levels=tuple(dict.fromkeys(options.level or [MODEL])),
        batch_sizes={mode: _batch_sizes(options, mode, device) for mode in modes},
        dtypes=tuple(dict.fromkeys(getattr(torch, name) for name in options.dtype or ["float32"])),
        device=device,
        image_size=options.image_size or (DRY_IMAGE if options.dry else 224),
        one_of_each=options.dry,
    )


def method_for(options: argparse.Namespace, device: torch.device) -> Method:
    """How long to measure. On a GPU nobody's threads are in the way of the next one, so nobody waits for them."""
    method = Method(pause=0.0) if device.type == "cuda" else Method()
    if options.quick:
        method = replace(method, rounds=7, min_seconds=0.3, most_rounds=30)
    if options.dry:
        method = ONCE
    given = {name: getattr(options, name) for name in ("rounds", "min_seconds")}
    method = replace(method, **{name: value for name, value in given.items() if value is not None})
    return replace(method, most_rounds=max(method.rounds, method.most_rounds))


def budget_of(options: argparse.Namespace) -> float:
    """Seconds for the whole run; infinity where nobody asked."""
    if options.budget is not None:
        return options.budget
    return QUICK_SECONDS if options.quick and not options.dry else math.inf


def make_tasks(selection: Selection) -> list[Task]:
    """The tasks, those of a model beside each other, with growing batch sizes."""
    makers, where = [_maker(level) for level in selection.levels], (selection.device, selection.image_size)
    once: dict[tuple[object, ...], Task] = {}
    for name in selection.models:
        for make in makers:
            for mode, sizes in selection.batch_sizes.items():
                for dtype in selection.dtypes:
                    for task in make([name], [mode], sizes, [dtype], *where):  # models share the shapes of ops
                        # "bn_apply" of "bn_apply 64x56x56", "resnet18" of "resnet18 layer1.0"
                        subject = task.subject.split()[0] if selection.one_of_each else task.subject
                        key = (task.level, subject, task.mode, task.batch_size, task.dtype, task.image_size)
                        once.setdefault(key, task)
    return list(once.values())


def make_contenders(options: argparse.Namespace) -> list[Contender]:
    """Who takes part."""
    from fused_resnet.bench.suite.registry import fits, select

    found, left_out = list(select(options.contenders)), options.without or []
    for pattern in left_out:
        if not any(fits(contender.name, pattern) for contender in found):
            names = ", ".join(contender.name for contender in found)
            raise ValueError(f"--without must fit a contender; got {pattern!r}, and there are {names}")
    if options.quick and not options.contenders:
        left_out = [*left_out, *NOT_QUICKLY]
    found = [contender for contender in found if not any(fits(contender.name, pattern) for pattern in left_out)]
    if not found:
        raise ValueError("--without must leave somebody; got patterns that fit all contenders")
    return found


def _maker(level: str) -> Callable[..., Any]:
    """The function that makes the tasks of a level."""
    from fused_resnet.bench.suite.networks import block_tasks, model_tasks
    from fused_resnet.bench.suite.op_task import op_tasks

    return {MODEL: model_tasks, BLOCK: block_tasks, OP: op_tasks}[level]


def _batch_sizes(options: argparse.Namespace, mode: str, device: torch.device) -> tuple[int, ...]:
    on_gpu = device.type == "cuda"
    if options.batch_size:
        return tuple(sorted(set(options.batch_size)))
    if options.dry or options.quick:
        return (DRY_BATCH if options.dry else QUICK_BATCH,)
    return (GPU_BATCHES if on_gpu else CPU_BATCHES)[mode != INFERENCE]
