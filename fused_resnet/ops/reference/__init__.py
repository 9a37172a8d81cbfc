"""The meaning of every op, in plain PyTorch.

Every backend (the Triton kernels in ``fused_resnet.kernels``, the CUDA C++ kernels behind ``ops/backends/cuda/``, the
C++ code behind ``ops/backends/native/``) exports names of this file, with these arguments and this meaning. This file
is the oracle of the tests, the baseline of the benchmarks, and the way that always works: any device, dtype and memory
format, float64 included.

Notation: ``x`` is (N, C, H, W); statistics are vectors of C in ``statistics_dtype(x)``; ``xhat = (x - mean) * invstd``;
``z`` is the value in front of the ReLU and ``dz`` its gradient. T is the bytes of one activation.
"""

from __future__ import annotations

from fused_resnet.ops.reference.conv import conv_bn_act, conv_grad_input, conv_grad_weight, conv_stats
from fused_resnet.ops.reference.mask import (
    bn_apply_dual_mask,
    bn_apply_mask,
    bn_grad_apply_mask,
    bn_grad_stats_mask,
    bn_stats_apply,
    mask_shape,
    unpack_mask,
)
from fused_resnet.ops.reference.norm import (
    bn_apply,
    bn_apply_dual,
    bn_grad_apply,
    bn_grad_coefficients,
    bn_grad_stats,
    bn_stats,
    per_channel,
    statistics_dtype,
)
from fused_resnet.ops.reference.pool import bn_apply_pool, bn_pool_grad_apply, bn_pool_grad_stats
from fused_resnet.ops.reference.stem import avgpool, stem

__all__ = [
    "avgpool",
    "bn_apply",
    "bn_apply_dual",
    "bn_apply_dual_mask",
    "bn_apply_mask",
    "bn_apply_pool",
    "bn_grad_apply",
    "bn_grad_apply_mask",
    "bn_grad_coefficients",
    "bn_grad_stats",
    "bn_grad_stats_mask",
    "bn_pool_grad_apply",
    "bn_pool_grad_stats",
    "bn_stats",
    "bn_stats_apply",
    "conv_bn_act",
    "conv_grad_input",
    "conv_grad_weight",
    "conv_stats",
    "mask_shape",
    "per_channel",
    "statistics_dtype",
    "stem",
    "unpack_mask",
]
