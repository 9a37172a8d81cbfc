"""What a contender for networks and blocks needs, and the reasons why it is absent where it does not have that."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from fused_resnet.bench.result import INFERENCE, MODEL, TRAINING_STEP
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.task import Prepared

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
        for condition in conditions:
            if reasons := condition(task):
                return reasons
        return []

    def prepare_in_turn(task: NetworkTask) -> Prepared:
        if task.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # for everyone, and for good: cuDNN's choices are measured ones
        return prepare(task)

    return Contender(name, why_absent, prepare_in_turn, ours)


def inference_only(task: NetworkTask) -> list[str]:
    return [] if task.mode == INFERENCE else ["it does inference only"]


def training_only(task: NetworkTask) -> list[str]:
    return [] if task.training else ["it differs in training only"]


def training_steps_only(task: NetworkTask) -> list[str]:
    return [] if task.mode == TRAINING_STEP else ["it does whole training steps only"]


def whole_networks_only(task: NetworkTask) -> list[str]:
    return [] if task.level == MODEL else ["it does whole networks only"]


def blocks_only(task: NetworkTask) -> list[str]:
    return [] if task.level != MODEL else ["it has residual blocks only, no whole networks"]


def cuda_only(task: NetworkTask) -> list[str]:
    return [] if task.device.type == "cuda" else [f"it needs a CUDA device; the task is on {task.device}"]


def cpu_only(task: NetworkTask) -> list[str]:
    return [] if task.device.type == "cpu" else [f"it is measured on CPUs only; the task is on {task.device}"]


def dtypes(*allowed: torch.dtype, why: str = "") -> Condition:
    """In one of these dtypes."""
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    reason = f"it takes {names} here" + (f": {why}" if why else "")
    return lambda task: [] if task.dtype in allowed else [reason]


def installed(package: str) -> Condition:
    """With a package of this name to import."""
    return lambda task: [] if _is_there(package) else [f"{package} is not installed"]


@functools.cache
def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # of a parent package, or of one that stands in sys.modules without a spec
        return False
