"""The residual block of two 3x3 convolutions: ResNet-18 and 34, and the paper's networks for CIFAR-10."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fused_resnet.modules.bn_act import norm_act
from fused_resnet.modules.drop_in import DropIn
from fused_resnet.modules.shortcut import norm_add_act
from fused_resnet.modules.site import Site
from fused_resnet.modules.whole_block import whole_block


class BasicBlock(DropIn):
    """``out = relu(F(x) + x)`` with ``F(x) = bn2(conv2(relu(bn1(conv1(x)))))``.

    He et al. 2015 (https://arxiv.org/abs/1512.03385), figure 2 and figure 5 left. A drop-in for torchvision's
    BasicBlock: the same arguments, children and ``state_dict``. Where kernels
    here gain from it, training runs the block as one step of autograd that writes no activation inside the block
    (``ops/residual_block.py``); else each norm, with the add and the ReLU behind it, is one pass over memory.

    x is (N, inplanes, H, W), any floating dtype and memory format (channels_last is the fast one); the result is
    (N, planes, H', W'), H' = ceil(H / stride).

    Args:
        inplanes: channels of x.
        planes: channels of both convolutions.
        stride: of the first convolution.
        downsample: the shortcut, where x and F(x) differ in shape; x itself if None.
        groups: 1; the argument is there because ``Bottleneck`` has it.
        base_width: 64; likewise.
        dilation: 1; likewise.
        norm_layer: called with a number of channels, gives a norm; ``nn.BatchNorm2d`` if None.

    Raises:
        ValueError: groups is not 1 or base_width is not 64.
        NotImplementedError: dilation is greater than 1.
    """

    twin: ClassVar = "fused_resnet.modules.torchvision:BasicBlock"
    sites: ClassVar = (Site("conv1", "bn1", "relu"), Site("conv2", "bn2", "relu", residual="downsample"))
    expansion: ClassVar[int] = 1

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
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock takes groups=1 and base_width=64 only; got groups={groups}, base_width={base_width}"
            )
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock takes dilation=1 only; got {dilation}")
        norm_layer = norm_layer or nn.BatchNorm2d

        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # torch.jit.script compiles what follows this alone
            out = whole_block(self, x)
            if out is not None:
                return out
            out = norm_act(self.bn1, self.relu, self.conv1(x))
            return norm_add_act(self.bn2, self.relu, self.conv2(out), self.downsample, x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)
