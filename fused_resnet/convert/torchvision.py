"""torchvision's ResNet classes with our forward. Importing this file imports torchvision.

``fuse`` gives a module one of these in place of its class. They add nothing to what the module holds, so parameters,
buffers, hooks and names stay; they are module-level, so ``copy.deepcopy`` and ``pickle`` find them; and they inherit
from both, so ``isinstance`` holds for torchvision's class and for ours.
"""

import functools
from typing import Any

import torch  # noqa: F401  which torchvision's forwards need, under torch.jit.script
from torch import Tensor, nn
from torchvision.models import resnet

from fused_resnet.models.resnet import ResNet
from fused_resnet.modules.basic_block import BasicBlock
from fused_resnet.modules.bottleneck import Bottleneck


def _of(ours: type[nn.Module], theirs: type[nn.Module], name: str = "forward") -> Any:
    """Our method, for as long as nobody replaces theirs. Its source, which torch.jit.script compiles, is theirs."""
    written, fused = getattr(theirs, name), getattr(ours, name)

    @functools.wraps(written)
    def method(self: nn.Module, x: Tensor) -> Tensor:
        now = getattr(theirs, name)
        return fused(self, x) if now is written else now(self, x)

    return method


class FusedBasicBlock(BasicBlock, resnet.BasicBlock):
    sites = BasicBlock.sites
    __init__ = resnet.BasicBlock.__init__
    forward = _of(BasicBlock, resnet.BasicBlock)


class FusedBottleneck(Bottleneck, resnet.Bottleneck):
    sites = Bottleneck.sites
    __init__ = resnet.Bottleneck.__init__
    forward = _of(Bottleneck, resnet.Bottleneck)


class FusedResNet(ResNet, resnet.ResNet):
    sites = ResNet.sites
    __init__ = resnet.ResNet.__init__
    forward = _of(ResNet, resnet.ResNet)
    _forward_impl = _of(ResNet, resnet.ResNet, "_forward_impl")


FUSED_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
    resnet.ResNet: FusedResNet,
}
