"""Our blocks as torchvision's, and torchvision's with our forward. Importing this file imports torchvision.

Ours are built as the first two here once torchvision is imported (``drop_in.py``), and ``fuse`` gives
torchvision's modules the classes behind those. They add nothing to what a module holds, so parameters, buffers, hooks
and names stay; they are module-level, so ``copy.deepcopy`` and ``pickle`` find them; and they inherit from both, so
``isinstance`` holds for torchvision's class and for ours.
"""

import functools
from typing import Any

import torch  # noqa: F401  which torchvision's forwards need, under torch.jit.script
from torch import Tensor, nn
from torchvision.models import resnet

from fused_resnet.modules import basic_block, bottleneck


class BasicBlock(basic_block.BasicBlock, resnet.BasicBlock):
    pass


class Bottleneck(bottleneck.Bottleneck, resnet.Bottleneck):
    pass


def ours_unless_replaced(ours: type[nn.Module], theirs: type[nn.Module], name: str = "forward") -> Any:
    """Our method, for as long as nobody replaces theirs. Its source, which torch.jit.script compiles, is theirs."""
    written, fused = getattr(theirs, name), getattr(ours, name)

    @functools.wraps(written)
    def method(self: nn.Module, x: Tensor) -> Tensor:
        now = getattr(theirs, name)
        return fused(self, x) if now is written else now(self, x)

    return method


class FusedBasicBlock(BasicBlock):
    sites = BasicBlock.sites  # which this forward runs too
    __init__ = resnet.BasicBlock.__init__
    forward = ours_unless_replaced(BasicBlock, resnet.BasicBlock)


class FusedBottleneck(Bottleneck):
    sites = Bottleneck.sites  # which this forward runs too
    __init__ = resnet.Bottleneck.__init__
    forward = ours_unless_replaced(Bottleneck, resnet.Bottleneck)
