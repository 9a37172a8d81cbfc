"""A convolution in training: BatchNorm and ReLU of its input on the way in, statistics of its output on the way out.

kernels/patches.py says how the image is read. What the norm in front would have written is never in memory, and the
norm behind need not read y to know its mean and variance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.arguments import ConvSettings, Norm, RunningStatistics
from fused_resnet.kernels.channels_last import NO_NORM, can_describe, channels_last, dense_vector, describe_rows
from fused_resnet.kernels.conv_shape import ConvShape, is_full_precision
from fused_resnet.kernels.conv_tiles import GROUP_ROWS
from fused_resnet.kernels.device import chip_of
from fused_resnet.kernels.patches import WIDE_ELEMENTS, patch_product, program_block
from fused_resnet.kernels.training_tiles import Product, aligned, training_tiles
from fused_resnet.kernels.welford import finalize_statistics


def conv_stats(
    x: Tensor,
    conv_weight: Tensor,
    norm: Norm | None,
    running: RunningStatistics,
    settings: ConvSettings,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean of y, 1/sqrt(variance of y + eps)) with ``y = conv2d(relu(batch_norm(x)), conv_weight)``, channels_last.

    The norm and ReLU in front are left out without a ``norm``, the statistics (then empty) if ``statistics`` is False.
    Sums in float32; float32 data is multiplied as ``torch.backends.cudnn.conv.fp32_precision`` says. The statistics are
    of y as written, each program's rows by themselves and then merged in a fixed order; the running ones move. Two
    launches. The caller has asked ``why_not_conv``.

    Args:
        x: (N, C, H, W), channels_last; float32, float16 or bfloat16.
        conv_weight: (K, C, R, S) of x's dtype; copied if not channels_last.
        norm: vectors of any float dtype.
        running: moved as in ``bn_stats``.

    Reads bytes(x) + bytes(conv_weight) (the image up to R*S times from L2), writes bytes(y), and 12*P*K bytes of P
    partial statistics, about ``training_tiles.CHUNK_WAVES`` waves of programs, which the second launch reads.
    """
    x, conv_weight = channels_last(x), channels_last(conv_weight)
    shape = ConvShape.of(x, conv_weight, settings)
    full_precision = is_full_precision(x)
    wide = max(x.numel(), conv_weight.numel(), shape.rows * shape.filters) >= WIDE_ELEMENTS
    product = forward_product(shape, x.element_size(), wide)
    chip = chip_of(x.device)
    tiles = training_tiles(product, x.element_size(), chip, full_precision=full_precision)
    descriptors = chip.tma and shape.pointwise and can_describe(x, conv_weight)
    y = shape.empty_output(x)
    chunks = triton.cdiv(shape.rows, tiles.rows * tiles.row_tiles)
    counts = means = m2s = None
    if statistics:
        counts = torch.empty(chunks, dtype=torch.int64, device=x.device)
        means = torch.empty((chunks, shape.filters), dtype=torch.float64, device=x.device)
        m2s = torch.empty((chunks, shape.filters), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        conv_stats_kernel[(chunks * triton.cdiv(shape.filters, tiles.columns),)](
            describe_rows(x, tiles.rows, tiles.depth) if descriptors else x,
            describe_rows(conv_weight, tiles.columns, tiles.depth) if descriptors else conv_weight,
            *map(dense_vector, norm or NO_NORM),
            y,
            counts,
            means,
            m2s,
            shape.rows,
            *shape.sizes,
            *settings.numbers,
            tiles.row_tiles,
            **shape.constants(tiles.flat),
            EVEN_DEPTH=(shape.taps * shape.channels if tiles.flat else shape.channels) % tiles.depth == 0,
            WIDE=wide,
            PRECISION="ieee" if full_precision else "tf32",
            BLOCK_ROWS=tiles.rows,
            BLOCK_FILTERS=tiles.columns,
            BLOCK_DEPTH=tiles.depth,
            GROUP_ROWS=GROUP_ROWS,
            DESCRIPTORS=descriptors,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    if counts is None or means is None or m2s is None:
        return y, *(torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
    return (y, *finalize_statistics(counts, means, m2s, running, y))


def forward_product(shape: ConvShape, element_bytes: int, wide: bool = False) -> Product:
    """``wide``: with 64-bit offsets, which take the registers of some sums."""
    return Product(
        rows=shape.rows,
        columns=shape.filters,
        taps=shape.taps,
        channels=shape.channels,
        flat=True,
        aligned=aligned(element_bytes, shape.channels, shape.filters),
        sums=32 if wide else 64,
    )


@triton.jit
def tile_statistics(value, in_rows, count):
    """(mean, M2) of each column over the ``in_rows`` rows of a tile in registers; ``count`` of them, at least 1.

    Two passes: the distances are from the first one's mean, whose own error the second one takes out again.
    """
    value = tl.where(in_rows[:, None], value, 0.0)
    rough = tl.sum(value, axis=0) / count
    distance = tl.where(in_rows[:, None], value - rough[None, :], 0.0)
    error = tl.sum(distance, axis=0) / count
    m2 = tl.sum(distance * distance, axis=0) - count * error * error
    return rough.to(tl.float64) + error, tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def merge_into_partial(mean_ptr, m2_ptr, count, more, more_mean, more_m2, inside, begun):
    """Merges a program's tile of ``more`` rows into the statistics of its ``count`` rows before, by Chan's formula.

    They wait in memory (in L2): in registers they would be held through the main loop, by every thread that has a part
    of the column."""
    mean = tl.load(mean_ptr, mask=inside & begun, other=0.0)
    m2 = tl.load(m2_ptr, mask=inside & begun, other=0.0)
    share = more / (count + more)
    distance = more_mean - mean
    tl.store(mean_ptr, mean + distance * share, mask=inside)
    tl.store(m2_ptr, m2 + more_m2 + (distance * distance * (count * share)).to(tl.float32), mask=inside)


@triton.jit
def conv_stats_kernel(
    x_ptr,
    weight_ptr,
    mean_ptr,
    invstd_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    y_ptr,
    counts_ptr,
    means_ptr,
    m2s_ptr,
    rows,
    height,
    width,
    channels,
    out_height,
    out_width,
    filters,
    stride_height,
    stride_width,
    padding_height,
    padding_width,
    dilation_height,
    dilation_width,
    row_tiles,
    KERNEL_WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    FLAT_CHANNELS: tl.constexpr,
    POINTWISE: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """A program owns a chunk of ``row_tiles`` consecutive tiles of rows under one block of filters: it writes that part
    of y once, and row ``chunk`` of the partial statistics, its tiles merged in order by Chan's formula."""
    chunks = tl.cdiv(rows, BLOCK_ROWS * row_tiles)
    chunk, filter_block = program_block(chunks, tl.cdiv(filters, BLOCK_FILTERS), GROUP_ROWS)
    first_tile = chunk * row_tiles
    if WIDE:
        first_tile = first_tile.to(tl.int64)
    for tile in range(0, row_tiles):
        # tile // row_tiles is 0, which the compiler cannot know: it would compute all that depends on the filters alone
        # before this loop, and hold it in registers that the main loop needs.
        filter = (filter_block + tile // row_tiles) * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
        if WIDE:
            filter = filter.to(tl.int64)
        in_filters = filter < filters
        first_row = (first_tile + tile) * BLOCK_ROWS
        row = first_row + tl.arange(0, BLOCK_ROWS)
        in_rows = row < rows
        total = patch_product(
            x_ptr,
            weight_ptr,
            mean_ptr,
            invstd_ptr,
            bn_weight_ptr,
            bn_bias_ptr,
            first_row,
            (filter_block + tile // row_tiles) * BLOCK_FILTERS,
            rows,
            height,
            width,
            channels,
            out_height,
            out_width,
            filters,
            stride_height,
            stride_width,
            padding_height,
            padding_width,
            dilation_height,
            dilation_width,
            KERNEL_WIDTH,
            TAPS,
            FLAT_CHANNELS,
            POINTWISE,
            PADDED,
            EVEN_DEPTH,
            WIDE,
            PRECISION,
            BLOCK_ROWS,
            BLOCK_FILTERS,
            BLOCK_DEPTH,
            DESCRIPTORS,
        )
        y = total.to(y_ptr.dtype.element_ty)
        inside = in_rows[:, None] & in_filters[None, :]
        tl.store(y_ptr + (row[:, None] * filters + filter[None, :]), y, mask=inside)
        if counts_ptr is not None:
            more = tl.minimum(rows - first_row, BLOCK_ROWS).to(tl.float32)
            if more > 0:
                more_mean, more_m2 = tile_statistics(y.to(tl.float32), in_rows, more)
                count = (first_row - first_tile * BLOCK_ROWS).to(tl.float32)
                partial = chunk.to(tl.int64) * filters + filter
                begun = first_row > first_tile * BLOCK_ROWS
                merge_into_partial(
                    means_ptr + partial, m2s_ptr + partial, count, more, more_mean, more_m2, in_filters, begun
                )
                tl.store(counts_ptr + chunk, (count + more).to(tl.int64), mask=filter_block == 0)
                tl.debug_barrier()  # the next tile is merged by other threads of this program
