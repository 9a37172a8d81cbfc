"""The residual block of a 3x3 convolution between two 1x1: ResNet-50, 101 and 152, ResNeXt and Wide ResNet."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fused_resnet.modules.bn_act import norm_act
from fused_resnet.modules.drop_in import DropIn
from fused_resnet.modules.shortcut import norm_add_act
from fused_resnet.modules.site import Site
from fused_resnet.modules.whole_block import whole_block


class Bottleneck(DropIn):
    """``out = relu(F(x) + x)``, where F narrows x by a 1x1 convolution, works by a 3x3, and widens by a 1x1.

    He et al. 2015 (https://arxiv.org/abs/1512.03385), figure 5 right, with the stride in the 3x3 (v1.5, Goyal et al.
    2017, https://arxiv.org/abs/1706.02677). A drop-in for torchvision's Bottleneck: the same arguments, children and
    ``state_dict``. Where kernels here gain from it, training runs the block as one step of autograd that writes no
    activation inside the block (``ops/residual_block.py``); else each norm, with the add and the ReLU behind it, is one
    pass over memory.

    x is (N, inplanes, H, W), any floating dtype and memory format (channels_last is the fast one); the result is
    (N, 4 * planes, H', W'), H' = ceil(H / stride).

    Args:
        inplanes: channels of x.
        planes: a quarter of the channels of the result.
        stride: of the 3x3 convolution.
        downsample: the shortcut, where x and F(x) differ in shape; x itself if None.
        groups: of the 3x3 convolution (ResNeXt's cardinality).
        base_width: channels of one group where planes is 64; the 3x3 has ``int(planes * base_width / 64) * groups``.
        dilation: of the 3x3 convolution.
        norm_layer: called with a number of channels, gives a norm; ``nn.BatchNorm2d`` if None.
    """

    twin: ClassVar = "fused_resnet.modules.torchvision:Bottleneck"
    sites: ClassVar = (
        Site("conv1", "bn1", "relu"),
        Site("conv2", "bn2", "relu"),
        Site("conv3", "bn3", "relu", residual="downsample"),
    )
    expansion: ClassVar[int] = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        outplanes = planes * self.expansion

        self.conv1 = nn.Conv2d(inplanes, width, kernel_size=1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = nn.Conv2d(
            width,
            width,
            kernel_size=3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, outplanes, kernel_size=1, bias=False)
        self.bn3 = norm_layer(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # torch.jit.script compiles what follows this alone
            out = whole_block(self, x)
            if out is not None:
                return out
            out = norm_act(self.bn1, self.relu, self.conv1(x))
            out = norm_act(self.bn2, self.relu, self.conv2(out))
            return norm_add_act(self.bn3, self.relu, self.conv3(out), self.downsample, x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)
