"""The fused operations as functions: gradients begin here, parameters do not."""

from fused_resnet.ops.backend import BackendError, empty_cache, requested_backend, use_backend, why_not
from fused_resnet.ops.bn_act import BatchNorm, bn_act, bn_act_dual
from fused_resnet.ops.conv_bn_act import conv_bn_act

__all__ = [
    "BackendError",
    "BatchNorm",
    "bn_act",
    "bn_act_dual",
    "conv_bn_act",
    "empty_cache",
    "requested_backend",
    "use_backend",
    "why_not",
]
