"""How far a convolution of a training step is fused with the norms around it: the levels, and who decides.

===== ==============================================================================================
level what one pass over memory holds
===== ==============================================================================================
0     the convolution (cuDNN, oneDNN) alone; norm, add and ReLU beside it (``ops/bn_act.py``)
1     the convolution and the statistics of the norm behind it
2     and the norm and ReLU in front of it, so that no activation inside a block is written
3     and the same in backward: both gradients of a convolution, the norm behind it, the norm in front
===== ==============================================================================================

The automatic choice is the level that was fastest here for this convolution, where ``ops/route/measured_plan.py`` knows
of a measurement. Else level 3 where the Triton kernels run on the device and have matrix instructions for the dtype, by
what is known and not by measurement: it moves the fewest bytes (benchmarks/step_bytes.py), and nearly every convolution
of a ResNet waits for memory. On the CPU level 2 where the C++ convolutions take it, which were measured to be faster
than oneDNN's (with AVX2; compiled for AVX-512 as well). There the processor is waited for, not memory: the statistics
are a pass of their own, and the gradient of a convolution's output is written once for both gradients that read it.
Else level 0. A convolution that the kernels cannot take falls to level 0 alone. ``use_fusion_level``, or
FUSED_RESNET_LEVEL in the environment, asks for another.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.ops.layout import is_channels_last_once_dense
from fused_resnet.ops.route import measured_plan
from fused_resnet.ops.route.backend import AUTO, is_native, requested_backend, why_not

ENVIRONMENT_VARIABLE = "FUSED_RESNET_LEVEL"
HIGHEST_LEVEL = 3
NATIVE_LEVEL = 2
"""The highest that the CPU's C++ has."""
MOST_DECISIONS = 4096

_decided: dict[tuple[Any, ...], int] = {}
"""What ``training_level`` has answered: a block asks for each of its convolutions at every forward."""


def use_fusion_level(level: int | None) -> contextlib.AbstractContextManager[None]:
    """``with use_fusion_level(level):`` trains residual blocks at this level (None for the automatic choice).

    For the whole process, as ``use_backend``. A block keeps the level of its forward for its backward. Asked for by
    number, levels 1 to 3 run anywhere, through the reference where no kernel takes them: right, but slow. What no
    backend but the reference takes at all (float64, for one) stays at level 0 unless ``use_backend("reference")`` asks
    for that too.

    Raises:
        TypeError, ValueError: level is not None, 0, 1, 2 or 3.
    """
    return _using(_checked(level, "level"))


@contextlib.contextmanager
def _using(level: int | None) -> Iterator[None]:
    global _requested
    before, _requested = _requested, level
    try:
        yield
    finally:
        _requested = before


def requested_fusion_level() -> int | None:
    """The level asked for by ``use_fusion_level``, else by the environment when this was imported, else None."""
    return _requested


def training_level(
    x: Tensor,
    conv_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> int:
    """The level at which this convolution trains: 0 where ``why_not_fused_training`` has a reason; the one asked for,
    else the one that was fastest here, else the highest.

    Args:
        x: (N, C, H, W), of the dtype, device and memory format that the convolution gets.
        conv_weight: (K, C / groups, R, S), x's dtype.
    """
    weight = (type(conv_weight), conv_weight.shape, conv_weight.dtype, conv_weight.device)
    image = (type(x), x.shape, x.dtype, x.device, is_channels_last_once_dense(x))
    settings = (tuple(stride), tuple(padding), tuple(dilation), groups)
    asked_for = (_requested, requested_backend(), _needs_full_float32(x), measured_plan.generation)
    key = (image, weight, settings, asked_for)
    level = _decided.get(key)
    if level is None:
        fused = not why_not_fused_training(x, conv_weight, stride, padding, dilation, groups)
        measured = measured_plan.level_for(x, conv_weight, stride, padding, dilation, groups)
        if not fused:
            level = 0
        elif measured is None or _requested is not None or requested_backend() != AUTO:
            level = training_level_asked_for(x)
        else:
            level = min(measured, highest_level(x))
        if len(_decided) >= MOST_DECISIONS:
            _decided.clear()
        _decided[key] = level
    return level


def training_level_asked_for(x: Tensor) -> int:
    """The level of what has no reason against it, on the device of x: the one asked for, else the highest there."""
    return highest_level(x) if _requested is None else _requested


def highest_level(x: Tensor) -> int:
    """The highest level that the kernels of x's device have."""
    return NATIVE_LEVEL if is_native(x) else HIGHEST_LEVEL


def why_not_fused_training(
    x: Tensor,
    conv_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[str]:
    """The reasons why this convolution trains at level 0; an empty list means that it does not. Arguments as above."""
    if _requested == 0:
        return ["level 0 was asked for"]
    if groups != 1:
        return [f"groups is {groups}; the training kernels take 1"]
    backend = requested_backend()
    if backend == "separate":
        return [f"backend {backend!r} was asked for, which has no training convolution"]
    if backend == "reference" or (backend == AUTO and _requested is not None and not x.is_cuda):
        return []
    if backend == "native" and _requested == HIGHEST_LEVEL:
        return [f"backend {backend!r} was asked for, which has levels 1 and 2, and level {_requested}"]
    settings = (list(stride), list(padding), list(dilation), groups)
    forward = (x, conv_weight, None, None, None, None, None, None, 0.0, 0.0, *settings, True)
    if is_native(x):
        return why_not("native", "conv_stats", *forward)
    reasons = why_not("triton", "conv_stats", *forward)
    if not reasons and _requested is None and x.is_cuda and _needs_full_float32(x):
        reasons.append("float32 that may not be rounded to TF32 has no matrix instructions in Triton")
    return reasons


def why_not_fused_pool(y: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]) -> list[str]:
    """The reasons why the norm and ReLU of y are not one pass with the max pooling behind them; [] if they are.

    That is so at levels 2 and 3, where nothing that only the next operation reads is written. Of y, the output of a
    convolution, only dtype, device and layout matter.
    """
    level = training_level_asked_for(y)
    if level < 2:
        return [f"level {level} was asked for, and pooling is fused at levels 2 and 3"]
    if is_native(y) and level <= NATIVE_LEVEL:
        return ["on the CPU pooling is a pass of its own"]
    backend = requested_backend()
    if backend in ("native", "separate"):
        return [f"backend {backend!r} was asked for, which has no pooling"]
    if backend == "reference" or (backend == AUTO and _requested is not None and not y.is_cuda):
        return []
    vector = torch.empty(y.shape[1], device=y.device)
    return why_not("triton", "bn_apply_pool", y, vector, vector, None, None, kernel_size, stride, padding)


def _needs_full_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]


def _checked(level: int | None, name: str) -> int | None:
    if level is not None and (isinstance(level, bool) or not isinstance(level, int)):
        raise TypeError(f"{name} must be an int or None; got {type(level).__name__}")
    if level is not None and not 0 <= level <= HIGHEST_LEVEL:
        raise ValueError(f"{name} must be None or 0 to {HIGHEST_LEVEL}; got {level}")
    return level


def _from_environment() -> int | None:
    text = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
    if text == AUTO:
        return None
    if not text.isdecimal():
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be auto or 0 to {HIGHEST_LEVEL}; got {text!r}")
    return _checked(int(text), ENVIRONMENT_VARIABLE)


# One for the process, not for the thread, as the requested backend.
_requested: int | None = _from_environment()
