"""Batch normalisation, residual add and ReLU, backward: one pass for the two sums of each channel (and the gradient of
the residual, where there was one) and one for the gradient of x.

Notation of ``fused_resnet/ops/reference/__init__.py``: dz is the gradient in front of the ReLU, xhat = (x - mean) *
invstd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.arguments import Norm, Sums
from fused_resnet.kernels.bn_act import load_normalization, normalize, program_tile
from fused_resnet.kernels.channels_last import channels_last, dense_vector, matrix_shape, optional_channels_last
from fused_resnet.kernels.device import multiprocessors
from fused_resnet.kernels.row_tiles import (
    ELEMENTWISE_WARPS,
    REDUCTION_STAGES,
    REDUCTION_WARPS,
    elementwise_tiles,
    reduction_tiles,
)
from fused_resnet.kernels.welford import finalize_sums


def bn_grad_stats(
    grad_out: Tensor, x: Tensor, out: Tensor | None, norm: Norm, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of dz, sum of dz * xhat, dz): the first two, of each channel and in float32, are the gradients of bias and
    weight; the last, the gradient of the residual, is written in x's dtype and strides with ``out``, else empty.

    With ``relu`` the gradient passes where ``out`` is not <= 0 or, if ``out`` is None, where the recomputed
    ``xhat * weight + bias`` is not. Two launches: partial sums of each chunk of rows, and their sum.

    Reads 2T and writes 0; with ``out`` reads 3T and writes 1T. Beside that 8*P*C bytes of P partial sums are written
    and read again, P about 1000 / (C / 128).
    """
    x = channels_last(x)
    rows, channels = matrix_shape(x)
    tiles = reduction_tiles(rows, channels, multiprocessors(x.device))
    dz = x.new_empty(0) if out is None else torch.empty_like(x)
    partial_sums = torch.empty((2, tiles.chunks, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        bn_grad_stats_kernel[tiles.grid](
            channels_last(grad_out),
            x,
            optional_channels_last(out),
            *map(dense_vector, norm),
            None if out is None else dz,
            partial_sums,
            rows,
            channels,
            tiles.chunk_rows,
            tiles.chunks,
            RELU=relu,
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_CHANNELS=tiles.block_channels,
            STAGES=REDUCTION_STAGES[x.element_size()],
            num_warps=REDUCTION_WARPS,
        )
    sum_dz, sum_dz_xhat = finalize_sums(partial_sums).unbind()
    return sum_dz, sum_dz_xhat, dz


def bn_grad_apply(grad_out: Tensor, x: Tensor, norm: Norm, sums: Sums | None, relu: bool) -> Tensor:
    """The gradient of x, in its dtype and strides: ``weight * invstd * (dz - sum_dz / count - xhat * sum_dz_xhat /
    count)``, or ``weight * invstd * dz`` without sums, for statistics that are constants.

    With ``relu``, dz is grad_out masked by the recomputed ``xhat * weight + bias``; else it is grad_out. Reads 2T (1T
    for constant statistics without ReLU), writes 1T.
    """
    x = channels_last(x)
    rows, channels = matrix_shape(x)
    tiles = elementwise_tiles(rows, channels, multiprocessors(x.device))
    grad_x = torch.empty_like(x)
    with torch.cuda.device_of(x):
        bn_grad_apply_kernel[tiles.grid](
            channels_last(grad_out),
            x,
            *map(dense_vector, (*norm, *(sums or (None, None)))),
            grad_x,
            rows,
            channels,
            tiles.chunk_rows,
            RELU=relu,
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_CHANNELS=tiles.block_channels,
            num_warps=ELEMENTWISE_WARPS,
        )
    return grad_x


@triton.jit
def relu_grad(grad, z):
    """The gradient in front of a ReLU: 0 at 0; where z is NaN the gradient passes, as in torch."""
    return tl.where(z <= 0.0, 0.0, grad)


@triton.jit
def bn_grad_stats_kernel(
    grad_out_ptr,
    x_ptr,
    out_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    dz_ptr,
    partial_sums_ptr,
    rows,
    channels,
    chunk_rows,
    chunks,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Row ``chunk`` of both matrices of partial sums, and the program's own part of dz.

    Lane l of a channel adds rows l, l + BLOCK_ROWS, ... of the chunk in order; the lanes are added once, at the end.
    """
    chunk, first_row, own_rows, channel = program_tile(rows, channels, chunk_rows, BLOCK_ROWS, BLOCK_CHANNELS)
    in_channels = channel < channels
    mean, scale, bias = load_normalization(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, in_channels)
    lane = tl.arange(0, BLOCK_ROWS)
    offset = lane[:, None] * channels + channel[None, :]
    sum_dz = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    sum_dz_distance = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    for start in tl.range(0, own_rows, BLOCK_ROWS, num_stages=STAGES):
        inside = (start + lane < own_rows)[:, None] & in_channels[None, :]
        tile = (first_row + start) * channels
        dz = tl.load(grad_out_ptr + tile + offset, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + tile + offset, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            if out_ptr is not None:
                dz = relu_grad(dz, tl.load(out_ptr + tile + offset, mask=inside, other=0.0).to(tl.float32))
            else:
                dz = relu_grad(dz, normalize(x, mean, scale, bias))
        if dz_ptr is not None:
            tl.store(dz_ptr + tile + offset, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        sum_dz += dz
        sum_dz_distance += dz * (x - mean[None, :])
    invstd = tl.load(invstd_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
    partial = chunk.to(tl.int64) * channels + channel
    partial2 = (chunk.to(tl.int64) + chunks) * channels + channel
    tl.store(partial_sums_ptr + partial, tl.sum(sum_dz, axis=0), mask=in_channels)
    tl.store(partial_sums_ptr + partial2, tl.sum(sum_dz_distance, axis=0) * invstd, mask=in_channels)


@triton.jit
def bn_grad_apply_kernel(
    grad_out_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    grad_x_ptr,
    rows,
    channels,
    chunk_rows,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Every program writes its own chunk of rows and block of channels of the gradient, all of it once."""
    _, first_row, own_rows, channel = program_tile(rows, channels, chunk_rows, BLOCK_ROWS, BLOCK_CHANNELS)
    in_channels = channel < channels
    mean, scale, bias = load_normalization(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, in_channels)
    if sum_dz_ptr is not None:
        # dx = scale * (dz - offset_term - (x - mean) * slope)
        invstd = tl.load(invstd_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
        mean_dz = tl.load(sum_dz_ptr + channel, mask=in_channels, other=0.0).to(tl.float32) / rows
        slope = tl.load(sum_dz_xhat_ptr + channel, mask=in_channels, other=0.0).to(tl.float32) / rows * invstd
    lane = tl.arange(0, BLOCK_ROWS)
    offset = lane[:, None] * channels + channel[None, :]
    for start in range(0, own_rows, BLOCK_ROWS):
        inside = (start + lane < own_rows)[:, None] & in_channels[None, :]
        tile = (first_row + start) * channels
        dz = tl.load(grad_out_ptr + tile + offset, mask=inside, other=0.0).to(tl.float32)
        if sum_dz_ptr is not None or RELU:
            x = tl.load(x_ptr + tile + offset, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            dz = relu_grad(dz, normalize(x, mean, scale, bias))
        dx = dz
        if sum_dz_ptr is not None:
            dx = dz - mean_dz[None, :] - (x - mean[None, :]) * slope[None, :]
        dx *= scale[None, :]
        tl.store(grad_x_ptr + tile + offset, dx.to(grad_x_ptr.dtype.element_ty), mask=inside)
