"""Everyone who can take part, in the order of tables, and the choice among them by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from fused_resnet.bench.result import OP
from fused_resnet.bench.suite.apex import apex_contenders
from fused_resnet.bench.suite.compiled import compiled_contenders
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.cudnn_frontend import cudnn_frontend_contenders
from fused_resnet.bench.suite.cudnn_fused import cudnn_fused_contenders
from fused_resnet.bench.suite.eager import eager_contenders
from fused_resnet.bench.suite.graphed import graphed_contenders
from fused_resnet.bench.suite.onnxruntime import onnxruntime_contenders
from fused_resnet.bench.suite.op_contender import op_contenders
from fused_resnet.bench.suite.openvino import openvino_contenders
from fused_resnet.bench.suite.ours import our_contenders
from fused_resnet.bench.suite.ours_by_backend import backend_contenders
from fused_resnet.bench.suite.tensorrt import tensorrt_contenders
from fused_resnet.bench.suite.timm_twin import timm_contenders


def contenders() -> list[Contender]:
    """All of them: PyTorch's first, then this package's, then peers, then those of ops alone. A name is there once,
    also where one contender does networks and another one of that name does ops."""
    found: dict[str, Contender] = {}
    for contender in (
        *eager_contenders(),
        *compiled_contenders(),
        *cudnn_fused_contenders(),
        *graphed_contenders(),
        *our_contenders(),
        *backend_contenders(),
        *onnxruntime_contenders(),
        *openvino_contenders(),
        *tensorrt_contenders(),
        *cudnn_frontend_contenders(),
        *apex_contenders(),
        *timm_contenders(),
        *op_contenders(),
    ):
        before = found.get(contender.name)
        found[contender.name] = contender if before is None else _both(before, contender)
    return list(found.values())


def select(patterns: Sequence[str] | None = None) -> list[Contender]:
    """Those whose names fit one of the patterns, in their own order; all of them without patterns.

    Args:
        patterns: names, or patterns such as "fused*", with ``*``, ``?`` and ``[...]`` as in a shell, in any case.

    Raises:
        ValueError: a pattern that fits nobody; the message lists the names.
    """
    everyone = contenders()
    if not patterns:
        return everyone
    for pattern in patterns:
        if not any(_fits(contender, pattern) for contender in everyone):
            names = ", ".join(contender.name for contender in everyone)
            raise ValueError(f"a contender must be one of {names}, or a pattern that fits one; got {pattern!r}")
    return [contender for contender in everyone if any(_fits(contender, pattern) for pattern in patterns)]


def _fits(contender: Contender, pattern: str) -> bool:
    return fnmatch.fnmatchcase(contender.name.lower(), pattern.lower())


def _both(networks: Contender, ops: Contender) -> Contender:
    """One contender out of two, by the level of the task."""
    return Contender(
        networks.name,
        lambda task: (ops if task.level == OP else networks).why_absent(task),
        lambda task: (ops if task.level == OP else networks).prepare(task),
        networks.ours,
    )
