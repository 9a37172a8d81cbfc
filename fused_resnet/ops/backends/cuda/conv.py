"""Convolutions and pooling of the ``cuda`` backend, for inference (csrc/cuda/conv.cu, stem.cu, avgpool.cu)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from fused_resnet.ops.backends.cuda.launch import (
    address,
    aligned,
    channels_last,
    current_stream,
    dtype_of,
    empty_workspace,
    kernels,
    launch,
    like,
    place_of,
    vector_of,
)
from fused_resnet.ops.reference.stem import stem_output_shape

_CONV_DTYPES = (torch.float16, torch.bfloat16)


def why_not_conv(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> list[str]:
    """What ``conv_bn_act`` cannot take of x, weight and settings that fit together."""
    reasons = []
    if x.dtype not in _CONV_DTYPES:
        reasons.append(f"x is {x.dtype}; its convolution takes float16 and bfloat16")
    filters = conv_weight.shape[0]
    if x.shape[1] % 8 or filters % 8:
        reasons.append(f"there are {x.shape[1]} channels and {filters} filters; it takes multiples of 8")
    pixels = x.shape[0] * math.prod(settings.output_size(x.shape, conv_weight.shape))
    if pixels >= 2**31:
        reasons.append(f"the output would have {pixels} pixels; it takes less than 2^31")
    return reasons


def why_not_stem(
    x: Tensor,
    conv_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
) -> list[str]:
    """What ``stem`` cannot take, beyond what holds for every op."""
    reasons = []
    if conv_weight.dtype not in _CONV_DTYPES:
        reasons.append(f"conv_weight is {conv_weight.dtype}; it takes float16 and bfloat16")
    filters = conv_weight.shape[0] if conv_weight.dim() > 0 else 0
    if conv_weight.dim() != 4 or tuple(conv_weight.shape[1:]) != (3, 7, 7) or filters % 64 or filters == 0:
        reasons.append(f"conv_weight is {tuple(conv_weight.shape)}; it takes (K, 3, 7, 7), K a multiple of 64")
    if x.dim() != 4 or x.shape[1] != 3:
        reasons.append(f"x is {tuple(x.shape)}; it takes (N, 3, H, W)")
    pixels = pixel_scale is not None
    if any(vector is not None and len(vector) != 3 for vector in (pixel_scale, pixel_shift)) or (
        pixels != (pixel_shift is not None)
    ):
        reasons.append("pixel_scale and pixel_shift must be three numbers each, or both None")
    if x.dtype != (torch.uint8 if pixels else conv_weight.dtype):
        reasons.append(f"x is {x.dtype}; it takes conv_weight's dtype or, with a pixel_scale, torch.uint8")
    if conv_weight.device != x.device:
        reasons.append(f"conv_weight is on {conv_weight.device} beside x on {x.device}")
    for vector in (scale, shift):
        if vector is not None and (vector.shape != conv_weight.shape[:1] or vector.device != x.device):
            reasons.append(f"a vector is {tuple(vector.shape)} on {vector.device} beside x on {x.device}")
    return reasons


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    settings: ConvSettings,
    relu: bool,
) -> Tensor:
    x, conv_weight = aligned(channels_last(x)), aligned(channels_last(conv_weight))
    scale, shift = aligned(vector_of(scale)), aligned(vector_of(shift))
    place = place_of(x)
    shape, choice, workspace_bytes = _conv_choice(x.shape, conv_weight.shape, settings, x.device.index or 0, kernels())
    out = torch.empty(
        (x.shape[0], conv_weight.shape[0], shape.out_height, shape.out_width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    residual = None if residual is None else aligned(like(residual, out))
    workspace = empty_workspace(x, workspace_bytes) if workspace_bytes else None
    read = (x.data_ptr(), conv_weight.data_ptr(), address(scale), address(shift), address(residual))
    launch(x.device.index, kernels().conv_bn_act, place, shape, choice, *read, relu, out.data_ptr(), address(workspace))
    return out


@functools.lru_cache(maxsize=4096)
def _conv_choice(
    x_shape: torch.Size, weight_shape: torch.Size, settings: ConvSettings, device: int, _kernels: Any
) -> tuple[Any, Any, int]:
    """(shape, choice of tile and splits, bytes of workspace)."""
    place = kernels().Place(*x_shape, cuda_launch.extension.DType.float16, device, 0)
    filters, _, *kernel_size = weight_shape
    shape = kernels().ConvShape(place, filters, kernel_size, *settings[:3])
    choice = kernels().choose_conv(shape, device)
    return shape, choice, kernels().conv_workspace_bytes(shape, choice)


def stem(
    x: Tensor,
    conv_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
) -> Tensor:
    conv_weight, scale, shift = channels_last(conv_weight), vector_of(scale), vector_of(shift)
    pixels = None
    if pixel_scale is not None and pixel_shift is not None:
        pixels = kernels().PixelScale(pixel_scale, pixel_shift)
    shape, filters, index = stem_output_shape(x.shape, conv_weight.shape), conv_weight.shape[0], x.device.index
    out = torch.empty(shape, dtype=conv_weight.dtype, device=x.device, memory_format=torch.channels_last)
    place = kernels().Place(*x.shape, dtype_of(out.dtype), index or 0, current_stream(index))
    vectors = (conv_weight.data_ptr(), address(scale), address(shift))
    launch(index, kernels().stem, place, x.stride(), filters, x.data_ptr(), pixels, *vectors, out.data_ptr())
    return out


def avgpool(x: Tensor) -> Tensor:
    x = channels_last(x)
    out = torch.empty((*x.shape[:2], 1, 1), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    launch(x.device.index, kernels().avgpool, place_of(x), x.data_ptr(), out.data_ptr())
    return out
