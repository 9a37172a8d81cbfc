"""Backward of batch normalisation, ReLU and max pooling: one pass for the two sums of each channel and one for the
gradient of x. The gradient in front of the pooling is gathered on the way in both, and never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.arguments import Norm, PoolSettings, Sums
from fused_resnet.kernels.bn_act import load_normalization, normalize, program_tile
from fused_resnet.kernels.bn_act_grad import relu_grad
from fused_resnet.kernels.bn_pool import POOL_WARPS, window
from fused_resnet.kernels.channels_last import channels_last, dense_vector, matrix_shape
from fused_resnet.kernels.device import multiprocessors
from fused_resnet.kernels.row_tiles import REDUCTION_WARPS, elementwise_tiles, reduction_tiles
from fused_resnet.kernels.welford import finalize_sums


def bn_pool_grad_stats(
    grad_out: Tensor, place: Tensor, x: Tensor, norm: Norm, settings: PoolSettings
) -> tuple[Tensor, Tensor]:
    """(sum of dz, sum of dz * xhat) of each channel, float32: the gradients of bias and weight.

    dz is the gradient of ``bn_apply_pool``'s ReLU's input: that of the windows in which the pixel is the maximum, where
    the recomputed ``xhat * weight + bias`` is not <= 0. Reads 1T, and grad_out and place (from L2, kernel / stride
    times); 8*P*C bytes of P partial sums are written and read again.
    """
    x, grad_out, place = channels_last(x), channels_last(grad_out), channels_last(place)
    rows, channels = matrix_shape(x)
    tiles = reduction_tiles(rows, channels, multiprocessors(x.device))
    partial_sums = torch.empty((2, tiles.chunks, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        bn_pool_grad_stats_kernel[tiles.grid](
            grad_out,
            place,
            x,
            *map(dense_vector, norm),
            partial_sums,
            rows,
            *x.shape[2:],
            channels,
            *grad_out.shape[2:],
            tiles.chunk_rows,
            tiles.chunks,
            **window(settings),
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_CHANNELS=tiles.block_channels,
            num_warps=REDUCTION_WARPS,
        )
    sum_dz, sum_dz_xhat = finalize_sums(partial_sums).unbind()
    return sum_dz, sum_dz_xhat


def bn_pool_grad_apply(
    grad_out: Tensor, place: Tensor, x: Tensor, norm: Norm, sums: Sums | None, settings: PoolSettings
) -> Tensor:
    """The gradient of ``bn_apply_pool``'s x, in its dtype and strides; dz as in ``bn_pool_grad_stats``, the rest as in
    ``bn_grad_apply``. Reads 1T, and grad_out and place; writes 1T."""
    x, grad_out, place = channels_last(x), channels_last(grad_out), channels_last(place)
    rows, channels = matrix_shape(x)
    tiles = elementwise_tiles(rows, channels, multiprocessors(x.device))
    grad_x = torch.empty_like(x)
    with torch.cuda.device_of(x):
        bn_pool_grad_apply_kernel[tiles.grid](
            grad_out,
            place,
            x,
            *map(dense_vector, (*norm, *(sums or (None, None)))),
            grad_x,
            rows,
            *x.shape[2:],
            channels,
            *grad_out.shape[2:],
            tiles.chunk_rows,
            **window(settings),
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_CHANNELS=tiles.block_channels,
            num_warps=POOL_WARPS,
        )
    return grad_x


@triton.jit
def pool_grad(
    grad_out_ptr,
    place_ptr,
    row,
    in_rows,
    channel,
    in_channels,
    height,
    width,
    channels,
    out_height,
    out_width,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    PADDING_HEIGHT: tl.constexpr,
    PADDING_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The gradient of these pixels in front of the pooling: the sum, in a fixed order, of that of the windows whose
    maximum they are."""
    y = row // width % height + PADDING_HEIGHT
    x = row % width + PADDING_WIDTH
    image = row // width // height
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    for i in tl.static_range((KERNEL_HEIGHT + STRIDE_HEIGHT - 1) // STRIDE_HEIGHT):
        for j in tl.static_range((KERNEL_WIDTH + STRIDE_WIDTH - 1) // STRIDE_WIDTH):
            out_y = y // STRIDE_HEIGHT - i
            out_x = x // STRIDE_WIDTH - j
            r = y - out_y * STRIDE_HEIGHT
            s = x - out_x * STRIDE_WIDTH
            in_windows = (out_y >= 0) & (out_y < out_height) & (out_x >= 0) & (out_x < out_width)
            in_windows = in_windows & (r < KERNEL_HEIGHT) & (s < KERNEL_WIDTH) & in_rows
            inside = in_windows[:, None] & in_channels[None, :]
            offset = (((image * out_height + out_y) * out_width + out_x) * channels)[:, None] + channel[None, :]
            place = tl.load(place_ptr + offset, mask=inside, other=0).to(tl.int32)
            is_maximum = inside & (place == (r * KERNEL_WIDTH + s)[:, None])
            total += tl.load(grad_out_ptr + offset, mask=is_maximum, other=0.0).to(tl.float32)
    return total


@triton.jit
def bn_pool_grad_stats_kernel(
    grad_out_ptr,
    place_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    partial_sums_ptr,
    rows,
    height,
    width,
    channels,
    out_height,
    out_width,
    chunk_rows,
    chunks,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    PADDING_HEIGHT: tl.constexpr,
    PADDING_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Row ``chunk`` of both matrices of partial sums, in the order of ``bn_grad_stats_kernel``."""
    chunk, first_row, own_rows, channel = program_tile(rows, channels, chunk_rows, BLOCK_ROWS, BLOCK_CHANNELS)
    in_channels = channel < channels
    mean, scale, bias = load_normalization(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, in_channels)
    lane = tl.arange(0, BLOCK_ROWS)
    sum_dz = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    sum_dz_distance = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    for start in range(0, own_rows, BLOCK_ROWS):
        in_rows = start + lane < own_rows
        row = first_row + start + lane
        inside = in_rows[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + (row[:, None] * channels + channel[None, :]), mask=inside, other=0.0).to(tl.float32)
        dz = pool_grad(
            grad_out_ptr,
            place_ptr,
            row,
            in_rows,
            channel,
            in_channels,
            height,
            width,
            channels,
            out_height,
            out_width,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            STRIDE_HEIGHT,
            STRIDE_WIDTH,
            PADDING_HEIGHT,
            PADDING_WIDTH,
            BLOCK_ROWS,
            BLOCK_CHANNELS,
        )
        dz = relu_grad(dz, normalize(x, mean, scale, bias))
        sum_dz += dz
        sum_dz_distance += dz * (x - mean[None, :])
    invstd = tl.load(invstd_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
    partial = chunk.to(tl.int64) * channels + channel
    partial2 = (chunk.to(tl.int64) + chunks) * channels + channel
    tl.store(partial_sums_ptr + partial, tl.sum(sum_dz, axis=0), mask=in_channels)
    tl.store(partial_sums_ptr + partial2, tl.sum(sum_dz_distance, axis=0) * invstd, mask=in_channels)


@triton.jit
def bn_pool_grad_apply_kernel(
    grad_out_ptr,
    place_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    grad_x_ptr,
    rows,
    height,
    width,
    channels,
    out_height,
    out_width,
    chunk_rows,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    PADDING_HEIGHT: tl.constexpr,
    PADDING_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Every program writes its own chunk of rows and block of channels of the gradient, all of it once."""
    _, first_row, own_rows, channel = program_tile(rows, channels, chunk_rows, BLOCK_ROWS, BLOCK_CHANNELS)
    in_channels = channel < channels
    mean, scale, bias = load_normalization(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, in_channels)
    if sum_dz_ptr is not None:
        invstd = tl.load(invstd_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
        mean_dz = tl.load(sum_dz_ptr + channel, mask=in_channels, other=0.0).to(tl.float32) / rows
        slope = tl.load(sum_dz_xhat_ptr + channel, mask=in_channels, other=0.0).to(tl.float32) / rows * invstd
    lane = tl.arange(0, BLOCK_ROWS)
    for start in range(0, own_rows, BLOCK_ROWS):
        in_rows = start + lane < own_rows
        row = first_row + start + lane
        offset = row[:, None] * channels + channel[None, :]
        inside = in_rows[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dx = pool_grad(
            grad_out_ptr,
            place_ptr,
            row,
            in_rows,
            channel,
            in_channels,
            height,
            width,
            channels,
            out_height,
            out_width,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            STRIDE_HEIGHT,
            STRIDE_WIDTH,
            PADDING_HEIGHT,
            PADDING_WIDTH,
            BLOCK_ROWS,
            BLOCK_CHANNELS,
        )
        dx = relu_grad(dx, normalize(x, mean, scale, bias))
        if sum_dz_ptr is not None:
            dx = dx - mean_dz[None, :] - (x - mean[None, :]) * slope[None, :]
        dx *= scale[None, :]
        tl.store(grad_x_ptr + offset, dx.to(grad_x_ptr.dtype.element_ty), mask=inside)
