"""Convolution, folded batch normalisation, residual add and ReLU for inference: one implicit matrix product.

kernels/patches.py says how the image is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.kernels.channels_last import channels_last, dense_vector, optional_channels_last
from fused_resnet.kernels.conv_shape import ConvShape, is_full_precision
from fused_resnet.kernels.conv_tiles import GROUP_ROWS, conv_tiles
from fused_resnet.kernels.device import multiprocessors
from fused_resnet.kernels.patches import WIDE_ELEMENTS, patch_product, program_block


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    settings: ConvSettings,
    relu: bool,
) -> Tensor:
    """``relu(conv2d(x, conv_weight, None, *settings) * scale + shift + residual)``, channels_last.

    Sums in float32. float32 data is multiplied in TF32 if ``torch.backends.cudnn.conv.fp32_precision`` says so; the
    matrix unit cuts it off there, where cuDNN rounds first. The caller has asked ``why_not_conv``.

    Args:
        x: (N, C, H, W), channels_last; float32, float16 or bfloat16.
        conv_weight: (K, C, R, S) of x's dtype; copied if not channels_last.
        scale, shift: (K,) of any float dtype, or None.
        residual: (N, K, OH, OW) of any float dtype, or None; copied if not channels_last.

    Reads the image, the weight and the residual once from memory (the image up to R*S times from L2), writes the
    output once: bytes(x) + bytes(conv_weight) + [bytes(out)] read, bytes(out) written.
    """
    x, conv_weight, residual = channels_last(x), channels_last(conv_weight), optional_channels_last(residual)
    shape = ConvShape.of(x, conv_weight, settings)
    full_precision = is_full_precision(x)
    tiles = conv_tiles(
        shape.rows,
        shape.filters,
        shape.channels,
        shape.taps,
        x.element_size(),
        multiprocessors(x.device),
        pointwise=shape.pointwise,
        full_precision=full_precision,
    )
    out = shape.empty_output(x)
    grid = (triton.cdiv(shape.rows, tiles.rows) * triton.cdiv(shape.filters, tiles.filters),)
    with torch.cuda.device_of(x):
        conv_bn_act_kernel[grid](
            x,
            conv_weight,
            dense_vector(scale),
            dense_vector(shift),
            residual,
            out,
            shape.rows,
            *shape.sizes,
            *settings.numbers,
            **shape.constants(tiles.flat),
            EVEN_DEPTH=(shape.taps * shape.channels if tiles.flat else shape.channels) % tiles.depth == 0,
            WIDE=max(x.numel(), conv_weight.numel(), out.numel()) >= WIDE_ELEMENTS,
            RELU=relu,
            PRECISION="ieee" if full_precision else "tf32",
            BLOCK_ROWS=tiles.rows,
            BLOCK_FILTERS=tiles.filters,
            BLOCK_DEPTH=tiles.depth,
            GROUP_ROWS=GROUP_ROWS,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return out


@triton.jit
def conv_bn_act_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    out_ptr,
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
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """A program owns one tile of the output and writes all of it once."""
    row_block, filter_block = program_block(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(filters, BLOCK_FILTERS), GROUP_ROWS)
    filter = filter_block * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    if WIDE:
        row_block = row_block.to(tl.int64)
        filter = filter.to(tl.int64)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < rows
    in_filters = filter < filters
    total = patch_product(
        x_ptr,
        weight_ptr,
        None,
        None,
        None,
        None,
        row_block * BLOCK_ROWS,
        filter_block * BLOCK_FILTERS,
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
        False,
    )
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + filter, mask=in_filters, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        total += tl.load(shift_ptr + filter, mask=in_filters, other=0.0).to(tl.float32)[None, :]
    offset = row[:, None] * filters + filter[None, :]
    inside = in_rows[:, None] & in_filters[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        total = tl.where(total <= 0.0, 0.0, total)  # a NaN passes, as in torch
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=inside)
