"""Small models of ours, each with a plain PyTorch model of the same names, weights and answers."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

import fused_resnet
from fused_resnet import fuse, unfuse
from fused_resnet.models.cifar import CIFARResNet
from fused_resnet.modules import BasicBlock, BatchNormAct2d, Bottleneck, ConvBNAct2d
from tests.modules.compare import randomize

LAYERS = (1, 1, 1, 1)
GROUPED = {"groups": 2, "width_per_group": 8}


class Plain(nn.Module):
    """``ConvBNAct2d`` and ``BatchNormAct2d`` with a residual, or what they stand for."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        self.conv = ConvBNAct2d(3, 4, 3) if ours else nn.Sequential()
        if not ours:
            self.conv.add_module("conv", nn.Conv2d(3, 4, 3, padding=1, bias=False))
            self.conv.add_module("bn", nn.BatchNorm2d(4))
            self.conv.add_module("act", nn.ReLU())
        self.norm = (BatchNormAct2d if ours else nn.BatchNorm2d)(4)


class Ours(Plain):
    def __init__(self) -> None:
        super().__init__(ours=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.norm(out, out)


class Theirs(Plain):
    def __init__(self) -> None:
        super().__init__(ours=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return F.relu(self.norm(out) + out)


def of_torchvision(block: type[nn.Module], **options: int) -> Callable[[], nn.Module]:
    return lambda: resnet.ResNet(block, LAYERS, num_classes=4, **options)  # type: ignore[arg-type]


def of_ours(block: type[nn.Module], **options: int) -> Callable[[], nn.Module]:
    return lambda: fused_resnet.models.ResNet(block, LAYERS, num_classes=4, **options)  # type: ignore[arg-type]


basic, grouped = of_torchvision(resnet.BasicBlock), of_torchvision(resnet.Bottleneck, **GROUPED)
TWINS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "BasicBlock": (of_ours(BasicBlock), basic),
    "Bottleneck": (of_ours(Bottleneck, **GROUPED), grouped),
    "fuse": (lambda: fuse(basic()), basic),
    "fuse, Bottleneck": (lambda: fuse(grouped()), grouped),
    "unfuse": (lambda: unfuse(of_ours(BasicBlock)()), basic),
    "unfuse after fuse": (lambda: unfuse(fuse(grouped())), grouped),
    "modules": (Ours, Theirs),
    "norm_layer": (
        lambda: resnet.ResNet(resnet.BasicBlock, LAYERS, num_classes=4, norm_layer=no_activation),
        basic,
    ),
    "CIFAR": (lambda: CIFARResNet(8), lambda: unfuse(CIFARResNet(8))),
    "CIFAR without shortcuts": (
        lambda: CIFARResNet(8, shortcut=False),
        lambda: unfuse(CIFARResNet(8, shortcut=False)),
    ),
}
"""By what is tried: how to make ours, how to make the plain one."""
FOLDED = ("BasicBlock", "Bottleneck", "fuse", "modules", "CIFAR", "CIFAR without shortcuts")
"""Those of which ``freeze`` folds something different."""


def no_activation(channels: int) -> nn.Module:
    return BatchNormAct2d(channels, activation=None)


def twins(name: str, training: bool = False) -> tuple[nn.Module, nn.Module]:
    """(ours, the plain one) with the same weights and statistics."""
    torch.manual_seed(0)
    make, make_plain = TWINS[name]
    ours, plain = randomize(make()).train(training), make_plain().train(training)
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    return ours, plain


def images(batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, 3, 33, 33, generator=torch.Generator().manual_seed(batch_size))
