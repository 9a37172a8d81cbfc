"""Everyone who can take part, in the order of tables, and the choice among them by name."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from typing import Any

from fused_resnet.bench.result import OP
from fused_resnet.bench.suite.network_contenders import (
    compiled_contenders,
    eager_contenders,
    graph_contender,
    our_contenders,
)
from fused_resnet.bench.suite.op_base import BACKENDS, COMPILE, EAGER, OpTask
from fused_resnet.bench.suite.op_conv_inference import FOLDED, NCHW, PACKED
from fused_resnet.bench.suite.runtimes import onnxruntime_contender, openvino_contender
from fused_resnet.bench.suite.task import Contender, Prepared

WAYS = (EAGER, NCHW, FOLDED, COMPILE)


def contenders() -> list[Contender]:
    """All of them: PyTorch's first, then this package's, then peers, then those of ops alone. A name is there once,
    also where one contender does networks and another one of that name does ops."""
    found: dict[str, Contender] = {}
    peers = [onnxruntime_contender(), openvino_contender()]
    everyone = [*eager_contenders(), *compiled_contenders(), graph_contender(), *our_contenders(), *peers]
    for contender in (*everyone, *op_contenders()):
        before = found.get(contender.name)
        found[contender.name] = contender if before is None else _both(before, contender)
    return list(found.values())


def select(patterns: Sequence[str] | None = None, without: Sequence[str] | None = None) -> list[Contender]:
    """Those whose names fit one of the patterns (all of them without patterns) and none of ``without``, in their own
    order; ``*``, ``?`` and ``[...]`` as in a shell, in any case."""
    everyone = contenders()
    for pattern in (*(patterns or ()), *(without or ())):
        if not any(_fits(contender, [pattern]) for contender in everyone):
            names = ", ".join(contender.name for contender in everyone)
            raise ValueError(f"a contender must be one of {names}, or a pattern that fits one; got {pattern!r}")
    found = [each for each in everyone if (not patterns or _fits(each, patterns)) and not _fits(each, without or ())]
    if not found:
        raise ValueError("--without must leave somebody; got patterns that fit all contenders")
    return found


def _fits(contender: Contender, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(contender.name.lower(), pattern.lower()) for pattern in patterns)


def _both(networks: Contender, ops: Contender) -> Contender:
    """One contender out of two, by the level of the task."""
    return Contender(
        networks.name,
        lambda task: (ops if task.level == OP else networks).why_absent(task),
        lambda task: (ops if task.level == OP else networks).prepare(task),
        networks.ours,
    )


def op_contenders() -> list[Contender]:
    """All of them; who cannot do a task says why, of the task and of this machine.

    "ours separate" is PyTorch's convolution (cuDNN, oneDNN) with this package's passes beside it, "ours packed oneDNN"
    what ``freeze`` runs on a CPU. "eager" is channels_last, the format that the fused kernels take; "eager NCHW" is
    there for inference convolutions.
    """
    named = [*((name, name, False) for name in WAYS), *((name, ours(name), True) for name in (*BACKENDS, PACKED))]
    return [
        Contender(title, functools.partial(_why_absent, name), functools.partial(_prepare, name), is_ours)
        for name, title, is_ours in named
    ]


def ours(name: str) -> str:
    """The name of the contender that is a backend of this package, or a way that this package runs."""
    return f"ours {name}"


def _why_absent(name: str, task: Any) -> list[str]:
    return task.why_not(name) if isinstance(task, OpTask) else ["it takes tasks at op level only"]


def _prepare(name: str, task: OpTask) -> Prepared:
    return task.prepare(name, task.ways()[name])
