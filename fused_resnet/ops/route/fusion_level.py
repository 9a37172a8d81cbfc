"""How far a convolution of a training step is fused with the norms around it: the levels, and who decides.

===== ==============================================================================================
level what one pass over memory holds
===== ==============================================================================================
0     the convolution (cuDNN, oneDNN) alone; norm, add and ReLU beside it (``ops/bn_act.py``)
1     the convolution and the statistics of the norm behind it
2     and the norm and ReLU in front of it, so that no activation inside a block is written
3     and the same in backward: both gradients of a convolution, the norm behind it, the norm in front
===== ==============================================================================================

The automatic choice is the level that was fastest here for this convolution, where ``ops/plan/measured_plan.py`` knows
of a measurement. Else level 3 where the Triton kernels run on the device and have matrix instructions for the dtype, by
what is known and not by measurement: it moves the fewest bytes (benchmarks/step_bytes.py), and nearly every convolution
of a ResNet waits for memory. On the CPU level 2 where the C++ convolutions take it, which were measured to be faster
than oneDNN's (with AVX2; compiled for AVX-512 as well). There the processor is waited for, not memory: the statistics
are a pass of their own, and the gradient of a convolution's output is written once for both gradients that read it.
Else level 0. A convolution that the kernels cannot take falls to level 0 alone. ``use_fusion_level``, or
FUSED_RESNET_LEVEL in the environment, asks for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import NO_RUNNING_STATISTICS, ConvSettings, PoolSettings
from fused_resnet.ops.plan import measured_plan
from fused_resnet.ops.route import context
from fused_resnet.ops.route.packing import flat
from fused_resnet.ops.route.reasons import reasons_against, why_not_device
from fused_resnet.ops.route.request import AUTO, HIGHEST_LEVEL

NATIVE_LEVEL = 2
"""The highest that the CPU's C++ has."""


def training_level(
    x: Tensor, conv_weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> int:
    """The level at which this convolution trains: 0 where ``why_not_fused_training`` has a reason; the one asked for,
    else the one that was fastest here, else the highest.

    Args:
        x: (N, C, H, W), of the dtype, device and memory format that the convolution gets.
        conv_weight: (K, C / groups, R, S), x's dtype.
    """
    settings = ConvSettings.of(stride, padding, dilation, groups)
    return 0 if why_not_fused(x, conv_weight, settings) else level_of_fused(x, conv_weight, settings)


def why_not_fused_training(
    x: Tensor, conv_weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> list[str]:
    """The reasons why this convolution trains at level 0; an empty list means that it does not. Arguments as above."""
    return why_not_fused(x, conv_weight, ConvSettings.of(stride, padding, dilation, groups))


def level_of_fused(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> int:
    """`training_level` of a convolution that ``why_not_fused_training`` has no reason against."""
    asked = context.request()
    if asked.level is None and asked.backend == AUTO:
        measured = measured_plan.level_for(x, conv_weight, settings)
        if measured is not None:
            return min(measured, highest_level(x))
    return training_level_asked_for(x)


def training_level_asked_for(x: Tensor) -> int:
    """The level of what has no reason against it, on the device of x: the one asked for, else the highest there."""
    level = context.request().level
    return highest_level(x) if level is None else level


def highest_level(x: Tensor) -> int:
    """The highest level that the kernels of x's device have."""
    return NATIVE_LEVEL if is_native(x) else HIGHEST_LEVEL


def is_native(x: Tensor) -> bool:
    """True if the convolutions that train on the device of x are the CPU's C++, automatically or asked for; Triton's
    interpreter comes first."""
    asked = context.request().backend
    return asked == "native" or (asked == AUTO and not x.is_cuda and bool(why_not_device("triton", x.device)))


def why_not_fused(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> list[str]:
    """`why_not_fused_training` of settings in one value."""
    backend, level, _ = context.request()
    if level == 0:
        return ["level 0 was asked for"]
    if settings.groups != 1:
        return [f"groups is {settings.groups}; the training kernels take 1"]
    if backend == "separate":
        return [f"backend {backend!r} was asked for, which has no training convolution"]
    if backend == "reference" or (backend == AUTO and level is not None and not x.is_cuda):
        return []
    if backend == "native" and level == HIGHEST_LEVEL:
        return [f"backend {backend!r} was asked for, which has levels 1 and 2, and level {level}"]
    forward = arguments_of_conv_stats(x, conv_weight, settings)
    if is_native(x):
        return list(reasons_against("native", "conv_stats", forward))
    reasons = list(reasons_against("triton", "conv_stats", forward))
    if not reasons and level is None and x.is_cuda and needs_full_float32(x):
        reasons.append("float32 that may not be rounded to TF32 has no matrix instructions in Triton")
    return reasons


def why_not_fused_pool(y: Tensor, settings: PoolSettings) -> list[str]:
    """The reasons why the norm and ReLU of y are not one pass with the max pooling behind them; [] if they are.

    That is so at levels 2 and 3, where nothing that only the next operation reads is written. Of y, the output of a
    convolution, only dtype, device and layout matter.
    """
    backend, asked_level, _ = context.request()
    level = training_level_asked_for(y)
    if level < 2:
        return [f"level {level} was asked for, and pooling is fused at levels 2 and 3"]
    if is_native(y) and level <= NATIVE_LEVEL:
        return ["on the CPU pooling is a pass of its own"]
    if backend in ("native", "separate"):
        return [f"backend {backend!r} was asked for, which has no pooling"]
    if backend == "reference" or (backend == AUTO and asked_level is not None and not y.is_cuda):
        return []
    vector = torch.empty(y.shape[1], device=y.device)
    return list(reasons_against("triton", "bn_apply_pool", (y, vector, vector, None, None, *settings)))


def arguments_of_conv_stats(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> tuple[Any, ...]:
    """Those of the op's schema, with no norm before and no running statistics."""
    return tuple(flat("conv_stats", (x, conv_weight, None, NO_RUNNING_STATISTICS, settings, True)))


def needs_full_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]
