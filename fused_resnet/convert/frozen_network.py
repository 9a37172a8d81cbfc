"""A frozen network of torchvision's shape as one call of C++, where every part of it can be."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fused_resnet.models.resnet import ResNet
from fused_resnet.modules.frozen import FrozenBlock, FrozenStage, runs_unseen
from fused_resnet.modules.frozen_ends import POOL, FrozenAvgPool, FrozenLinear, FrozenStem
from fused_resnet.modules.untouched import Untouched
from fused_resnet.ops.native_chain import Ends, NativeChain
from fused_resnet.ops.native_conv import takes_dtype

MOST_CHAINS = 4
STAGES = ("layer1", "layer2", "layer3", "layer4")


class NetworkChains:
    """The chains of one network, one for each shape of x."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._untouched: Untouched | None = None
        self._chains: dict[tuple[torch.Size, torch.dtype, int], NativeChain | None] = {}

    def __call__(self, x: Tensor) -> Tensor | None:
        """(N, classes), or None where the network has to be called as it is.

        x: (N, 3, H, W), as the network takes it.
        """
        if not runs_unseen(x):
            return None
        if self._untouched is None or not self._untouched.holds():
            self._untouched = Untouched(self._network)
            self._chains.clear()
            if not self._untouched.holds():  # hooks, which want every module to be called
                return None
        key = (x.shape, x.dtype, torch.get_num_threads())
        if key not in self._chains:
            if len(self._chains) >= MOST_CHAINS:
                self._chains.clear()
            self._chains[key] = _chain(self._network, x)
        chain = self._chains[key]
        return None if chain is None else chain(x)[:, :, 0, 0]


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
    blocks = [cast(FrozenBlock, block) for stage in stages for block in stage]
    natives = [conv and conv.native_for(x) for block in blocks for conv in block.all_convs()]
    if first is None or None in natives:
        return None
    ends = Ends(first, POOL, cast(FrozenLinear, linear).native())
    return NativeChain([block.native_for(x) for block in blocks], x, ends)
