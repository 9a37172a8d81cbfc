"""Drop-in ``nn.Module``s: they own the parameters and buffers, read ``self.training``, and call the ops."""

from fused_resnet.modules.basic_block import BasicBlock
from fused_resnet.modules.bn_act import BatchNormAct2d, norm_act, norm_act_dual, why_not_fuse
from fused_resnet.modules.bottleneck import Bottleneck
from fused_resnet.modules.conv_bn_act import ConvBNAct2d

__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "norm_act",
    "norm_act_dual",
    "why_not_fuse",
]
