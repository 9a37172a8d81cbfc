"""The Triton backend: the function names, arguments and meaning of ``fused_resnet/ops/reference/__init__.py``.

Data is float32, float16 or bfloat16 in channels_last; statistics are float32. Every function runs on the device and
the current stream of its first tensor. Results are bitwise the same in every run on the same device: no atomics, no
autotuning, and grids that depend on shapes and the number of multiprocessors alone.
"""

from __future__ import annotations

if __name__ != "fused_resnet.kernels":
    raise ImportError(f"these kernels are imported as fused_resnet.kernels, not as {__name__}")

from fused_resnet.kernels.bn_act import bn_apply, bn_apply_dual, bn_stats
from fused_resnet.kernels.bn_act_grad import bn_grad_apply, bn_grad_stats
from fused_resnet.kernels.bn_grad_coefficients import bn_grad_coefficients
from fused_resnet.kernels.bn_pool import bn_apply_pool
from fused_resnet.kernels.bn_pool_grad import bn_pool_grad_apply, bn_pool_grad_stats
from fused_resnet.kernels.conv import conv_bn_act
from fused_resnet.kernels.conv_grad_input import conv_grad_input
from fused_resnet.kernels.conv_grad_weight import conv_grad_weight
from fused_resnet.kernels.conv_shape import why_not_conv
from fused_resnet.kernels.conv_stats import conv_stats
from fused_resnet.kernels.device import INTERPRETED

__all__ = [
    "INTERPRETED",
    "bn_apply",
    "bn_apply_dual",
    "bn_apply_pool",
    "bn_grad_apply",
    "bn_grad_coefficients",
    "bn_grad_stats",
    "bn_pool_grad_apply",
    "bn_pool_grad_stats",
    "bn_stats",
    "conv_bn_act",
    "conv_grad_input",
    "conv_grad_weight",
    "conv_stats",
    "why_not_conv",
]
