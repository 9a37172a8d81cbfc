"""The CIFAR-10 networks of He et al. 2015, section 4.2 (https://arxiv.org/abs/1512.03385), and their plain twins.

Depth 6n + 2: a 3x3 stem of 16 filters, three stages of n blocks (two 3x3 convolutions each) with 16, 32 and 64
channels at full, half and quarter resolution, global average pooling, one fully connected layer. The shortcuts have no
parameters (option A), so a residual network and its plain twin have the same weights and differ only by ``+ x``: the
pair in which the paper shows that plain networks get worse with depth and residual ones get better.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.models.resnet import initialize
from fused_resnet.modules.basic_block import BasicBlock
from fused_resnet.modules.bn_act import norm_act
from fused_resnet.modules.plain import frozen_forward
from fused_resnet.modules.site import Body, Site

STAGE_PLANES = (16, 32, 64)
STAGE_STRIDES = (1, 2, 2)


class ZeroPadShortcut(nn.Module):
    """The paper's option A: x where F(x) is smaller and deeper, by taking every ``stride``-th pixel and appending
    channels of zeros. (N, inplanes, H, W) to (N, outplanes, ceil(H / stride), ceil(W / stride)); no parameters."""

    def __init__(self, inplanes: int, outplanes: int, stride: int) -> None:
        super().__init__()
        self.inplanes, self.outplanes, self.stride = inplanes, outplanes, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.outplanes - self.inplanes))

    def extra_repr(self) -> str:
        return f"{self.inplanes}, {self.outplanes}, stride={self.stride}"


class PlainBlock(nn.Module):
    """``BasicBlock`` without the shortcut: relu(H(x)) in place of relu(F(x) + x), with the same children."""

    sites: ClassVar = (Site("conv1", "bn1", "relu"), Site("conv2", "bn2", "relu"))

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # torch.jit.script compiles what follows this alone
            out = frozen_forward(self, x)
            if out is not None:
                return out
            x = norm_act(self.bn1, self.relu, self.conv1(x))
            return norm_act(self.bn2, self.relu, self.conv2(x))
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


class CIFARResNet(nn.Module):
    """A residual network for 32x32 images, or with ``shortcut=False`` its plain twin.

    The input is (N, 3, H, W), any floating dtype and either memory format; the output is (N, num_classes), the logits.
    The state_dicts of a network and its twin have the same names and shapes.

    Args:
        depth: the number of layers with weights, 6n + 2 for n >= 1: 8, 14, 20, 26, 32 ...
        num_classes: the number of logits.
        shortcut: whether each pair of convolutions adds its input.

    Raises:
        ValueError: depth is not 6n + 2.
    """

    sites: ClassVar = (Site("conv1", "bn1", "relu"),)
    body: ClassVar = Body(("layer1", "layer2", "layer3"), "avgpool", "fc")

    def __init__(self, depth: int, num_classes: int = 10, shortcut: bool = True) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 for n >= 1 (such as 20, 32, 44, 56 or 110); got {depth}")
        self.depth = depth

        self.conv1 = nn.Conv2d(3, STAGE_PLANES[0], kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGE_PLANES[0])
        self.relu = nn.ReLU(inplace=True)

        stages = []
        inplanes = STAGE_PLANES[0]
        for planes, stride in zip(STAGE_PLANES, STAGE_STRIDES, strict=True):
            blocks = [_block(inplanes, planes, stride, shortcut)]
            blocks += [_block(planes, planes, 1, shortcut) for _ in range(1, depth // 6)]
            stages.append(nn.Sequential(*blocks))
            inplanes = planes
        self.layer1, self.layer2, self.layer3 = stages

        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # torch.jit.script compiles this branch alone
            x = self.relu(self.bn1(self.conv1(x)))
        else:
            out = frozen_forward(self, x)
            if out is not None:
                return out
            x = norm_act(self.bn1, self.relu, self.conv1(x))

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)

        x = self.avgpool(x)
        return self.fc(torch.flatten(x, 1))


def _block(inplanes: int, planes: int, stride: int, shortcut: bool) -> nn.Module:
    if not shortcut:
        return PlainBlock(inplanes, planes, stride)
    same_shape = stride == 1 and inplanes == planes
    return BasicBlock(inplanes, planes, stride, None if same_shape else ZeroPadShortcut(inplanes, planes, stride))


def cifar_resnet20(num_classes: int = 10) -> CIFARResNet:
    """20 layers, 0.27 million parameters; 8.75% error on CIFAR-10 in the paper."""
    return CIFARResNet(20, num_classes)


def cifar_resnet32(num_classes: int = 10) -> CIFARResNet:
    """32 layers, 0.46 million parameters; 7.51% error on CIFAR-10 in the paper."""
    return CIFARResNet(32, num_classes)


def cifar_resnet44(num_classes: int = 10) -> CIFARResNet:
    """44 layers, 0.66 million parameters; 7.17% error on CIFAR-10 in the paper."""
    return CIFARResNet(44, num_classes)


def cifar_resnet56(num_classes: int = 10) -> CIFARResNet:
    """56 layers, 0.85 million parameters; 6.97% error on CIFAR-10 in the paper."""
    return CIFARResNet(56, num_classes)


def cifar_resnet110(num_classes: int = 10) -> CIFARResNet:
    """110 layers, 1.7 million parameters; 6.43% error on CIFAR-10 in the paper."""
    return CIFARResNet(110, num_classes)


def cifar_plain20(num_classes: int = 10) -> CIFARResNet:
    """``cifar_resnet20`` without shortcuts."""
    return CIFARResNet(20, num_classes, shortcut=False)


def cifar_plain32(num_classes: int = 10) -> CIFARResNet:
    """``cifar_resnet32`` without shortcuts."""
    return CIFARResNet(32, num_classes, shortcut=False)


def cifar_plain44(num_classes: int = 10) -> CIFARResNet:
    """``cifar_resnet44`` without shortcuts."""
    return CIFARResNet(44, num_classes, shortcut=False)


def cifar_plain56(num_classes: int = 10) -> CIFARResNet:
    """``cifar_resnet56`` without shortcuts."""
    return CIFARResNet(56, num_classes, shortcut=False)


def cifar_plain110(num_classes: int = 10) -> CIFARResNet:
    """``cifar_resnet110`` without shortcuts, the depth at which the paper's plain networks fail to train."""
    return CIFARResNet(110, num_classes, shortcut=False)
