"""Merging partial statistics: (count, mean, M2) by Chan's formula, and plain sums; both in float64 and a fixed order.

A partial result is one row of a (partials, channels) matrix and may come from anywhere: from ``bn_stats``' chunks of
rows, from the tiles of a convolution that sums in its epilogue, or from the ranks of a distributed job. M2 is the sum
of squared distances from the partial's own mean; nothing here ever subtracts two large sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.arguments import RunningStatistics
from fused_resnet.kernels.channels_last import dense_vector

# The partials of 8 channels (a 32-byte sector of float32) are merged by 256 threads, 8 partials each at a time: the
# roughly 1000 partials of a 132-multiprocessor GPU take four steps, each one memory latency long.
MERGE_PARTIALS = 256
MERGE_CHANNELS = 8
MERGE_WARPS = 8


def finalize_statistics(
    counts: Tensor, means: Tensor, m2s: Tensor, running: RunningStatistics, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges partial statistics and moves the running ones, in one launch.

    Args:
        counts: (P,) int64, the number of values behind each partial result; 0 is allowed.
        means, m2s: (P, C), dense, float32 or float64. Give means in float64: where |mean| >> std, float32 ones are
            rounded by more than the differences between them can bear.
        running: the first two (C,) of any float dtype, moved in place, or None: (1 - momentum) * running + momentum *
            new. The variance that moves is the unbiased one.
        x: (N, C, H, W), channels_last: the values themselves. A channel whose M2 is not finite is read again, for
            squares of distances beyond 1e19 overflow in float32.

    Returns:
        mean and 1/sqrt(biased variance + eps): two (C,) float32 vectors.

    Reads 12*P*C + 8*P bytes (means in float64) and writes 8*C, beside the running statistics, read and written.
    """
    running_mean, running_var, momentum, eps = running
    partials, channels = means.shape
    mean, invstd = (torch.empty(channels, dtype=torch.float32, device=means.device) for _ in range(2))
    new_running_mean, new_running_var = dense_vector(running_mean), dense_vector(running_var)
    with torch.cuda.device_of(means):
        finalize_statistics_kernel[(triton.cdiv(channels, MERGE_CHANNELS),)](
            counts,
            means,
            m2s,
            mean,
            invstd,
            new_running_mean,
            new_running_var,
            x,
            x.numel() // channels,
            partials,
            channels,
            float(momentum),
            float(eps),
            BLOCK_PARTIALS=MERGE_PARTIALS,
            BLOCK_CHANNELS=MERGE_CHANNELS,
            num_warps=MERGE_WARPS,
        )
    for vector, moved in ((running_mean, new_running_mean), (running_var, new_running_var)):
        if vector is not None and moved is not vector:
            vector.copy_(moved)
    return mean, invstd


def finalize_sums(partial_sums: Tensor) -> Tensor:
    """The sums over the partial results: (K, P, C) float32 to (K, C) float32. Reads 4*K*P*C bytes, writes 4*K*C."""
    kinds, partials, channels = partial_sums.shape
    sums = partial_sums.new_empty((kinds, channels))
    with torch.cuda.device_of(partial_sums):
        finalize_sums_kernel[(triton.cdiv(channels, MERGE_CHANNELS), kinds)](
            partial_sums,
            sums,
            partials,
            channels,
            BLOCK_PARTIALS=MERGE_PARTIALS,
            BLOCK_CHANNELS=MERGE_CHANNELS,
            num_warps=MERGE_WARPS,
        )
    return sums


@triton.jit
def merge_lanes(count, mean, m2):
    """(count, mean, M2) over axis 0 of a tile: Chan's formula for all lanes at once, counts as a column.

    A lane of count 0 must hold mean 0 and M2 0. The order of additions is fixed by the tile's layout.
    """
    total = tl.sum(count, axis=0)
    merged_mean = tl.sum(mean * (count / tl.maximum(total, 1.0))[:, None], axis=0)
    distance = mean - merged_mean[None, :]
    merged_m2 = tl.sum(m2 + count[:, None] * distance * distance, axis=0)
    return total, merged_mean, merged_m2


@triton.jit
def finalize_statistics_kernel(
    counts_ptr,
    means_ptr,
    m2s_ptr,
    mean_ptr,
    invstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    x_ptr,
    rows,
    partials,
    channels,
    momentum,
    eps,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A program owns BLOCK_CHANNELS channels; each of its BLOCK_PARTIALS lanes merges every BLOCK_PARTIALS-th row in
    order, then the lanes are merged. Nobody else touches these channels of the running statistics."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    lane = tl.arange(0, BLOCK_PARTIALS)
    in_channels = channel < channels
    count = tl.zeros((BLOCK_PARTIALS,), dtype=tl.float64)
    mean = tl.zeros((BLOCK_PARTIALS, BLOCK_CHANNELS), dtype=tl.float64)
    m2 = tl.zeros((BLOCK_PARTIALS, BLOCK_CHANNELS), dtype=tl.float64)
    for start in range(0, partials, BLOCK_PARTIALS):
        partial = start + lane
        in_partials = partial < partials
        inside = in_partials[:, None] & in_channels[None, :]
        offset = partial.to(tl.int64)[:, None] * channels + channel[None, :]
        more_count = tl.load(counts_ptr + partial, mask=in_partials, other=0).to(tl.float64)
        more_mean = tl.load(means_ptr + offset, mask=inside, other=0.0).to(tl.float64)
        more_m2 = tl.load(m2s_ptr + offset, mask=inside, other=0.0).to(tl.float64)
        new_count = count + more_count
        share = more_count / tl.maximum(new_count, 1.0)
        distance = tl.where(share[:, None] > 0.0, more_mean - mean, 0.0)
        mean += distance * share[:, None]
        m2 += more_m2 + distance * distance * (count * share)[:, None]
        count = new_count
    total, mean, m2 = merge_lanes(count, mean, m2)
    finite = (m2 * 0.0 == 0.0) | (channel >= channels)
    if tl.min(finite.to(tl.int32), axis=0) == 0:
        mean_again, m2_again = moments_of_channels(x_ptr, rows, channels, channel, BLOCK_PARTIALS, BLOCK_CHANNELS)
        mean, m2 = tl.where(finite, mean, mean_again), tl.where(finite, m2, m2_again)
    variance = m2 / tl.maximum(total, 1.0)
    tl.store(mean_ptr + channel, mean.to(tl.float32), mask=in_channels)
    tl.store(invstd_ptr + channel, (1.0 / tl.sqrt(variance + eps)).to(tl.float32), mask=in_channels)
    if running_mean_ptr is not None:
        move_running(running_mean_ptr, mean, momentum, channel, in_channels)
    if running_var_ptr is not None:
        move_running(running_var_ptr, m2 / tl.maximum(total - 1.0, 1.0), momentum, channel, in_channels)


@triton.jit
def moments_of_channels(x_ptr, rows, channels, channel, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """(mean, M2) of a few channels in float64, by two passes over x."""
    lane = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float64)
    for start in range(0, rows, BLOCK_ROWS):
        row = (start + lane).to(tl.int64)[:, None]
        inside = (row < rows) & (channel < channels)[None, :]
        total += tl.load(x_ptr + row * channels + channel[None, :], mask=inside, other=0.0).to(tl.float64)
    mean = tl.sum(total, axis=0) / rows
    m2 = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float64)
    for start in range(0, rows, BLOCK_ROWS):
        row = (start + lane).to(tl.int64)[:, None]
        inside = (row < rows) & (channel < channels)[None, :]
        x = tl.load(x_ptr + row * channels + channel[None, :], mask=inside, other=0.0).to(tl.float64)
        distance = tl.where(inside, x - mean[None, :], 0.0)
        m2 += distance * distance
    return mean, tl.sum(m2, axis=0)


@triton.jit
def move_running(running_ptr, value, momentum, channel, in_channels):
    """running = (1 - momentum) * running + momentum * value."""
    running = tl.load(running_ptr + channel, mask=in_channels, other=0.0).to(tl.float64)
    moved = running * (1.0 - momentum) + value * momentum
    tl.store(running_ptr + channel, moved.to(running_ptr.dtype.element_ty), mask=in_channels)


@triton.jit
def finalize_sums_kernel(
    partials_ptr, sums_ptr, partials, channels, BLOCK_PARTIALS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """A program owns BLOCK_CHANNELS channels of one kind of sum (grid axis 1), and adds in the order of
    ``finalize_statistics_kernel``."""
    kind = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    lane = tl.arange(0, BLOCK_PARTIALS)
    in_channels = channel < channels
    total = tl.zeros((BLOCK_PARTIALS, BLOCK_CHANNELS), dtype=tl.float64)
    for start in range(0, partials, BLOCK_PARTIALS):
        partial = start + lane
        inside = (partial < partials)[:, None] & in_channels[None, :]
        offset = (kind * partials + partial)[:, None] * channels + channel[None, :]
        total += tl.load(partials_ptr + offset, mask=inside, other=0.0).to(tl.float64)
    tl.store(sums_ptr + kind * channels + channel, tl.sum(total, axis=0).to(tl.float32), mask=in_channels)
