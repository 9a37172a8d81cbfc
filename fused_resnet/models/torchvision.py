"""Our ResNet as torchvision's, and torchvision's with our forward, as ``modules/torchvision.py`` has their blocks.

Importing this file imports torchvision.
"""

import torch  # noqa: F401  which torchvision's forwards need, under torch.jit.script
from torchvision.models import resnet

from fused_resnet.models import resnet as ours
from fused_resnet.modules.torchvision import FusedBasicBlock, FusedBottleneck, ours_unless_replaced


class ResNet(ours.ResNet, resnet.ResNet):
    pass


class FusedResNet(ResNet):
    sites = ResNet.sites  # which this forward runs too
    __init__ = resnet.ResNet.__init__
    forward = ours_unless_replaced(ResNet, resnet.ResNet)
    _forward_impl = ours_unless_replaced(ResNet, resnet.ResNet, "_forward_impl")


FUSED_CLASS = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
    resnet.ResNet: FusedResNet,
}
