"""Residual blocks whose BatchNorms are constants: one kernel a convolution, the shortcut added in the last one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fused_resnet.frozen.fold import FoldedConv, folded_conv
from fused_resnet.modules.conv_bn_act import why_not_constant
from fused_resnet.modules.plain import is_intercepted
from fused_resnet.modules.site import Site, sites_of
from fused_resnet.ops.backends.native.chain import Block, NativeChain
from fused_resnet.ops.layout import conv_memory_format
from fused_resnet.ops.route.context import runs_unseen

MOST_CHAINS = 4


class FoldedBlock:
    """``relu(F(x) + shortcut(x))`` as one kernel per convolution; the last adds the shortcut in its epilogue.

    Args:
        convs: F, in order.
        downsample: the shortcut, where x and F(x) differ in shape; x itself if None.
        shortcut: False for a plain block, relu(H(x)).
    """

    def __init__(
        self, convs: Sequence[FoldedConv], downsample: FoldedConv | OrdinaryPart | None, shortcut: bool = True
    ) -> None:
        self.convs = convs
        self.downsample = downsample
        self.shortcut = shortcut

    def __call__(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """``overwrite``: nobody reads x afterwards, so the result may take its memory."""
        *convs, last = self.convs
        out = x
        for conv in convs:
            out = conv(out)
        if not self.shortcut:
            return last(out)
        if self.downsample is None:
            return last(out, x, overwrite)
        return last(out, self.downsample(x), overwrite=isinstance(self.downsample, FoldedConv))

    def native_for(self, x: Tensor) -> Block | None:
        """All convolutions as our own C++; None if one of them cannot take x."""
        convs = [*self.convs, *([] if self.downsample is None else [self.downsample])]
        natives = [conv.native_for(x) if isinstance(conv, FoldedConv) else None for conv in convs]
        found = [native for native in natives if native is not None]
        if len(found) < len(convs):
            return None
        return Block(found, None if self.downsample is None else found.pop(), self.shortcut)


class OrdinaryPart:
    """A module that is called as it is, between parts that are not: with x in the dtype of the plain model, if it has
    parameters, and in channels_last only where these lie so.

    Args:
        module: from tensor to tensor.
        plain: the dtype of the model that was frozen.
        frozen: the dtype that the other parts compute in.
    """

    def __init__(self, module: nn.Module, plain: torch.dtype, frozen: torch.dtype) -> None:
        weights = [*module.parameters(), *module.buffers()]
        self._module, self._frozen = module, frozen
        self._plain = plain if weights else frozen
        lies = any(
            weight.dim() == 4 and conv_memory_format(weight, weight) is torch.channels_last for weight in weights
        )
        self._memory_format = torch.channels_last if lies else torch.contiguous_format

    def __call__(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """x: (N, C, H, W) of the frozen dtype, as is the result."""
        return self._module(x.to(self._plain, memory_format=self._memory_format)).to(self._frozen)


class BlocksInARow:
    """Blocks, one after the other. What one hands to the next is nobody else's, unless one of them is ordinary. On the
    CPU all of them are one call of C++ where that can be."""

    def __init__(self, blocks: Sequence[FoldedBlock | OrdinaryPart]) -> None:
        self.blocks = blocks
        self._chains: Chains = {}

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) of the frozen dtype, which nobody but the caller may write to."""
        if runs_unseen(x) and (chain := kept_chain(self._chains, x, self._chain)) is not None:
            return chain(x)
        overwrite = False
        for block in self.blocks:
            x = block(x, overwrite)
            overwrite = isinstance(block, FoldedBlock)
        return x

    def native_for(self, x: Tensor) -> list[Block] | None:
        """All of them as our own C++; None if one of them cannot be."""
        natives = [block.native_for(x) if isinstance(block, FoldedBlock) else None for block in self.blocks]
        found = [native for native in natives if native is not None]
        return found if len(found) == len(natives) else None

    def _chain(self, x: Tensor) -> NativeChain | None:
        blocks = self.native_for(x)
        return NativeChain(blocks, x) if blocks else None


Chains = dict[tuple[torch.Size, torch.dtype, int], NativeChain | None]


def kept_chain(chains: Chains, x: Tensor, plan: Callable[[Tensor], NativeChain | None]) -> NativeChain | None:
    """The chain for an x like this, planned where none is kept."""
    key = (x.shape, x.dtype, torch.get_num_threads())
    found = chains.get(key, plan)  # once: another thread may be clearing them
    if found is plan:
        if len(chains) >= MOST_CHAINS:
            chains.clear()
        found = chains[key] = plan(x)
    return found  # type: ignore[return-value]


def foldable_conv(module: nn.Module, site: Site, dtype: torch.dtype) -> FoldedConv | None:
    """The site's convolution with its norm and ReLU folded in; None if one of them has to be called."""
    conv, norm, act = (getattr(module, name) for name in (site.conv, site.norm, site.act))
    return _folded(conv, norm, act, dtype)


def foldable_block(block: nn.Module, plain: torch.dtype, frozen: torch.dtype) -> FoldedBlock | None:
    """The block as convolutions, all of them or none; a shortcut that is no convolution and norm is called as it is."""
    sites = sites_of(block)
    convs = [foldable_conv(block, site, frozen) for site in sites]
    folded = [conv for conv in convs if conv is not None]
    if not sites or len(folded) < len(sites):
        return None
    shortcut = sites[-1].residual
    downsample = None if shortcut is None else getattr(block, shortcut)
    if type(downsample) is nn.Sequential and len(downsample) == 2 and not is_intercepted(downsample):
        projection = _folded(downsample[0], downsample[1], None, frozen)
        return FoldedBlock(folded, projection or OrdinaryPart(downsample, plain, frozen))
    part = None if downsample is None else OrdinaryPart(downsample, plain, frozen)
    return FoldedBlock(folded, part, shortcut is not None)


def foldable_blocks(stage: nn.Module, plain: torch.dtype, frozen: torch.dtype) -> BlocksInARow:
    """The blocks of a stage, those that cannot be folded called as they are."""
    blocks = [
        (None if is_intercepted(block) else foldable_block(block, plain, frozen)) or OrdinaryPart(block, plain, frozen)
        for block in stage.children()
    ]
    return BlocksInARow(blocks)


def _folded(conv: nn.Module, norm: nn.Module, act: nn.Module | None, dtype: torch.dtype) -> FoldedConv | None:
    if why_not_constant(conv, norm, act):
        return None
    return folded_conv(conv, norm, act is not None, dtype)  # type: ignore[arg-type]
