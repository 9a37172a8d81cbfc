"""The meaning of every op, in plain PyTorch.

Every backend (the Triton kernels in ``fused_resnet.kernels``, the C++ code behind ``ops/native.py``) exports these
function names with these arguments and this meaning. This file is the oracle of the tests, the baseline of the
benchmarks, and the way that always works: any device, dtype and memory format, float64 included.

Notation: ``x`` is (N, C, H, W); statistics are vectors of C in ``statistics_dtype(x)``; ``xhat = (x - mean) * invstd``;
``z`` is the value in front of the ReLU and ``dz`` its gradient. T is the bytes of one activation.
"""

from __future__ import annotations

from fused_resnet.ops.reference_conv import conv_bn_act, conv_grad_input, conv_grad_weight, conv_stats
from fused_resnet.ops.reference_norm import (
    bn_apply,
    bn_apply_dual,
    bn_grad_apply,
    bn_grad_coefficients,
    bn_grad_stats,
    bn_stats,
    per_channel,
    statistics_dtype,
)
from fused_resnet.ops.reference_pool import bn_apply_pool, bn_pool_grad_apply, bn_pool_grad_stats

__all__ = [
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
    "per_channel",
    "statistics_dtype",
]
