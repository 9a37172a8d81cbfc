"""A residual block handed to ``ops.residual_block`` as a whole, where all its parts are plain; why not, elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fused_resnet.modules.bn_act import why_not_fuse
from fused_resnet.modules.conv_bn_act import why_not_plain_conv
from fused_resnet.modules.plain import (
    FROZEN,
    PlainNorm,
    Snapshot,
    batch_norm_arguments,
    settings_of,
    vectors_fit,
    weight_of,
)
from fused_resnet.modules.shortcut import why_not_split
from fused_resnet.modules.site import Site
from fused_resnet.ops.conv_norm import ConvNorm
from fused_resnet.ops.residual_block import block_route, run

MEMORY = "_fused_resnet_memory"
"""``fused_resnet.fuse(model, memory=...)`` gives a block an attribute of this name."""
WHOLE = "_fused_resnet_whole"
"""Where a block that has run keeps what `whole_block` knows of it."""


def whole_block(block: nn.Module, x: Tensor) -> Tensor | None:
    """``block(x)`` as one step of autograd (``ops/residual_block.py``), or as ``freeze`` has it run; None where it is
    better run part by part: in eval without gradients, where ``why_not_whole`` has a reason, and where no kernel here
    gains from it.

    Args:
        block: its ``sites`` say what it is made of.
        x: (N, inplanes, H, W), any floating dtype and memory format.
    """
    if (
        torch.compiler.is_compiling()
        or not isinstance(x, Tensor)
        or x.is_neg()
        or torch._C._get_tracing_state() is not None
    ):
        return None
    own = block.__dict__
    if FROZEN in own and (out := own[FROZEN](block, x)) is not None:
        return out
    known = own.get(WHOLE)
    if known is None or not known.holds():
        known = own[WHOLE] = WholeBlock(block)
    return known(own.get(MEMORY, "default"), x)


class WholeBlock:
    """What is known of a block until somebody touches a part of it (`Snapshot`); its tensors are asked for at every
    call. Copies and pickles of a block start anew."""

    def __init__(self, block: nn.Module) -> None:
        self._snapshot = Snapshot(block)
        self.holds = self._snapshot.holds
        self._convs: list[nn.Conv2d] = []
        self._norms: list[PlainNorm] = []
        self._has_shortcut = self._trains = False
        if any(_reasons(block)):
            return
        pairs = [(getattr(block, site.conv), getattr(block, site.norm)) for site in _sites(block)]
        if (downsample := _shortcut(block)) is not None:
            self._has_shortcut = True
            pairs.append((downsample[0], downsample[1]))
        self._convs, self._norms = [conv for conv, _ in pairs], [norm for _, norm in pairs]
        self._settings = [settings_of(conv) for conv in self._convs]
        self._trains = any(norm.training for norm in self._norms)

    def __call__(self, memory: str, x: Tensor) -> Tensor | None:
        """`whole_block` of the block that this was made of."""
        if not self._convs or not (self._trains or torch.is_grad_enabled()):
            return None
        kind = x.device.type
        if kind not in ("cpu", "cuda"):
            return None
        if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        weights = [weight_of(conv) for conv in self._convs]
        chain = [*zip(weights, self._settings, strict=True)]
        shortcut = chain.pop() if self._has_shortcut else None
        route = block_route(x, chain, shortcut, memory)
        if route is None or route.fewest_values == 1:  # which the norms refuse, or share with other ranks
            return None
        for weight, norm in zip(weights, self._norms, strict=True):
            if weight.is_neg() or not vectors_fit(norm, len(weight), x.device):
                return None
        links = [
            ConvNorm(weight, batch_norm_arguments(norm), *settings)
            for weight, settings, norm in zip(weights, self._settings, self._norms, strict=True)
        ]
        return run(route, x, links, links.pop() if self._has_shortcut else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())


def _nothing() -> None:
    """What a copy of a block has in the place of a `WholeBlock`."""


def why_not_whole(block: nn.Module) -> list[str]:
    """The reasons why the block must be run part by part in training; an empty list means that it can be run whole."""
    return list(dict.fromkeys(_reasons(block)))


def _reasons(block: nn.Module) -> Iterator[str]:
    pairs = [(getattr(block, site.conv), getattr(block, site.norm), getattr(block, site.act)) for site in _sites(block)]
    downsample = _shortcut(block)
    if downsample is not None:
        if type(downsample) is not nn.Sequential or len(downsample) != 2:
            yield "downsample is not a convolution and a norm"
            return
        yield from why_not_split(downsample)
        pairs.append((downsample[0], downsample[1], None))
    for conv, norm, act in pairs:
        yield from why_not_plain_conv(conv)
        yield from why_not_fuse(norm, act)


def _sites(block: nn.Module) -> tuple[Site, ...]:
    return type(block).sites  # type: ignore[attr-defined]


def _shortcut(block: nn.Module) -> nn.Sequential | None:
    name = _sites(block)[-1].residual
    return None if name is None else cast(nn.Sequential | None, getattr(block, name))
