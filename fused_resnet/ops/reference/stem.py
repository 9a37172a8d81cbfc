"""The meaning of a network's first layers, and of the pooling in front of its classifier, for inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import ConvSettings, PoolSettings
from fused_resnet.ops.reference.conv import conv_bn_act

CONVOLUTION = ConvSettings((2, 2), (3, 3))
POOLING = PoolSettings((3, 3), (2, 2), (1, 1))


def stem(
    x: Tensor,
    conv_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
) -> Tensor:
    """``max_pool2d(relu(conv2d(x, conv_weight, stride=2, padding=3) * scale + shift), 3, stride=2, padding=1)``.

    conv_weight is (K, 3, 7, 7); x is (N, 3, H, W) of its dtype or, with ``pixel_scale`` and ``pixel_shift`` of three
    numbers each, uint8: then x * pixel_scale + pixel_shift, rounded to that dtype, is what is convolved, and padded
    with zeros. The result is channels_last. One kernel reads x and conv_weight and writes the result.
    """
    if pixel_scale is not None and pixel_shift is not None:
        scales, shifts = (torch.tensor(vector, device=x.device)[:, None, None] for vector in (pixel_scale, pixel_shift))
        x = (x.float() * scales + shifts).to(conv_weight.dtype)
    out = conv_bn_act(x, conv_weight, scale, shift, None, CONVOLUTION, True)
    return F.max_pool2d(out, *POOLING).contiguous(memory_format=torch.channels_last)


def stem_output_shape(x_shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Of ``stem``'s result."""
    images, filters = x_shape[0], weight_shape[0]
    between = (images, filters, *CONVOLUTION.output_size(x_shape, weight_shape))
    return (images, filters, *POOLING.output_size(between))


def avgpool(x: Tensor) -> Tensor:
    """(N, C, 1, 1): the mean over each image, added up in float32 (float64 data: in float64). Reads 1T."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.mean((2, 3), keepdim=True, dtype=wide).to(x.dtype)
