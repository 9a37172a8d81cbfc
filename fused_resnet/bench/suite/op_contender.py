"""Who takes part at op level: PyTorch, this package's backends one by one, and what else PyTorch offers for an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.op_base import COMPILE, EAGER, SEPARATE, OpTask, on_backend
from fused_resnet.bench.suite.op_conv_inference import CUDNN_FUSED, FOLDED, NCHW, PACKED
from fused_resnet.bench.suite.op_pass import TWO_OPS
from fused_resnet.bench.suite.op_stem import CONVOLUTION_AND_POOL
from fused_resnet.bench.suite.task import Prepared

BACKENDS = ("cuda", "triton", "native", SEPARATE, "reference")
WAYS = (EAGER, NCHW, FOLDED, COMPILE, CUDNN_FUSED)
OUR_WAYS = (PACKED, *TWO_OPS, *CONVOLUTION_AND_POOL)


def op_contenders() -> list[Contender]:
    """All of them; who cannot do a task says why, of the task and of this machine.

    "ours separate" is PyTorch's convolution (cuDNN, oneDNN) with this package's passes beside it, "ours packed oneDNN"
    what ``freeze`` runs on a CPU. "eager" is channels_last, the format that the fused kernels take; "eager NCHW" is
    there for inference convolutions.
    """
    found = [Contender(name, _why_not_way(name), _prepare_way(name)) for name in WAYS]
    found += [Contender(ours(name), _why_not_backend(name), _prepare_backend(name), ours=True) for name in BACKENDS]
    found += [Contender(ours(name), _why_not_way(name), _prepare_way(name), ours=True) for name in OUR_WAYS]
    return found


def ours(name: str) -> str:
    """The name of the contender that is a backend of this package, or a way that this package runs."""
    return f"ours {name}"


def _why_not_way(name: str) -> Callable[[Any], list[str]]:
    return lambda task: why_no_op(task) or task.why_not_way(name)


def _why_not_backend(name: str) -> Callable[[Any], list[str]]:
    return lambda task: why_no_op(task) or task.why_not(name)


def why_no_op(task: Any) -> list[str]:
    return [] if isinstance(task, OpTask) else ["it takes tasks at op level only"]


def _prepare_way(name: str) -> Callable[[Any], Prepared]:
    return lambda task: task.prepare(name, task.ways()[name])


def _prepare_backend(name: str) -> Callable[[Any], Prepared]:
    return lambda task: task.prepare(name, lambda inputs: on_backend(name, task.ours(inputs)))
