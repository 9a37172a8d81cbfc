"""torchvision's ResNet classes with our forward. Importing this file imports torchvision.

``fuse`` gives a module one of these in place of its class. They add nothing to what the module holds, so parameters,
buffers, hooks and names stay; they are module-level, so ``copy.deepcopy`` and ``pickle`` find them; and they inherit
from both, so ``isinstance`` holds for torchvision's class and for ours.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet

from fused_resnet.models.resnet import ResNet
from fused_resnet.modules.basic_block import BasicBlock
from fused_resnet.modules.bottleneck import Bottleneck


class FusedBasicBlock(BasicBlock, resnet.BasicBlock):
    __init__ = resnet.BasicBlock.__init__


class FusedBottleneck(Bottleneck, resnet.Bottleneck):
    __init__ = resnet.Bottleneck.__init__


class FusedResNet(ResNet, resnet.ResNet):
    __init__ = resnet.ResNet.__init__


FUSED_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
    resnet.ResNet: FusedResNet,
}
