"""The ``native`` backend: C++ over every core, for dense activations on the CPU.

Same names and meaning as ``ops/reference/``, which says what each reads and writes: passes over float32, float16 and
bfloat16 in both memory formats, and the convolutions of a training step over channels_last float32. Layout, dtype and
lifetime are settled here, where tensors become addresses. Shapes and devices are settled before: by the public
functions, and by ``reasons_against`` for whoever calls an op by itself.
"""

from __future__ import annotations

from fused_resnet.ops.backends.native.conv_training import (
    NativeConvolution,
    conv_grad_input,
    conv_grad_weight,
    conv_stats,
    why_not_conv,
)
from fused_resnet.ops.backends.native.memory import empty_cache, keep_at_most
from fused_resnet.ops.backends.native.norm import bn_apply, bn_apply_dual, bn_grad_apply, bn_grad_stats, bn_stats

__all__ = [
    "NativeConvolution",
    "bn_apply",
    "bn_apply_dual",
    "bn_grad_apply",
    "bn_grad_stats",
    "bn_stats",
    "conv_grad_input",
    "conv_grad_weight",
    "conv_stats",
    "empty_cache",
    "keep_at_most",
    "why_not_conv",
]
