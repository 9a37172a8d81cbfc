"""Backward of a convolution in training towards its input: the gradient of the norm behind it on the way in; on the way
out the ReLU and the two sums of the norm in front of it, or the gradient of the shortcut.

The gradient of pixel (h, w) is the sum over the taps (r, s) that reach it of dy at ((h + padding - r * dilation) /
stride, ...) times the filters under that tap. With stride 2 only a quarter of the taps reach any one pixel: which ones
depends on the parity of h and w alone. So the pixels are taken in stride_height * stride_width phases, each a dense
matrix product over the taps of its own, and nothing is multiplied by the zeros between strided pixels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.arguments import ConvSettings, Norm
from fused_resnet.kernels.bn_act import load_normalization, normalize
from fused_resnet.kernels.bn_act_grad import relu_grad
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
from fused_resnet.kernels.conv_tiles import GROUP_ROWS
from fused_resnet.kernels.device import chip_of
from fused_resnet.kernels.patches import WIDE_ELEMENTS, program_block
from fused_resnet.kernels.training_tiles import Product, aligned, training_tiles
from fused_resnet.kernels.welford import finalize_sums


def conv_grad_input(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    conv_weight: Tensor,
    x: Tensor,
    norm: Norm | None,
    residual: Tensor | None,
    settings: ConvSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, sum of it, sum of it * xhat), the last two of each channel and in float32.

    ``dy = A * dz + B * (y - mean_y) + C`` with the rows A, B, C, mean_y of ``coefficients``; ``A * dz`` without y; dz
    without coefficients. The gradient of conv2d's input for dy, plus ``residual``, is masked where the recomputed
    ``xhat * weight + bias`` is <= 0 if a ``norm`` is given; else x says the shape only, and the sums are empty.

    Args:
        dz, y: (N, K, OH, OW), x's dtype; copied if not channels_last.
        coefficients: (4, K) float32.
        conv_weight: (K, C, R, S) of x's dtype; copied if not channels_last.
        x: (N, C, H, W), channels_last; float32, float16 or bfloat16.
        norm: vectors of any float dtype.
        residual: x's shape and dtype, or None.

    Reads bytes(dz) [+ bytes(y)] + bytes(conv_weight) [+ bytes(x)] [+ bytes(residual)], dz and y up to R*S times from
    L2; writes bytes(x), and 8*P*C bytes of P partial sums, which a second launch adds in a fixed order.
    """
    x, conv_weight, dz = channels_last(x), channels_last(conv_weight), channels_last(dz)
    shape = ConvShape.of(x, conv_weight, settings)
    stride, padding, dilation, _ = settings
    full_precision = is_full_precision(x)
    operands, epilogue = 1 if y is None else 2, (norm is not None) + (residual is not None)
    product = grad_input_product(shape, x.element_size(), stride, operands, epilogue)
    phases = product.phases
    chip = chip_of(x.device)
    tiles = training_tiles(product, x.element_size(), chip, full_precision=full_precision)
    y = optional_channels_last(y)
    descriptors = chip.tma and shape.pointwise and can_describe(dz, conv_weight, dz if y is None else y)
    grad = torch.empty_like(x)
    chunks = triton.cdiv(product.rows, tiles.rows * tiles.row_tiles)
    partial_sums = None
    if norm is not None:
        partial_sums = torch.empty((2, phases * chunks, shape.channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        conv_grad_input_kernel[(chunks * triton.cdiv(shape.channels, tiles.columns), phases)](
            describe_rows(dz, tiles.rows, tiles.depth) if descriptors else dz,
            describe_rows(y, tiles.rows, tiles.depth) if descriptors and y is not None else y,
            dense_vector(coefficients),
            describe_rows(conv_weight, tiles.depth, tiles.columns) if descriptors else conv_weight,
            None if norm is None else x,
            *map(dense_vector, norm or NO_NORM),
            optional_channels_last(residual),
            grad,
            partial_sums,
            shape.batch,
            *shape.sizes,
            *padding,
            chunks,
            tiles.row_tiles,
            KERNEL_HEIGHT=shape.kernel_height,
            KERNEL_WIDTH=shape.kernel_width,
            STRIDE_HEIGHT=stride[0],
            STRIDE_WIDTH=stride[1],
            DILATION_HEIGHT=dilation[0],
            DILATION_WIDTH=dilation[1],
            # The taps of a phase are so far apart, and dy's pixels under them so far.
            TAP_STEP_HEIGHT=stride[0] // math.gcd(stride[0], dilation[0]),
            TAP_STEP_WIDTH=stride[1] // math.gcd(stride[1], dilation[1]),
            POINTWISE=shape.pointwise,
            PADDED=shape.taps > 1 or shape.padded,
            EVEN_DEPTH=shape.filters % tiles.depth == 0,
            WIDE=max(x.numel(), conv_weight.numel(), dz.numel()) >= WIDE_ELEMENTS,
            PRECISION="ieee" if full_precision else "tf32",
            BLOCK_ROWS=tiles.rows,
            BLOCK_CHANNELS=tiles.columns,
            BLOCK_DEPTH=tiles.depth,
            GROUP_ROWS=GROUP_ROWS,
            DESCRIPTORS=descriptors,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    if partial_sums is None:
        nothing = torch.empty(0, dtype=torch.float32, device=x.device)
        return grad, nothing, nothing.clone()
    sum_dz, sum_dz_xhat = finalize_sums(partial_sums).unbind()
    return grad, sum_dz, sum_dz_xhat


def grad_input_product(
    shape: ConvShape, element_bytes: int, stride: tuple[int, int], operands: int, epilogue: int
) -> Product:
    """``operands``: 2 with y, else 1; ``epilogue``: how many of x and the residual are read at the end."""
    phases = stride[0] * stride[1]
    return Product(
        rows=shape.batch * triton.cdiv(shape.height, stride[0]) * triton.cdiv(shape.width, stride[1]),
        columns=shape.channels,
        taps=shape.taps / phases,
        channels=shape.filters,
        row_operands=operands,
        epilogue=1 + epilogue,
        phases=phases,
        aligned=aligned(element_bytes, shape.channels, shape.filters),
        sums=32,
    )


@triton.jit
def first_tap(phase, padding, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """The first tap that reaches a pixel of this phase along one axis; KERNEL if none does."""
    first = tl.full((), KERNEL, dtype=tl.int32)
    for i in tl.static_range(KERNEL):
        reached = (phase + padding - (KERNEL - 1 - i) * DILATION) % STRIDE == 0
        first = tl.where(reached, KERNEL - 1 - i, first)
    return first


@triton.jit
def add_to_partial(partial_ptr, more, inside, begun):
    """Adds the sums of a program's tile to those of its tiles before, which wait in memory (in L2): in registers they
    would be held through the main loop, by every thread that has a part of the column."""
    tl.store(partial_ptr, more + tl.load(partial_ptr, mask=inside & begun, other=0.0), mask=inside)


@triton.jit
def conv_grad_input_kernel(
    dz_ptr,
    y_ptr,
    coefficients_ptr,
    weight_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    residual_ptr,
    grad_ptr,
    partial_sums_ptr,
    batch,
    height,
    width,
    channels,
    out_height,
    out_width,
    filters,
    padding_height,
    padding_width,
    chunks,
    row_tiles,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    TAP_STEP_HEIGHT: tl.constexpr,
    TAP_STEP_WIDTH: tl.constexpr,
    POINTWISE: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """A program owns a chunk of ``row_tiles`` consecutive tiles of one phase's pixels under one block of channels: it
    writes that part of the gradient once, and row (phase, chunk) of both matrices of partial sums, added in order.

    PADDED: a tap may lie outside dy. DESCRIPTORS: dz_ptr, y_ptr and weight_ptr are tensor descriptors of the matrices
    (rows, filters) and (filters, channels) of a pointwise convolution. Chunks past a phase's last pixel leave sums of
    0. Reads outside give 0.
    """
    STEP_HEIGHT: tl.constexpr = TAP_STEP_HEIGHT * DILATION_HEIGHT // STRIDE_HEIGHT
    STEP_WIDTH: tl.constexpr = TAP_STEP_WIDTH * DILATION_WIDTH // STRIDE_WIDTH
    phase = tl.program_id(1)
    phase_y = phase // STRIDE_WIDTH
    phase_x = phase % STRIDE_WIDTH
    first_r = first_tap(phase_y, padding_height, KERNEL_HEIGHT, STRIDE_HEIGHT, DILATION_HEIGHT)
    first_s = first_tap(phase_x, padding_width, KERNEL_WIDTH, STRIDE_WIDTH, DILATION_WIDTH)
    taps_y = tl.cdiv(KERNEL_HEIGHT - first_r, TAP_STEP_HEIGHT)
    taps_x = tl.cdiv(KERNEL_WIDTH - first_s, TAP_STEP_WIDTH)
    # Pixel (phase_y + i * STRIDE, ...) sees dy's pixel (base_y + i, ...) under its first tap: an exact division.
    base_y = (phase_y + padding_height - first_r * DILATION_HEIGHT) // STRIDE_HEIGHT
    base_x = (phase_x + padding_width - first_s * DILATION_WIDTH) // STRIDE_WIDTH
    grid_height = tl.cdiv(height - phase_y, STRIDE_HEIGHT)
    grid_width = tl.maximum(tl.cdiv(width - phase_x, STRIDE_WIDTH), 1)
    rows = batch * tl.maximum(grid_height, 0) * grid_width
    if STRIDE_WIDTH > 1:
        rows = tl.where(phase_x < width, rows, 0)

    chunk, channel_block = program_block(chunks, tl.cdiv(channels, BLOCK_CHANNELS), GROUP_ROWS)
    partial_row = (phase * chunks + chunk).to(tl.int64) * channels
    partial_row2 = ((tl.num_programs(1) + phase) * chunks + chunk).to(tl.int64) * channels
    first_tile = chunk * row_tiles
    column = tl.arange(0, BLOCK_DEPTH)
    if WIDE:
        first_tile = first_tile.to(tl.int64)
        column = column.to(tl.int64)
        rows = rows.to(tl.int64)
    depth_steps = tl.cdiv(filters, BLOCK_DEPTH)
    steps = taps_y * taps_x * depth_steps
    for tile in range(0, row_tiles):
        # tile // row_tiles is 0, which the compiler cannot know: it would compute all that depends on the channels
        # alone before this loop, and hold it in registers that the main loop needs.
        first_channel = (channel_block + tile // row_tiles) * BLOCK_CHANNELS
        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
        in_channels = channel < channels
        row_tile = first_tile + tile
        if WIDE:
            channel = channel.to(tl.int64)
        row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = row < rows
        if POINTWISE:
            pixel = row
            corner = row * filters
        else:
            i = row // grid_width % tl.maximum(grid_height, 1)
            j = row % grid_width
            image = row // grid_width // tl.maximum(grid_height, 1)
            pixel = (image * height + phase_y + i * STRIDE_HEIGHT) * width + phase_x + j * STRIDE_WIDTH
            top = base_y + i
            left = base_x + j
            corner = ((image * out_height + top) * out_width + left) * filters
        total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
        for step in range(0, steps):
            tap = step // depth_steps
            filter = step % depth_steps * BLOCK_DEPTH + column
            tap_y = tap // taps_x
            tap_x = tap % taps_x
            up = tap_y * STEP_HEIGHT
            over = tap_x * STEP_WIDTH
            patch = filter - (up * out_width + over) * filters
            place = ((first_r + tap_y * TAP_STEP_HEIGHT) * KERNEL_WIDTH + first_s + tap_x * TAP_STEP_WIDTH) * channels
            in_patch = in_rows
            if PADDED:
                in_patch = in_patch & (top >= up) & (top - up < out_height) & (left >= over) & (left - over < out_width)
            in_patch = in_patch[:, None]
            in_filters = filter < filters
            in_weight = in_channels[None, :]
            in_dy = in_patch
            if not EVEN_DEPTH:
                in_dy = in_patch & in_filters[None, :]
                in_weight = in_weight & in_filters[:, None]
            offset = corner[:, None] + patch[None, :]
            if DESCRIPTORS:
                dy = dz_ptr.load([tl.cast(row_tile * BLOCK_ROWS, tl.int32), step * BLOCK_DEPTH])
                weight_tile = weight_ptr.load([step * BLOCK_DEPTH, first_channel])
            else:
                dy = tl.load(dz_ptr + offset, mask=in_dy, other=0.0)
                weight_row = filter * (KERNEL_HEIGHT * KERNEL_WIDTH * channels) + place
                weight_tile = tl.load(weight_ptr + (weight_row[:, None] + channel[None, :]), mask=in_weight, other=0.0)
            if coefficients_ptr is not None:
                if y_ptr is not None:
                    y = (
                        y_ptr.load([tl.cast(row_tile * BLOCK_ROWS, tl.int32), step * BLOCK_DEPTH])
                        if DESCRIPTORS
                        else tl.load(y_ptr + offset, mask=in_dy, other=0.0)
                    )
                    abc = load_coefficients(coefficients_ptr, filters, filter, in_filters)
                    dy = output_grad(dy, y, abc[0], abc[1], abc[2], abc[3])
                    if PADDED:
                        dy = tl.where(in_patch, dy, 0.0).to(weight_tile.dtype)
                else:
                    slope = tl.load(coefficients_ptr + filter, mask=in_filters, other=0.0)
                    dy = (dy.to(tl.float32) * slope[None, :]).to(weight_tile.dtype)
            total = tl.dot(dy, weight_tile, total, input_precision=PRECISION)

        offset = pixel[:, None] * channels + channel[None, :]
        inside = in_rows[:, None] & in_channels[None, :]
        if residual_ptr is not None:
            total += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            norm = load_normalization(mean_ptr, invstd_ptr, bn_weight_ptr, bn_bias_ptr, channel, in_channels)
            x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            total = relu_grad(total, normalize(x, norm[0], norm[1], norm[2]))
            grad = total.to(grad_ptr.dtype.element_ty)
            written = tl.where(inside, grad.to(tl.float32), 0.0)
            sum_dz = tl.sum(written, axis=0)
            sum_dz_distance = tl.sum(written * (x - norm[0][None, :]), axis=0)
            invstd = tl.load(invstd_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
            add_to_partial(partial_sums_ptr + partial_row + channel, sum_dz, in_channels, row_tile > first_tile)
            add_to_partial(
                partial_sums_ptr + partial_row2 + channel, sum_dz_distance * invstd, in_channels, row_tile > first_tile
            )
            tl.debug_barrier()  # the next tile's sums are added by other threads of this program
        else:
            grad = total.to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + offset, grad, mask=inside)
