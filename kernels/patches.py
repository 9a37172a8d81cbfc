"""The image of a convolution as the matrix of its patches, and the product of that matrix with the filters.

The output is a row-major (N*OH*OW, filters) matrix, the weight a row-major (filters, R*S*C) one (KRSC, the memory of
a channels_last weight), and the image is read as the (N*OH*OW, R*S*C) matrix of its patches, which never exists.
The depth R*S*C is walked in one of three ways, each compiled for itself:

- pointwise (1x1, stride 1, no padding): the patches are the image; a plain matrix product.
- by taps: a step is BLOCK_DEPTH channels under one tap (r, s) of the kernel, so a patch's address is the address of
  its corner plus one number for the whole tile.
- flat: for few channels, where a step by taps would mostly be padding (the stem has 3). R*S*C is cut into steps as it
  lies, and every column of a tile knows its own tap. The channel count is a constant of the compiled code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_resnet.kernels.bn_act import load_normalization, normalize

WIDE_ELEMENTS = 2**30  # tensors of so many have 64-bit offsets; not 2**31, as masked lanes count past the end


@triton.jit
def program_block(row_blocks, filter_blocks, GROUP_ROWS: tl.constexpr):
    """(row block, filter block) of this program: GROUP_ROWS row blocks under each filter block in turn, so that
    programs running together share both the image's and the weight's tiles in L2."""
    program = tl.program_id(0)
    group = program // (GROUP_ROWS * filter_blocks)
    rows_in_group = tl.minimum(row_blocks - group * GROUP_ROWS, GROUP_ROWS)
    place = program % (GROUP_ROWS * filter_blocks)
    return group * GROUP_ROWS + place % rows_in_group, place // rows_in_group


@triton.jit
def activate(x, mean, scale, bias):
    """``relu((x - mean) * scale + bias)`` of a tile, in its dtype: the norm and ReLU in front of a convolution."""
    z = normalize(x.to(tl.float32), mean, scale, bias)
    return tl.where(z <= 0.0, 0.0, z).to(x.dtype)  # a NaN passes, as in torch


@triton.jit
def patch_product(
    x_ptr,
    weight_ptr,
    mean_ptr,
    invstd_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    first_row,
    first_filter,
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
    DESCRIPTORS: tl.constexpr,
):
    """The (BLOCK_ROWS, BLOCK_FILTERS) tile of the convolution from this row and filter on, the depth added in order in
    float32.

    With ``mean_ptr`` the image is normalised and rectified on its way, and the padding put back to 0 afterwards.
    FLAT_CHANNELS is the channel count if the depth is walked flat, else 0. EVEN_DEPTH: no step reaches past its
    channels. WIDE: first_row is 64-bit, and so are the offsets of rows and filters. DESCRIPTORS: x_ptr and weight_ptr
    are tensor descriptors of the matrices (rows, channels) and (filters, channels) of a pointwise convolution. Reads
    outside the image, the channels or the filters give 0.
    """
    row = first_row + tl.arange(0, BLOCK_ROWS)
    filter = first_filter + tl.arange(0, BLOCK_FILTERS)
    column = tl.arange(0, BLOCK_DEPTH)
    if WIDE:
        column = column.to(tl.int64)
        filter = filter.to(tl.int64)
    in_rows = row < rows
    in_filters = filter < filters
    if POINTWISE:
        corner = row * channels
    else:
        top = row // out_width % out_height * stride_height - padding_height
        left = row % out_width * stride_width - padding_width
        corner = ((row // out_width // out_height * height + top) * width + left) * channels
    weight_row = filter * (TAPS * channels)

    if FLAT_CHANNELS > 0:
        steps = tl.cdiv(TAPS * FLAT_CHANNELS, BLOCK_DEPTH)
        channel_steps = steps
    else:
        channel_steps = tl.cdiv(channels, BLOCK_DEPTH)
        steps = TAPS * channel_steps
    total = tl.zeros((BLOCK_ROWS, BLOCK_FILTERS), dtype=tl.float32)
    for step in range(0, steps):
        if FLAT_CHANNELS > 0:
            place = step * BLOCK_DEPTH + column
            tap = place // FLAT_CHANNELS
            channel = place % FLAT_CHANNELS
            down = tap // KERNEL_WIDTH * dilation_height
            right = tap % KERNEL_WIDTH * dilation_width
            patch = (down * width + right) * channels + channel
            in_patch = in_rows[:, None]
            if PADDED:
                y = top[:, None] + down[None, :]
                x = left[:, None] + right[None, :]
                in_patch = in_patch & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            in_depth = place < TAPS * FLAT_CHANNELS
        else:
            tap = step // channel_steps
            channel = step % channel_steps * BLOCK_DEPTH + column
            down = tap // KERNEL_WIDTH * dilation_height
            right = tap % KERNEL_WIDTH * dilation_width
            place = tap * channels + channel
            patch = (down * width + right) * channels + channel
            in_patch = in_rows
            if PADDED:
                y = top + down
                x = left + right
                in_patch = in_patch & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            in_patch = in_patch[:, None]
            in_depth = channel < channels
        in_weight = in_filters[None, :]
        in_image = in_patch
        if not EVEN_DEPTH:
            in_image = in_patch & in_depth[None, :]
            in_weight = in_weight & in_depth[:, None]
        if DESCRIPTORS:
            image_tile = x_ptr.load([tl.cast(first_row, tl.int32), step * BLOCK_DEPTH])
            weight_tile = weight_ptr.load([first_filter, step * BLOCK_DEPTH]).T
        else:
            image_tile = tl.load(x_ptr + (corner[:, None] + patch[None, :]), mask=in_image, other=0.0)
            weight_tile = tl.load(weight_ptr + (weight_row[None, :] + place[:, None]), mask=in_weight, other=0.0)
        if mean_ptr is not None:
            norm = load_normalization(mean_ptr, invstd_ptr, bn_weight_ptr, bn_bias_ptr, channel, in_depth)
            image_tile = activate(image_tile, norm[0], norm[1], norm[2])
            if PADDED:
                image_tile = tl.where(in_patch, image_tile, 0.0).to(image_tile.dtype)
        total = tl.dot(image_tile, weight_tile, total, input_precision=PRECISION)
    return total
