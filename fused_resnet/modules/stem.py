"""The stem of a ResNet: convolution, norm, ReLU and max pooling, as one step of autograd where that gains."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fused_resnet.arguments import PoolSettings
from fused_resnet.modules.bn_act import is_image, norm_act, why_not_fuse
from fused_resnet.modules.conv_bn_act import why_not_plain_conv
from fused_resnet.modules.plain import batch_norm_arguments, has_global_hooks, is_intercepted, pair, settings_of
from fused_resnet.ops.autocast import autocast_dtype
from fused_resnet.ops.conv_norm import ConvNorm
from fused_resnet.ops.stem import conv_bn_act_pool, stem_route


def conv_norm_act_pool(conv: nn.Module, norm: nn.Module, act: nn.Module, pool: nn.Module, x: Tensor) -> Tensor:
    """``pool(act(norm(conv(x))))``: in training one step of autograd (``ops/stem.py``) where all four are plain and a
    kernel here gains from it; else the convolution, ``norm_act`` and the pooling.

    Args:
        conv, norm, act, pool: fused if ``why_not_whole_stem`` is empty; any modules work.
        x: (N, C, H, W), any floating dtype and memory format.
    """
    whole = is_image(x) and (torch.is_grad_enabled() or norm.training) and not torch.compiler.is_compiling()
    if whole and not why_not_whole_stem(conv, norm, act, pool):
        conv, norm, pool = cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm), cast(nn.MaxPool2d, pool)
        dtype, settings = autocast_dtype(x), settings_of(conv)
        takes = x.shape[1] == conv.in_channels and (dtype is not None or x.dtype == conv.weight.dtype)
        like = x if dtype in (None, x.dtype) else torch.empty_like(x, dtype=dtype)
        if takes and stem_route(like, conv.weight, settings, window(pool)) is not None:
            link = ConvNorm(conv.weight, batch_norm_arguments(norm), *settings)
            return conv_bn_act_pool(x, link, **window(pool)._asdict())
    return pool(norm_act(norm, act, conv(x)))


def why_not_whole_stem(conv: nn.Module, norm: nn.Module, act: nn.Module, pool: nn.Module) -> list[str]:
    """The reasons why the four must be called one by one in training; an empty list means that they can be one step."""
    reasons = why_not_plain_conv(conv) + why_not_fuse(norm, act)
    if type(pool) is not nn.MaxPool2d:
        return [*reasons, f"the pooling is {type(pool).__module__}.{type(pool).__qualname__}, not torch.nn.MaxPool2d"]
    if is_intercepted(pool) or has_global_hooks():
        reasons.append("the pooling has hooks, or a forward of its own")
    if pool.ceil_mode or pool.return_indices or pair(pool.dilation) != (1, 1):
        reasons.append("the pooling has ceil_mode, return_indices or a dilation")
    kernel_size, _, _ = window(pool)
    if kernel_size[0] * kernel_size[1] > 256:
        reasons.append(f"the pooling's window is {[*kernel_size]}; one byte tells 256 places apart")
    return reasons


def window(pool: nn.MaxPool2d) -> PoolSettings:
    """The module's settings."""
    return PoolSettings(pair(pool.kernel_size), pair(pool.stride), pair(pool.padding))
