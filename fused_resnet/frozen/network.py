"""A frozen network of torchvision's shape as one call of C++, where every part of it can be."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fused_resnet.frozen.block import FrozenBlock, FrozenStage
from fused_resnet.frozen.chains import Chains
from fused_resnet.frozen.ends import POOL, FrozenAvgPool, FrozenLinear, FrozenStem
from fused_resnet.models.resnet import ResNet
from fused_resnet.ops.backends.native.chain import Ends, NativeChain
from fused_resnet.ops.backends.native.conv import takes_dtype

STAGES = ("layer1", "layer2", "layer3", "layer4")


def network_chains() -> Chains:
    """Of one network. x: (N, 3, H, W), as the network takes it; gives (N, classes)."""
    return Chains(_chain)


def _chain(network: nn.Module, x: Tensor) -> NativeChain | None:
    if type(network).forward is not ResNet.forward:
        return None
    stem, average, linear = network.conv1, network.avgpool, network.fc
    stages = [getattr(network, name) for name in STAGES]
    identities = (network.bn1, network.relu, network.maxpool)
    expected = [(stem, FrozenStem), (average, FrozenAvgPool), (linear, FrozenLinear)]
    expected += [(stage, FrozenStage) for stage in stages] + [(module, nn.Identity) for module in identities]
    if any(type(module) is not kind for module, kind in expected):
        return None
    weight = cast(FrozenLinear, linear).weight
    if x.dtype != weight.dtype or not takes_dtype(x.dtype) or weight.device.type != "cpu":
        return None
    first = cast(FrozenStem, stem).conv.native_for(x)
    blocks = [cast(FrozenBlock, block).native_for(x) for stage in stages for block in stage]
    natives = [block for block in blocks if block is not None]
    if first is None or len(natives) < len(blocks):
        return None
    return NativeChain(natives, x, Ends(first, POOL, cast(FrozenLinear, linear).native()))
