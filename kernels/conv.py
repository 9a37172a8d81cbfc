"""Convolution, folded batch normalisation, residual add and ReLU for inference: one implicit matrix product.

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

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.kernels.channels_last import channels_last, dense_vector, optional_channels_last
from fused_resnet.kernels.conv_tiles import GROUP_ROWS, conv_tiles
from fused_resnet.kernels.device import INTERPRETED, multiprocessors

WIDE_ELEMENTS = 2**30  # tensors of so many have 64-bit offsets; not 2**31, as masked lanes count past the end
OLDEST_CAPABILITY = (8, 0)  # bfloat16 and TF32 matrix instructions, cp.async


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """``relu(conv2d(x, conv_weight, None, stride, padding, dilation) * scale + shift + residual)``, channels_last.

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
    batch, channels, height, width = x.shape
    filters, _, kernel_height, kernel_width = conv_weight.shape
    out_height, out_width = _output_size(x, conv_weight, stride, padding, dilation)
    rows, taps = batch * out_height * out_width, kernel_height * kernel_width
    full_precision = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]
    pointwise = taps == 1 and (*stride, *padding) == (1, 1, 0, 0)
    tiles = conv_tiles(
        rows,
        filters,
        channels,
        taps,
        x.element_size(),
        multiprocessors(x.device),
        pointwise=pointwise,
        full_precision=full_precision,
    )
    x, conv_weight, residual = channels_last(x), channels_last(conv_weight), optional_channels_last(residual)
    shape = (batch, filters, out_height, out_width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(filters, tiles.filters),)
    with torch.cuda.device_of(x):
        conv_bn_act_kernel[grid](
            x,
            conv_weight,
            dense_vector(scale),
            dense_vector(shift),
            residual,
            out,
            rows,
            height,
            width,
            channels,
            out_height,
            out_width,
            filters,
            *stride,
            *padding,
            *dilation,
            KERNEL_WIDTH=kernel_width,
            TAPS=taps,
            FLAT_CHANNELS=channels if tiles.flat else 0,
            POINTWISE=pointwise,
            PADDED=padding[0] + padding[1] > 0,
            EVEN_DEPTH=(taps * channels if tiles.flat else channels) % tiles.depth == 0,
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


def why_not_conv(
    x: Tensor,
    conv_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> list[str]:
    """The reasons why ``conv_bn_act`` cannot take these arguments, beyond those that hold for every op on x."""
    if x.dim() != 4 or conv_weight.dim() != 4:
        return [f"x has {x.dim()} dimensions and conv_weight {conv_weight.dim()}; it takes 4 and 4"]
    reasons = []
    if groups != 1:
        reasons.append(f"groups is {groups}; it takes 1")
    elif conv_weight.shape[1] != x.shape[1]:
        reasons.append(f"conv_weight takes {conv_weight.shape[1]} channels; x has {x.shape[1]}")
    if conv_weight.numel() == 0:
        reasons.append("conv_weight is empty")
    if conv_weight.dtype != x.dtype:
        reasons.append(f"conv_weight is {conv_weight.dtype}; it takes x's dtype, {x.dtype}")
    out_height, out_width = _output_size(x, conv_weight, stride, padding, dilation)
    if min(out_height, out_width) < 1:
        reasons.append(f"the output would be {out_height} x {out_width}; it takes at least one pixel")
    filters = conv_weight.shape[0]
    expected = {"conv_weight": conv_weight.shape, "scale": (filters,), "shift": (filters,)}
    expected["residual"] = (x.shape[0], filters, out_height, out_width)
    for name, tensor in (("conv_weight", conv_weight), ("scale", scale), ("shift", shift), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            reasons.append(f"{name} is on {tensor.device}; it takes x's device, {x.device}")
        if tensor.shape != expected[name]:
            reasons.append(f"{name} is {tuple(tensor.shape)}; it takes {tuple(expected[name])}")
    if out_height * out_width > 1 and filters > 1 and not (_clearly_nhwc(x) or _clearly_nhwc(conv_weight)):
        reasons.append("conv2d's output would not be channels_last, as neither x nor conv_weight clearly lies so")
    if INTERPRETED and x.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < OLDEST_CAPABILITY:
        reasons.append(f"the GPU is older than compute capability {'.'.join(map(str, OLDEST_CAPABILITY))}")
    return reasons


def _output_size(
    x: Tensor, conv_weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, int]:
    height, width = (
        (x.shape[axis + 2] + 2 * padding[axis] - dilation[axis] * (conv_weight.shape[axis + 2] - 1) - 1) // stride[axis]
        + 1
        for axis in (0, 1)
    )
    return height, width


def _clearly_nhwc(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


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
    """A program owns one tile of the output and writes all of it once. It adds the depth in order, in float32.

    FLAT_CHANNELS is the channel count if the depth is walked flat, else 0. EVEN_DEPTH: no step reaches past its
    channels. WIDE: offsets and row numbers are 64-bit. Reads outside the image, the channels or the filters give 0.
    """
    row_block, filter_block = program_block(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(filters, BLOCK_FILTERS), GROUP_ROWS)
    filter = filter_block * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    column = tl.arange(0, BLOCK_DEPTH)
    if WIDE:
        row_block = row_block.to(tl.int64)
        filter = filter.to(tl.int64)
        column = column.to(tl.int64)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
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
            down = tap // KERNEL_WIDTH * dilation_height
            right = tap % KERNEL_WIDTH * dilation_width
            patch = (down * width + right) * channels + place % FLAT_CHANNELS
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
        if not EVEN_DEPTH:
            in_patch = in_patch & in_depth[None, :]
            in_weight = in_weight & in_depth[:, None]
        image_tile = tl.load(x_ptr + (corner[:, None] + patch[None, :]), mask=in_patch, other=0.0)
        weight_tile = tl.load(weight_ptr + (weight_row[None, :] + place[:, None]), mask=in_weight, other=0.0)
        total = tl.dot(image_tile, weight_tile, total, input_precision=PRECISION)

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
