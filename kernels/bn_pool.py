"""Batch normalisation, ReLU and max pooling as one pass, as in the stem of a ResNet.

The activation, four times larger than what pooling leaves of it, is never written. Of each maximum its place in the
window is kept, one byte where PyTorch keeps eight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.arguments import Norm, PoolSettings
from fused_resnet.kernels.bn_act import load_normalization, normalize, program_tile
from fused_resnet.kernels.channels_last import channels_last, dense_vector
from fused_resnet.kernels.device import multiprocessors
from fused_resnet.kernels.row_tiles import elementwise_tiles

# Every element reads nine pixels, or four windows, each with an address and a mask: 8 elements a thread, not 16, leave
# 128 registers each, so two programs of 256 threads on a multiprocessor.
POOL_WARPS = 8


def bn_apply_pool(x: Tensor, norm: Norm, settings: PoolSettings) -> tuple[Tensor, Tensor]:
    """(``max_pool2d(relu((x - mean) * invstd * weight + bias))``, the place of each maximum in its window).

    The activation is rounded to x's dtype before it is compared, and the first of equal ones is taken, as by PyTorch.

    Args:
        x: (N, C, H, W), channels_last; float32, float16 or bfloat16.
        norm: vectors of any float dtype.
        settings: a window has at most 256 pixels.

    Returns:
        (N, C, OH, OW) in x's dtype, and the same in uint8: row * kernel width + column. Both channels_last.

    Reads 1T (up to kernel / stride times from L2), writes 1T / stride^2 and as many bytes.
    """
    x = channels_last(x)
    batch, channels, height, width = x.shape
    out_height, out_width = settings.output_size(x.shape)
    out, place = (
        torch.empty(
            (batch, channels, out_height, out_width), dtype=dtype, device=x.device, memory_format=torch.channels_last
        )
        for dtype in (x.dtype, torch.uint8)
    )
    rows = batch * out_height * out_width
    tiles = elementwise_tiles(rows, channels, multiprocessors(x.device))
    with torch.cuda.device_of(x):
        bn_apply_pool_kernel[tiles.grid](
            x,
            *map(dense_vector, norm),
            out,
            place,
            rows,
            height,
            width,
            channels,
            out_height,
            out_width,
            tiles.chunk_rows,
            **window(settings),
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_CHANNELS=tiles.block_channels,
            num_warps=POOL_WARPS,
        )
    return out, place


def window(settings: PoolSettings) -> dict[str, int]:
    """The sizes of a pooling as the kernels' constants."""
    sizes = zip(("KERNEL", "STRIDE", "PADDING"), settings, strict=True)
    return {f"{name}_{axis}": pair[i] for name, pair in sizes for i, axis in enumerate(("HEIGHT", "WIDTH"))}


@triton.jit
def bn_apply_pool_kernel(
    x_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    place_ptr,
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
    """Every program writes its own chunk of pooled pixels and block of channels, all of it once."""
    _, first_row, own_rows, channel = program_tile(rows, channels, chunk_rows, BLOCK_ROWS, BLOCK_CHANNELS)
    in_channels = channel < channels
    mean, scale, bias = load_normalization(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, in_channels)
    lane = tl.arange(0, BLOCK_ROWS)
    for start in range(0, own_rows, BLOCK_ROWS):
        in_rows = start + lane < own_rows
        row = first_row + start + lane
        top = row // out_width % out_height * STRIDE_HEIGHT - PADDING_HEIGHT
        left = row % out_width * STRIDE_WIDTH - PADDING_WIDTH
        corner = (row // out_width // out_height * height + top) * width + left
        best = tl.full((BLOCK_ROWS, BLOCK_CHANNELS), float("-inf"), dtype=tl.float32)
        place = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.int32)
        for r in tl.static_range(KERNEL_HEIGHT):
            for s in tl.static_range(KERNEL_WIDTH):
                in_image = (top + r >= 0) & (top + r < height) & (left + s >= 0) & (left + s < width)
                inside = (in_rows & in_image)[:, None] & in_channels[None, :]
                offset = ((corner + r * width + s) * channels)[:, None] + channel[None, :]
                x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
                z = normalize(x, mean, scale, bias)
                z = tl.where(z <= 0.0, 0.0, z).to(x_ptr.dtype.element_ty).to(tl.float32)
                better = inside & ((z > best) | (z != z))
                best = tl.where(better, z, best)
                place = tl.where(better, r * KERNEL_WIDTH + s, place)
        offset = row[:, None] * channels + channel[None, :]
        inside = in_rows[:, None] & in_channels[None, :]
        tl.store(out_ptr + offset, best.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(place_ptr + offset, place.to(tl.uint8), mask=inside)
