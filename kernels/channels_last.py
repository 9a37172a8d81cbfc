"""Tensors as the kernels see them: an activation is a row-major matrix of (N*H*W, C), a vector is dense."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """x itself if it lies densely as NHWC (shapes that are both NHWC and NCHW do), else a copy that does."""
    return x.contiguous(memory_format=torch.channels_last)


def optional_channels_last(x: Tensor | None) -> Tensor | None:
    """``channels_last`` of an argument that may be missing."""
    return None if x is None else channels_last(x)


def dense_vector(vector: Tensor | None) -> Tensor | None:
    """A per-channel vector with stride 1; itself if it has it."""
    return None if vector is None else vector.contiguous()


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """(rows, channels): (N*H*W, C)."""
    return x.numel() // x.shape[1], x.shape[1]
