"""Batch normalisation, residual add and ReLU, forward: one pass for the statistics and one to apply them.

T is the bytes of one activation. All tensors are (N, C, H, W) in channels_last, seen as row-major (N*H*W, C).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.arguments import Norm, RunningStatistics
from fused_resnet.kernels.channels_last import (
    NO_NORM,
    channels_last,
    dense_vector,
    matrix_shape,
    optional_channels_last,
)
from fused_resnet.kernels.device import multiprocessors
from fused_resnet.kernels.row_tiles import (
    ELEMENTWISE_WARPS,
    REDUCTION_STAGES,
    REDUCTION_WARPS,
    elementwise_tiles,
    reduction_tiles,
)
from fused_resnet.kernels.welford import finalize_statistics, merge_lanes


def bn_stats(x: Tensor, running: RunningStatistics) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(biased variance + eps) of each channel, in float32; moves the running statistics in place.

    Equals ``torch.var_mean(x.float(), (0, 2, 3), correction=0)`` and ``nn.BatchNorm2d``'s update. Two launches: the
    partial statistics of each chunk of rows, and their merge.

    Reads 1T; writes 12*P*C + 8*P bytes of P partial results (and reads them again), P about 1000 / (C / 128).
    """
    x = channels_last(x)
    rows, channels = matrix_shape(x)
    tiles = reduction_tiles(rows, channels, multiprocessors(x.device))
    counts = torch.empty(tiles.chunks, dtype=torch.int64, device=x.device)
    means = torch.empty((tiles.chunks, channels), dtype=torch.float64, device=x.device)
    m2s = torch.empty((tiles.chunks, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        bn_stats_kernel[tiles.grid](
            x,
            counts,
            means,
            m2s,
            rows,
            channels,
            tiles.chunk_rows,
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_CHANNELS=tiles.block_channels,
            STAGES=REDUCTION_STAGES[x.element_size()],
            num_warps=REDUCTION_WARPS,
        )
    return finalize_statistics(counts, means, m2s, running, x)


def bn_apply(x: Tensor, norm: Norm, residual: Tensor | None, relu: bool) -> Tensor:
    """``relu((x - mean) * invstd * weight + bias + residual)``, in x's dtype and strides.

    The vectors are (C,) of any float dtype, weight and bias may be None; the residual may be None. Reads 1T (2T with
    a residual), writes 1T.
    """
    return _apply(x, norm, residual, NO_NORM, relu)


def bn_apply_dual(x: Tensor, norm: Norm, x2: Tensor, norm2: Norm, relu: bool) -> Tensor:
    """``bn_apply`` whose residual is itself normalised: the end of a projection block. Reads 2T, writes 1T."""
    return _apply(x, norm, x2, norm2, relu)


def _apply(
    x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: tuple[Tensor | None, ...], relu: bool
) -> Tensor:
    x = channels_last(x)
    rows, channels = matrix_shape(x)
    tiles = elementwise_tiles(rows, channels, multiprocessors(x.device))
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        bn_apply_kernel[tiles.grid](
            x,
            *map(dense_vector, norm),
            optional_channels_last(residual),
            *map(dense_vector, residual_norm),
            out,
            rows,
            channels,
            tiles.chunk_rows,
            RELU=relu,
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_CHANNELS=tiles.block_channels,
            num_warps=ELEMENTWISE_WARPS,
        )
    return out


@triton.jit
def program_tile(rows, channels, chunk_rows, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """What this program owns: (chunk, its first row (int64), its number of rows, its channels).

    Offsets are 64-bit up to the first row of a chunk and 32-bit inside a tile, which spans at most 2048 rows of one
    channel or 16 rows of 2^27.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    chunk = tl.program_id(0) // channel_blocks
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first_row = chunk.to(tl.int64) * chunk_rows
    own_rows = tl.minimum(rows - first_row, chunk_rows).to(tl.int32)
    return chunk, first_row, own_rows, channel


@triton.jit
def load_normalization(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, in_channels):
    """(mean, invstd * weight, bias) in float32; a missing weight is 1, a missing bias 0."""
    mean = tl.load(mean_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
    scale = tl.load(invstd_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros_like(scale)
    return mean, scale, bias


@triton.jit
def normalize(x, mean, scale, bias):
    """The mean is subtracted first: x * scale + shift loses its digits when |mean| >> std."""
    return (x - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def bn_stats_kernel(
    x_ptr,
    counts_ptr,
    means_ptr,
    m2s_ptr,
    rows,
    channels,
    chunk_rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Row ``chunk`` of the partial statistics. Lane l of a channel takes rows l, l + BLOCK_ROWS, ... of the chunk by
    Welford's update (Chan's formula with one new value); the lanes are merged once, at the end.

    The running means are kept as distances from the chunk's first row. Where |mean| >> std that difference is exact
    and small, while a float32 mean would be rounded in every step by more than the variance can bear."""
    chunk, first_row, own_rows, channel = program_tile(rows, channels, chunk_rows, BLOCK_ROWS, BLOCK_CHANNELS)
    in_channels = channel < channels
    lane = tl.arange(0, BLOCK_ROWS)
    offset = lane[:, None] * channels + channel[None, :]
    first = tl.load(x_ptr + first_row * channels + channel, mask=in_channels, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    for start in tl.range(0, own_rows, BLOCK_ROWS, num_stages=STAGES):
        inside = (start + lane < own_rows)[:, None] & in_channels[None, :]
        tile = (first_row + start) * channels
        x = tl.load(x_ptr + tile + offset, mask=inside, other=0.0).to(tl.float32)
        x -= first[None, :]
        distance = tl.where(inside, x - mean, 0.0)
        mean += distance * (1.0 / (start // BLOCK_ROWS + 1))
        m2 += distance * (x - mean)
    lane_count = ((own_rows - lane + BLOCK_ROWS - 1) // BLOCK_ROWS).to(tl.float32)
    lane_count = tl.where(lane < own_rows, lane_count, 0.0)
    _, mean, m2 = merge_lanes(lane_count, mean, m2)
    partial = chunk.to(tl.int64) * channels + channel
    tl.store(means_ptr + partial, first.to(tl.float64) + mean, mask=in_channels)
    tl.store(m2s_ptr + partial, m2, mask=in_channels)
    tl.store(counts_ptr + chunk, own_rows.to(tl.int64), mask=tl.program_id(0) % tl.cdiv(channels, BLOCK_CHANNELS) == 0)


@triton.jit
def bn_apply_kernel(
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    residual_mean_ptr,
    residual_invstd_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    out_ptr,
    rows,
    channels,
    chunk_rows,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Every program writes its own chunk of rows and block of channels of ``out``, all of it once."""
    _, first_row, own_rows, channel = program_tile(rows, channels, chunk_rows, BLOCK_ROWS, BLOCK_CHANNELS)
    in_channels = channel < channels
    mean, scale, bias = load_normalization(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, in_channels)
    if residual_mean_ptr is not None:
        residual_mean, residual_scale, residual_bias = load_normalization(
            residual_mean_ptr, residual_invstd_ptr, residual_weight_ptr, residual_bias_ptr, channel, in_channels
        )
    lane = tl.arange(0, BLOCK_ROWS)
    offset = lane[:, None] * channels + channel[None, :]
    for start in range(0, own_rows, BLOCK_ROWS):
        inside = (start + lane < own_rows)[:, None] & in_channels[None, :]
        tile = (first_row + start) * channels
        x = tl.load(x_ptr + tile + offset, mask=inside, other=0.0).to(tl.float32)
        z = normalize(x, mean, scale, bias)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + tile + offset, mask=inside, other=0.0).to(tl.float32)
            if residual_mean_ptr is not None:
                residual = normalize(residual, residual_mean, residual_scale, residual_bias)
            z += residual
        if RELU:
            z = tl.where(z <= 0.0, 0.0, z)  # a NaN passes, as in torch
        tl.store(out_ptr + tile + offset, z.to(out_ptr.dtype.element_ty), mask=inside)
