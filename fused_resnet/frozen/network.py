"""A whole network with every norm folded: stem, blocks, mean and last layer; one call of C++ where that can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.arguments import ConvSettings, PoolSettings
from fused_resnet.frozen.block import BlocksInARow, Chains, OrdinaryPart, foldable_blocks, foldable_conv, kept_chain
from fused_resnet.frozen.fold import FoldedConv, FoldedLinear, folded_linear
from fused_resnet.modules.plain import has_memory, is_intercepted, pair
from fused_resnet.modules.site import Body, sites_of
from fused_resnet.ops.backends.native.chain import Ends, NativeChain
from fused_resnet.ops.backends.native.conv import average, max_pool, takes_dtype
from fused_resnet.ops.route.choose import runs_in_cuda
from fused_resnet.ops.route.context import runs_unseen

STEM_KERNEL = (3, 7, 7)
"""Channels and kernel size of the convolution that the CUDA C++ stem runs."""
STEM = ConvSettings(stride=(2, 2), padding=(3, 3))
POOL = PoolSettings((3, 3), (2, 2), (1, 1))
"""Of what it pools."""
BYTE = 255.0


class Pixels:
    """What bytes stand for: byte * scale + shift = (byte / 255 - mean) / std, of each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.scale = [1.0 / (BYTE * deviation) for deviation in std]
        self.shift = [-center / deviation for center, deviation in zip(mean, std, strict=True)]

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x: (N, C, H, W) uint8."""
        scale, shift = (
            torch.tensor(vector, dtype=torch.float32, device=x.device)[:, None, None]
            for vector in (self.scale, self.shift)
        )
        return (x.float() * scale + shift).to(dtype)


class FoldedStem:
    """A convolution with its norm and ReLU, and perhaps the max pooling behind it. One kernel where the CUDA C++ one
    runs, which never writes what is pooled."""

    def __init__(self, conv: FoldedConv, pool: nn.MaxPool2d | None, pixels: Pixels | None) -> None:
        self.conv = conv
        self.pool = pool
        self._pixels = pixels
        self.pools_by_three = pool is not None and _window(pool) == (*POOL, (1, 1), False, False)
        fits = conv.settings == STEM and tuple(conv.weight.shape[1:]) == STEM_KERNEL
        self.is_kernels = fits and conv.relu and self.pools_by_three

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) of the weight's dtype, or uint8."""
        if self.is_kernels:
            scale_and_shift: tuple[Any, Any] = (None, None)
            if x.dtype == torch.uint8 and self._pixels is not None:
                scale_and_shift = (self._pixels.scale, self._pixels.shift)
            arguments = (x, self.conv.weight, None, self.conv.bias, *scale_and_shift)
            if runs_in_cuda("stem", arguments):
                return torch.ops.fused_resnet.stem(*arguments)
        y = self.conv(as_numbers(x, self._pixels, self.conv.weight.dtype).to(memory_format=torch.channels_last))
        if self.pool is None:
            return y
        if self.pools_by_three and runs_unseen(y) and self.conv.native_for(y) is not None:
            return max_pool(y, POOL)
        return self.pool(y)


class FoldedNetwork:
    """The parts of a network in order, each folded or called as it is."""

    def __init__(
        self,
        stem: FoldedStem | OrdinaryPart,
        stages: Sequence[BlocksInARow | OrdinaryPart],
        average_pool: OrdinaryPart | None,
        last: FoldedLinear | OrdinaryPart,
        pixels: Pixels | None,
    ) -> None:
        self.stem, self.stages, self.average, self.last = stem, stages, average_pool, last
        self._pixels = pixels
        self._chains: Chains = {}

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) of the frozen dtype, or uint8. Returns (N, classes)."""
        if runs_unseen(x) and (chain := kept_chain(self._chains, x, self._chain)) is not None:
            return chain(x)
        if isinstance(self.stem, OrdinaryPart):
            x = as_numbers(x, self._pixels, torch.float32)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = _average(x) if self.average is None else self.average(x)
        return self.last(torch.flatten(x, 1))

    def _chain(self, x: Tensor) -> NativeChain | None:
        stem, last = self.stem, self.last
        if not isinstance(stem, FoldedStem) or not stem.pools_by_three or not isinstance(last, FoldedLinear):
            return None
        first = stem.conv.native_for(x)
        rows = [stage.native_for(x) if isinstance(stage, BlocksInARow) else None for stage in self.stages]
        blocks = [row for row in rows if row is not None]
        if first is None or self.average is not None or len(blocks) < len(rows):
            return None
        return NativeChain([block for row in blocks for block in row], x, Ends(first, POOL, last.native()))


def foldable_network(
    network: nn.Module, plain: torch.dtype, frozen: torch.dtype, pixels: Pixels | None
) -> FoldedNetwork:
    """The parts of a network as they can be folded.

    Args:
        network: its ``sites`` and ``body`` say what it is made of.
        plain: the dtype of its parameters.
        frozen: the dtype to compute in.
        pixels: what bytes stand for; None if there will be none.
    """
    (site,) = sites_of(network)
    body = cast(Body, network.body)
    conv = foldable_conv(network, site, frozen)
    pool: Any = None if site.pool is None else getattr(network, site.pool)
    if conv is not None and (pool is None or (type(pool) is nn.MaxPool2d and not is_intercepted(pool))):
        stem: FoldedStem | OrdinaryPart = FoldedStem(conv, pool, pixels)
    else:
        names = (site.conv, site.norm, site.act, *([] if site.pool is None else [site.pool]))
        stem = OrdinaryPart(nn.Sequential(*(getattr(network, name) for name in names)), plain, frozen)
    stages: list[BlocksInARow | OrdinaryPart] = []
    for stage in (getattr(network, name) for name in body.stages):
        whole = isinstance(stage, nn.Sequential) and not is_intercepted(stage)
        stages.append(foldable_blocks(stage, plain, frozen) if whole else OrdinaryPart(stage, plain, frozen))
    average_pool, last = getattr(network, body.average), getattr(network, body.last)
    is_mean = type(average_pool) is nn.AdaptiveAvgPool2d and average_pool.output_size in (1, (1, 1))
    is_linear = type(last) is nn.Linear and not is_intercepted(last) and all(map(has_memory, last.parameters()))
    return FoldedNetwork(
        stem,
        stages,
        None if is_mean and not is_intercepted(average_pool) else OrdinaryPart(average_pool, plain, frozen),
        folded_linear(last, frozen) if is_linear else OrdinaryPart(last, plain, frozen),
        pixels,
    )


def as_numbers(x: Tensor, pixels: Pixels | None, dtype: torch.dtype) -> Tensor:
    """x itself, or what its bytes stand for."""
    return pixels(x, dtype) if pixels is not None and x.dtype == torch.uint8 else x


def _average(x: Tensor) -> Tensor:
    """``F.adaptive_avg_pool2d(x, 1)``, added up in float32; one pass of ours where that runs."""
    if runs_unseen(x) and takes_dtype(x.dtype):
        return average(x)
    return torch.ops.fused_resnet.avgpool(x) if runs_in_cuda("avgpool", (x,)) else F.adaptive_avg_pool2d(x, 1)


def _window(pool: nn.MaxPool2d) -> tuple[Any, ...]:
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return (*map(pair, sizes), pool.ceil_mode, pool.return_indices)
