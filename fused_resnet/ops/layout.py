"""Memory formats: which tensors the kernels take as they lie, and how the rest are brought there."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """True if x lies densely as NHWC (also true of shapes that are both NHWC and NCHW, such as 1x1 images)."""
    return x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """x itself if it lies densely as NHWC or NCHW; else a copy in whichever of the two is nearer."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def dense_like(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` in the memory format of the dense ``x`` of the same shape; itself if it already lies so."""
    return tensor.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def conv_memory_format(x: Tensor, conv_weight: Tensor) -> torch.memory_format:
    """The memory format of conv2d's output: channels_last if the image or the weight clearly lies so, as in torch."""
    for tensor in (x, conv_weight):
        if is_channels_last(tensor) and not tensor.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format
