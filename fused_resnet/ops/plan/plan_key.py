"""What a decision of a measured plan is found by: ints and strings that say what an op is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops.layout import is_channels_last_once_dense
from fused_resnet.ops.plan.plan_file import Key

_TELLING: dict[str, tuple[int, ...]] = {
    "bn_stats": (),
    "bn_apply": (5,),
    "bn_apply_dual": (),
    "bn_apply_mask": (5,),
    "bn_apply_dual_mask": (),
    "bn_stats_apply": (7, 9),
    "bn_grad_stats": (2, 7),
    "bn_grad_apply": (6, 8),
    "bn_grad_stats_mask": (5,),
    "bn_grad_apply_mask": (6, 8),
    "stem": (4,),
    "avgpool": (),
    "conv_bn_act": (4,),
}
"""By op, the places of the arguments that make another pass of it by being there or True: a residual, an output whose
ReLU masks, sums, a gradient that is written too."""
CHOSEN_OPS = frozenset(_TELLING)
"""The ops that more than one backend has a body of its own for."""

_DTYPES = {getattr(torch, name): name for name in ("float32", "float16", "bfloat16", "float64", "uint8")}


def key_of(op: str, args: tuple[Any, ...]) -> Key:
    """The key of an op in `CHOSEN_OPS`: the shape, dtype and layout of its first argument, which passes it makes of it,
    and of a convolution the weight's shape and the settings. A ReLU at the end, vectors, eps and the values in tensors
    have no part in which backend is fastest."""
    x = args[0]
    forms = tuple([args[i] is not None and args[i] is not False for i in _TELLING[op]])
    key = (x.shape, _DTYPES.get(x.dtype) or str(x.dtype), _layout(x), forms)
    if op != "conv_bn_act":
        return key
    return (*key, args[1].shape, *ConvSettings.of(*args[5:9]), _precision(x))


def level_key(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> Key:
    """The key of ``measured_plan.LEVEL``, the level at which a convolution trains."""
    image = (x.shape, _DTYPES.get(x.dtype) or str(x.dtype), _layout(x))
    return (*image, conv_weight.shape, *settings, _precision(x))


def method_key(shape: Sequence[int], dtype: torch.dtype, weight_shape: Sequence[int], settings: ConvSettings) -> Key:
    """The key of ``measured_plan.METHOD``, the way a frozen network convolves an x of this shape and dtype on the CPU.
    weight_shape: (K, C / groups, R, S)."""
    return (tuple(shape), _DTYPES.get(dtype) or str(dtype), tuple(weight_shape), *settings)


def _layout(x: Tensor) -> str:
    return "channels_last" if x.dim() == 4 and is_channels_last_once_dense(x) else "contiguous"


def _precision(x: Tensor) -> str:
    """What torch's flag lets a convolution of float32 on a GPU be rounded to; elsewhere it has no say."""
    if x.dtype != torch.float32 or not x.is_cuda:
        return ""
    return str(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
