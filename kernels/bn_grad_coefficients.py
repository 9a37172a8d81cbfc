"""The gradient of a norm as three numbers a channel, and the prologue that makes a convolution's gradient of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.arguments import Norm, Sums
from fused_resnet.kernels.bn_act import load_normalization
from fused_resnet.kernels.channels_last import dense_vector

MAX_BLOCK_CHANNELS = 512


def bn_grad_coefficients(sums: Sums | None, norm: Norm, count: float) -> Tensor:
    """(4, C) float32: A, B, C and mean, with which ``bn_grad_apply``'s gradient is ``A * dz + B * (y - mean) + C``.

    Without sums (constant statistics) B = C = 0. Vectors only; one launch.
    """
    mean, invstd, weight, _ = norm
    channels = mean.shape[0]
    coefficients = torch.empty((4, channels), dtype=torch.float32, device=mean.device)
    block = min(triton.next_power_of_2(channels), MAX_BLOCK_CHANNELS)
    with torch.cuda.device_of(mean):
        bn_grad_coefficients_kernel[(triton.cdiv(channels, block),)](
            *map(dense_vector, (*(sums or (None, None)), mean, invstd, weight)),
            coefficients,
            channels,
            float(count),
            BLOCK_CHANNELS=block,
            num_warps=4,
        )
    return coefficients


@triton.jit
def bn_grad_coefficients_kernel(
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    coefficients_ptr,
    channels,
    count,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A program owns a block of channels."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean, scale, _ = load_normalization(mean_ptr, invstd_ptr, weight_ptr, None, channel, inside)
    slope = tl.zeros_like(scale)
    offset = tl.zeros_like(scale)
    if sum_dz_ptr is not None:
        invstd = tl.load(invstd_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        slope = -scale * invstd * (tl.load(sum_dz_xhat_ptr + channel, mask=inside, other=0.0).to(tl.float32) / count)
        offset = -scale * (tl.load(sum_dz_ptr + channel, mask=inside, other=0.0).to(tl.float32) / count)
    tl.store(coefficients_ptr + channel, scale, mask=inside)
    tl.store(coefficients_ptr + channels + channel, slope, mask=inside)
    tl.store(coefficients_ptr + 2 * channels + channel, offset, mask=inside)
    tl.store(coefficients_ptr + 3 * channels + channel, mean, mask=inside)


@triton.jit
def load_coefficients(coefficients_ptr, filters, filter, in_filters):
    """(A, B, C, mean) of these filters; 0 outside."""
    slope_dz = tl.load(coefficients_ptr + filter, mask=in_filters, other=0.0)
    slope_y = tl.load(coefficients_ptr + filters + filter, mask=in_filters, other=0.0)
    offset = tl.load(coefficients_ptr + 2 * filters + filter, mask=in_filters, other=0.0)
    mean = tl.load(coefficients_ptr + 3 * filters + filter, mask=in_filters, other=0.0)
    return slope_dz, slope_y, offset, mean


@triton.jit
def output_grad(dz, y, slope_dz, slope_y, offset, mean):
    """A * dz + B * (y - mean) + C of a tile, in dz's dtype."""
    dy = dz.to(tl.float32) * slope_dz[None, :] + (y.to(tl.float32) - mean[None, :]) * slope_y[None, :]
    return (dy + offset[None, :]).to(dz.dtype)
