"""What is measured: from the options of ``bench`` to a list of tasks and of contenders."""

from __future__ import annotations

import argparse
import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fused_resnet.bench.result import BLOCK, INFERENCE, MODEL, OP, TRAINING_STEP
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.measure import SLOW_TO_SET_UP
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.suite.task import Task

CPU_BATCHES = {INFERENCE: (1, 8), "training": (16,)}
GPU_BATCHES = {INFERENCE: (1, 32, 256), "training": (1, 32, 256)}
CPU_SWEEP, GPU_SWEEP = 256, 8192
"""The largest batch of a doubling; memory or patience ends it before."""
SWEEP_SECONDS = 10.0
"""A doubling ends when the quickest run takes longer."""
SMALLEST_IMAGE = 32
QUICK_SECONDS = 60.0
NOT_QUICKLY = (
    *SLOW_TO_SET_UP,
    *("fused native", "fused separate", "fused reference", "fused level ?", "ours reference"),
)
"""Patterns of the contenders that a quick run leaves out: slow compilers, and ours one by one."""
DRY_IMAGE, DRY_BATCH = 32, 2


@dataclass(frozen=True)
class Selection:
    """What is measured.

    Attributes:
        batch_sizes: by mode.
        sweep: batch sizes double until memory or `SWEEP_SECONDS` ends it.
        one_of_each: of the blocks of a model, and of the shapes of an op, the first only.
    """

    models: tuple[str, ...]
    levels: tuple[str, ...]
    batch_sizes: dict[str, tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    image_size: int
    sweep: bool = False
    one_of_each: bool = False

    @property
    def dtype_names(self) -> list[str]:
        return [str(dtype).removeprefix("torch.") for dtype in self.dtypes]


def select(options: argparse.Namespace) -> Selection:
    """What the options ask for; what was not given is chosen for the device.

    Raises:
        ValueError: options that do not go together, or a device that is not here; the message names the option.
    """
    device = _device(options.device)
    modes = tuple(dict.fromkeys(mode.replace("-", " ") for mode in options.mode or ()))
    if options.latency:
        for name, given in (("--mode", options.mode), ("--batch-size", options.batch_size), ("--sweep", options.sweep)):
            if given:
                raise ValueError(f"--latency is inference at batch 1; got {name} beside it")
        modes = (INFERENCE,)
    if options.sweep and options.batch_size:
        raise ValueError("--sweep chooses the batch sizes; got --batch-size beside it")
    modes = modes or (INFERENCE, TRAINING_STEP)
    image_size = options.image_size or (DRY_IMAGE if options.dry else 224)
    small = options.quick or options.dry
    return Selection(
        models=tuple(dict.fromkeys(options.model or (["resnet18"] if small else ["resnet50"]))),
        levels=tuple(dict.fromkeys(options.level or [MODEL])),
        batch_sizes={mode: _batch_sizes(options, mode, device) for mode in modes},
        dtypes=tuple(dict.fromkeys(getattr(torch, name) for name in options.dtype or ["float32"])),
        device=device,
        image_size=image_size,
        sweep=options.sweep,
        one_of_each=options.dry,
    )


def method_for(options: argparse.Namespace, device: torch.device) -> Method:
    """How long to measure. On a GPU nobody's threads are in the way of the next one, so nobody waits for them."""
    standard = Method(pause=0.0) if device.type == "cuda" else Method()
    rounds, min_seconds, most_rounds, pause = (
        standard.rounds,
        standard.min_seconds,
        standard.most_rounds,
        standard.pause,
    )
    if options.quick:
        rounds, min_seconds, most_rounds = 7, 0.3, 30
    if options.dry:
        rounds, min_seconds, most_rounds, pause = 1, 0.0, 1, 0.0
    if options.rounds is not None:
        rounds = options.rounds
    if options.min_seconds is not None:
        min_seconds = options.min_seconds
    return Method(
        rounds=rounds,
        min_seconds=min_seconds,
        most_rounds=max(rounds, most_rounds),
        sample_seconds=0.0 if options.dry else standard.sample_seconds,
        pause=pause,
        warm_up=not options.dry,
    )


def budget_of(options: argparse.Namespace) -> float:
    """Seconds for the whole run; infinity where nobody asked."""
    if options.budget is not None:
        return options.budget
    return QUICK_SECONDS if options.quick and not options.dry else math.inf


def make_tasks(selection: Selection) -> list[Task]:
    """The tasks, those of a model beside each other, with growing batch sizes.

    Raises:
        ValueError: a model is not known at one of the levels.
    """
    tasks: list[Task] = []
    makers = [_maker(level) for level in selection.levels]
    for name in selection.models:
        for make in makers:
            for mode, sizes in selection.batch_sizes.items():
                for dtype in selection.dtypes:
                    tasks += make([name], [mode], sizes, [dtype], selection.device, selection.image_size)
    once: dict[tuple[object, ...], Task] = {}
    for task in tasks:  # models share the shapes of ops
        subject = _kind(task) if selection.one_of_each else task.subject
        once.setdefault((task.level, subject, task.mode, task.batch_size, task.dtype, task.image_size), task)
    return list(once.values())


def make_contenders(options: argparse.Namespace) -> list[Contender]:
    """Who takes part.

    Raises:
        ValueError: a pattern that fits nobody.
    """
    from fused_resnet.bench.suite.registry import select as contenders_of

    found = list(contenders_of(options.contenders))
    left_out = options.without or []
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


def fits(name: str, pattern: str) -> bool:
    """Whether a contender's name is the pattern, with ``*`` and ``?`` as in a shell, in any case."""
    return fnmatch.fnmatchcase(name.lower(), pattern.lower())


def _kind(task: Task) -> str:
    """The subject without its place in the network or its shape: "resnet18" of "resnet18 layer1.0", "bn_apply" of
    "bn_apply 64x56x56"."""
    return task.subject.split()[0]


def _maker(level: str) -> Callable[[Sequence[str], Sequence[str], Sequence[int], Sequence[torch.dtype], Any, int], Any]:
    """The function that makes the tasks of a level."""
    if level == MODEL:
        from fused_resnet.bench.suite.model_task import model_tasks

        return model_tasks
    if level == BLOCK:
        from fused_resnet.bench.suite.block_task import block_tasks

        return block_tasks
    assert level == OP
    from fused_resnet.bench.suite.op_task import op_tasks

    return op_tasks


def _batch_sizes(options: argparse.Namespace, mode: str, device: torch.device) -> tuple[int, ...]:
    if options.batch_size:
        return tuple(sorted(set(options.batch_size)))
    if options.latency:
        return (1,)
    on_gpu = device.type == "cuda"
    if options.sweep:
        largest = GPU_SWEEP if on_gpu else CPU_SWEEP
        return tuple(2**power for power in range(largest.bit_length()))
    kind = INFERENCE if mode == INFERENCE else "training"
    if options.dry:
        return (DRY_BATCH,)
    if options.quick:
        return (4,)
    return (GPU_BATCHES if on_gpu else CPU_BATCHES)[kind]


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device must name a device such as cpu or cuda:1; got {name!r}") from error
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ValueError(f"--device must be cpu or a GPU that PyTorch finds here; got {name!r}")
    return device
