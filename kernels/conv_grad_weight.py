"""Backward of a convolution in training towards its weight: both of its operands are made on the way in, the output's
gradient from dz and y, the activation from the raw output of the convolution before.

The weight's gradient is the product of two tall matrices, dy (N*OH*OW, filters) and the image's patches (N*OH*OW,
R*S*C), over their rows. Few results, many rows: the rows are cut in splits, each of which leaves a float32 partial
result, and a second launch adds these in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.arguments import ConvSettings, Norm
from fused_resnet.kernels.bn_act import load_normalization
from fused_resnet.kernels.bn_grad_coefficients import load_coefficients, output_grad
from fused_resnet.kernels.channels_last import (
    NO_NORM,
    can_describe,
    channels_last,
    dense_vector,
    describe_rows,
    optional_channels_last,
)
from fused_resnet.kernels.conv_shape import ConvShape, is_full_precision
from fused_resnet.kernels.device import Chip, chip_of
from fused_resnet.kernels.patches import WIDE_ELEMENTS, activate
from fused_resnet.kernels.training_tiles import Product, aligned, training_tiles

FLAT_CHANNELS = 16  # with fewer, the columns are taken as R*S*C lies, not tap by tap
SUM_BLOCK = 512


def conv_grad_weight(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Norm | None,
    conv_weight: Tensor,
    settings: ConvSettings,
) -> Tensor:
    """The gradient of conv_weight, of which only the shape is read: (K, C, R, S) float32, channels_last.

    dy is made of dz, y and ``coefficients`` as in ``conv_grad_input``, and the activation of x and the norm as
    in ``conv_stats``; arguments as there. Two launches where the rows are split.

    Reads bytes(dz) [+ bytes(y)] + bytes(x), each once for every tile of the result, mostly from L2; writes 4*K*R*S*C
    bytes, and 4*splits*K*R*S*C of partial results, which the second launch reads.
    """
    x, dz = channels_last(x), channels_last(dz)
    shape = ConvShape.of(x, conv_weight, settings)
    full_precision = is_full_precision(x)
    chip = chip_of(x.device)
    product = grad_weight_product(shape, x.element_size(), 1 if y is None else 2, chip)
    tiles = training_tiles(product, x.element_size(), chip, full_precision=full_precision)
    y = optional_channels_last(y)
    descriptors = chip.tma and shape.pointwise and can_describe(dz, x, dz if y is None else y)
    like = torch.empty_like(conv_weight, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    partials = like if tiles.splits == 1 else like.new_empty((tiles.splits, like.numel()))
    width = product.columns if tiles.flat else shape.channels
    column_blocks = triton.cdiv(width, tiles.columns) * (1 if tiles.flat else shape.taps)
    with torch.cuda.device_of(x):
        conv_grad_weight_kernel[(triton.cdiv(shape.filters, tiles.rows) * column_blocks, tiles.splits)](
            describe_rows(dz, tiles.depth, tiles.rows) if descriptors else dz,
            describe_rows(y, tiles.depth, tiles.rows) if descriptors and y is not None else y,
            dense_vector(coefficients),
            describe_rows(x, tiles.depth, tiles.columns) if descriptors else x,
            *map(dense_vector, norm or NO_NORM),
            partials,
            shape.rows,
            *shape.sizes,
            *settings.numbers,
            triton.cdiv(triton.cdiv(shape.rows, tiles.depth), tiles.splits) * tiles.depth,
            **shape.constants(tiles.flat),
            WIDE=max(x.numel(), dz.numel()) >= WIDE_ELEMENTS,
            PRECISION="ieee" if full_precision else "tf32",
            BLOCK_FILTERS=tiles.rows,
            BLOCK_COLUMNS=tiles.columns,
            BLOCK_ROWS=tiles.depth,
            DESCRIPTORS=descriptors,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if tiles.splits > 1:
            sum_splits_kernel[(triton.cdiv(like.numel(), SUM_BLOCK),)](
                partials, like, tiles.splits, like.numel(), BLOCK=SUM_BLOCK, num_warps=4
            )
    return like


def grad_weight_product(shape: ConvShape, element_bytes: int, operands: int, chip: Chip) -> Product:
    """``operands``: 2 with y, else 1."""
    return Product(
        rows=shape.filters,
        columns=shape.taps * shape.channels,
        taps=shape.taps,
        channels=shape.rows,
        row_operands=operands,
        splittable=True,
        flat=shape.channels < FLAT_CHANNELS and shape.taps > 1,
        aligned=aligned(element_bytes, shape.channels, shape.filters),
        sums=64 if chip.wgmma else 32,
    )


@triton.jit
def conv_grad_weight_kernel(
    dz_ptr,
    y_ptr,
    coefficients_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    partials_ptr,
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
    split_rows,
    KERNEL_WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    FLAT_CHANNELS: tl.constexpr,
    POINTWISE: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """A program owns a block of filters and a block of columns (channels under one tap, or R*S*C as it lies) and adds
    up its split of the rows in order; it writes that part of its split's partial result once.

    Rows past the split's end and pixels outside the image are 0 in both operands, whatever the vectors would make of
    them. DESCRIPTORS: dz_ptr, y_ptr and x_ptr are tensor descriptors of the matrices (rows, filters) and (rows,
    channels) of a pointwise convolution. FLAT_CHANNELS is the channel count if the columns lie flat, else 0.
    """
    split = tl.program_id(1).to(tl.int64)
    filter_blocks = tl.cdiv(filters, BLOCK_FILTERS)
    first_filter = tl.program_id(0) % filter_blocks * BLOCK_FILTERS
    filter = first_filter + tl.arange(0, BLOCK_FILTERS)
    column_block = tl.program_id(0) // filter_blocks
    in_filters = filter < filters
    if FLAT_CHANNELS > 0:
        place = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        tap = place // FLAT_CHANNELS
        channel = place % FLAT_CHANNELS
        in_columns = place < TAPS * FLAT_CHANNELS
    else:
        channel_blocks = tl.cdiv(channels, BLOCK_COLUMNS)
        tap = column_block // channel_blocks
        first_channel = column_block % channel_blocks * BLOCK_COLUMNS
        channel = first_channel + tl.arange(0, BLOCK_COLUMNS)
        place = tap * channels + channel
        in_columns = channel < channels
    down = tap // KERNEL_WIDTH * dilation_height - padding_height
    right = tap % KERNEL_WIDTH * dilation_width - padding_width
    first_row = split * split_rows
    last_row = tl.minimum(first_row + split_rows, rows)
    if not WIDE:
        first_row = first_row.to(tl.int32)
        last_row = last_row.to(tl.int32)
    if mean_ptr is not None:
        norm = load_normalization(mean_ptr, invstd_ptr, bn_weight_ptr, bn_bias_ptr, channel, in_columns)
    if y_ptr is not None:
        abc = load_coefficients(coefficients_ptr, filters, filter, in_filters)
    elif coefficients_ptr is not None:
        slope = tl.load(coefficients_ptr + filter, mask=in_filters, other=0.0)

    total = tl.zeros((BLOCK_FILTERS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(first_row, last_row, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        in_rows = (row < last_row)[:, None]
        in_dy = in_rows & in_filters[None, :]
        dy_offset = row[:, None] * filters + filter[None, :]
        dy = (
            dz_ptr.load([tl.cast(start, tl.int32), first_filter])
            if DESCRIPTORS
            else tl.load(dz_ptr + dy_offset, mask=in_dy, other=0.0)
        )
        in_image = in_rows & in_columns[None, :]
        if POINTWISE:
            offset = row[:, None] * channels + channel[None, :]
        else:
            top = row // out_width % out_height * stride_height
            left = row % out_width * stride_width
            corner = row // out_width // out_height * height
            if FLAT_CHANNELS > 0:
                pixel_y = top[:, None] + down[None, :]
                pixel_x = left[:, None] + right[None, :]
                offset = ((corner[:, None] + pixel_y) * width + pixel_x) * channels + channel[None, :]
                if PADDED:
                    in_image = in_image & (pixel_y >= 0) & (pixel_y < height) & (pixel_x >= 0) & (pixel_x < width)
            else:
                pixel_y = top + down
                pixel_x = left + right
                offset = (((corner + pixel_y) * width + pixel_x) * channels)[:, None] + channel[None, :]
                if PADDED:
                    in_pixels = (pixel_y >= 0) & (pixel_y < height) & (pixel_x >= 0) & (pixel_x < width)
                    in_image = in_image & in_pixels[:, None]
        image = (
            x_ptr.load([tl.cast(start, tl.int32), first_channel])
            if DESCRIPTORS
            else tl.load(x_ptr + offset, mask=in_image, other=0.0)
        )
        if y_ptr is not None:
            y = (
                y_ptr.load([tl.cast(start, tl.int32), first_filter])
                if DESCRIPTORS
                else tl.load(y_ptr + dy_offset, mask=in_dy, other=0.0)
            )
            dy = output_grad(dy, y, abc[0], abc[1], abc[2], abc[3])
            dy = tl.where(in_rows, dy, 0.0).to(image.dtype)
        elif coefficients_ptr is not None:
            dy = (dy.to(tl.float32) * slope[None, :]).to(image.dtype)
        if mean_ptr is not None:
            image = activate(image, norm[0], norm[1], norm[2])
            image = tl.where(in_image, image, 0.0).to(dy.dtype)
        total = tl.dot(tl.trans(dy), image, total, input_precision=PRECISION)

    size = tl.cast(filters, tl.int64) * TAPS * channels
    offset = split * size + filter.to(tl.int64)[:, None] * (TAPS * channels) + place[None, :]
    tl.store(partials_ptr + offset, total, mask=in_filters[:, None] & in_columns[None, :])


@triton.jit
def sum_splits_kernel(partials_ptr, total_ptr, splits, size, BLOCK: tl.constexpr):
    """A program owns BLOCK elements of the result and adds the splits in order, in float32."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(0, splits):
        total += tl.load(partials_ptr + (split * tl.cast(size, tl.int64) + place), mask=inside, other=0.0)
    tl.store(total_ptr + place, total, mask=inside)
