"""The fused operations as functions: gradients begin here, parameters do not."""

from torch import fx

from fused_resnet.ops.batch_norm import BatchNorm
from fused_resnet.ops.bn_act import bn_act, bn_act_dual
from fused_resnet.ops.conv_bn_act import conv_bn_act
from fused_resnet.ops.conv_norm import ConvNorm
from fused_resnet.ops.flop_formulas import register_once_imported
from fused_resnet.ops.residual_block import residual_block
from fused_resnet.ops.route.choose import empty_cache, limit_kept_memory, use_backend, why_not
from fused_resnet.ops.route.context import requested_backend, requested_fusion_level, use_fusion_level
from fused_resnet.ops.route.fusion_level import training_level, why_not_fused_training
from fused_resnet.ops.route.request import BackendError
from fused_resnet.ops.stem import conv_bn_act_pool

__all__ = [
    "BackendError",
    "BatchNorm",
    "ConvNorm",
    "bn_act",
    "bn_act_dual",
    "conv_bn_act",
    "conv_bn_act_pool",
    "empty_cache",
    "limit_kept_memory",
    "requested_backend",
    "requested_fusion_level",
    "residual_block",
    "training_level",
    "use_backend",
    "use_fusion_level",
    "why_not",
    "why_not_fused_training",
]

register_once_imported()
for _name in ("bn_act", "bn_act_dual", "conv_bn_act", "conv_bn_act_pool", "residual_block"):
    fx.wrap(_name)  # each is one node of a graph
