"""A residual block handed to ``ops.residual_block`` as a whole, where all its parts are plain; why not, elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from fused_resnet.modules.bn_act import batch_norm_arguments, is_image, why_not_fuse
from fused_resnet.modules.conv_bn_act import why_not_plain_conv
from fused_resnet.modules.shortcut import why_not_split
from fused_resnet.ops.conv_norm import ConvNorm
from fused_resnet.ops.residual_block import autocast_dtype, gains, residual_block

MEMORY = "_fused_resnet_memory"
"""``fused_resnet.fuse(model, memory=...)`` gives a block an attribute of this name."""


def whole_block(block: nn.Module, x: Tensor) -> Tensor | None:
    """``block(x)`` as one step of autograd (``ops/residual_block.py``); None where it is better run part by part: in
    eval without gradients, where ``why_not_whole`` has a reason, and where no kernel here gains from it.

    Args:
        block: a ``BasicBlock`` or ``Bottleneck``; its ``links`` names its convolutions and norms in order.
        x: (N, inplanes, H, W), any floating dtype and memory format.
    """
    if not is_image(x) or torch.compiler.is_compiling():
        return None
    pairs = [(getattr(block, conv), getattr(block, norm)) for conv, norm in block.links]  # type: ignore[union-attr]
    if not torch.is_grad_enabled() and not any(norm.training for _, norm in pairs):
        return None
    if why_not_whole(block):
        return None
    first = pairs[0][0]
    like = as_convolution_gets_it(x, first)
    if like is None:
        return None
    memory = block.__dict__.get(MEMORY, "default")
    if not gains(like, first.weight, first.stride, first.padding, first.dilation, first.groups, memory):
        return None
    shortcut = None if block.downsample is None else conv_norm(*block.downsample)  # type: ignore[misc]
    return residual_block(x, [conv_norm(*pair) for pair in pairs], shortcut, memory=memory)


def why_not_whole(block: nn.Module) -> list[str]:
    """The reasons why the block must be run part by part in training; an empty list means that it can be run whole."""
    return list(dict.fromkeys(_reasons(block)))


def _reasons(block: nn.Module) -> Iterator[str]:
    downsample = block.downsample
    pairs = [(getattr(block, conv), getattr(block, norm)) for conv, norm in block.links]  # type: ignore[union-attr]
    if downsample is not None:
        if type(downsample) is not nn.Sequential or len(downsample) != 2:
            yield "downsample is not a convolution and a norm"
            return
        yield from why_not_split(downsample)
        pairs.append((downsample[0], downsample[1]))
    for conv, norm in pairs:
        yield from why_not_plain_conv(conv)
        yield from why_not_fuse(norm, cast(nn.Module, block.relu))


def as_convolution_gets_it(x: Tensor, conv: nn.Conv2d) -> Tensor | None:
    """x or, under autocast, an empty tensor like it of autocast's dtype; None if ``conv`` itself would refuse x."""
    dtype = autocast_dtype(x)
    if (dtype is None and x.dtype != conv.weight.dtype) or x.shape[1] != conv.in_channels:
        return None
    return x if dtype in (None, x.dtype) else torch.empty_like(x, dtype=dtype)


def conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> ConvNorm:
    """What the ops take of a plain convolution and a plain norm; counts the batch where the norm would."""
    sizes = (conv.stride, cast(tuple[int, int], conv.padding), conv.dilation, conv.groups)
    return ConvNorm(conv.weight, batch_norm_arguments(norm), *sizes)  # type: ignore[arg-type]
