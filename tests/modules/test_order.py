"""Modules are called in torchvision's order, which hooks, fx and whoever prunes by it rely on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torchvision.models import resnet

from fused_resnet import fuse
from fused_resnet.modules import BasicBlock, Bottleneck


def projection(outplanes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, outplanes, 1, 2, bias=False), nn.BatchNorm2d(outplanes))


PAIRS = {
    "basic": (lambda: BasicBlock(8, 4, 2, projection(4)), lambda: resnet.BasicBlock(8, 4, 2, projection(4))),
    "bottleneck": (lambda: Bottleneck(8, 4, 2, projection(16)), lambda: resnet.Bottleneck(8, 4, 2, projection(16))),
    "network": (lambda: fuse(resnet.resnet18()), resnet.resnet18),
}


def calls(model: nn.Module, x: torch.Tensor) -> list[str]:
    seen: list[str] = []
    for name, part in model.named_modules():
        part.register_forward_pre_hook(lambda module, args, name=name: seen.append(f"{name} begins"))
        part.register_forward_hook(lambda module, args, out, name=name: seen.append(f"{name} ends"))
    model(x)
    return seen


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_hooks_fire_in_torchvisions_order(ours, theirs):
    x = torch.randn(2, 3 if ours is PAIRS["network"][0] else 8, 32, 32)
    assert calls(ours(), x) == calls(theirs(), x)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_a_traced_graph_has_torchvisions_nodes(ours, theirs):
    names = [[(node.name, node.op) for node in symbolic_trace(make()).graph.nodes] for make in (ours, theirs)]
    assert names[0] == names[1]
