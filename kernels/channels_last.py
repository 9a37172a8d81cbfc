"""Tensors as the kernels see them: an activation is a row-major matrix of (N*H*W, C), a vector is dense."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT_BYTES = 16
NO_NORM = (None, None, None, None)
"""What a kernel gets for the vectors of a norm that is not there."""


def channels_last(x: Tensor) -> Tensor:
    """x itself if it lies densely as NHWC (shapes that are both NHWC and NCHW do), else a copy that does."""
    return x.contiguous(memory_format=torch.channels_last)


def optional_channels_last(x: Tensor | None) -> Tensor | None:
    """``channels_last`` of an argument that may be missing."""
    return None if x is None else channels_last(x)


def dense_vector(vector: Tensor | None) -> Tensor | None:
    """A per-channel vector with stride 1; itself if it has it."""
    return None if vector is None else vector.contiguous()


def can_describe(*tensors: Tensor) -> bool:
    """True if the (N*H*W, C) matrices of these dense channels_last tensors can have tensor descriptors: they, and every
    row of them, begin on 16 bytes, and their rows have 32-bit numbers."""
    return all(
        tensor.data_ptr() % ALIGNMENT_BYTES == 0
        and tensor.shape[1] * tensor.element_size() % ALIGNMENT_BYTES == 0
        and matrix_shape(tensor)[0] < 2**31
        for tensor in tensors
    )


def describe_rows(x: Tensor, block_rows: int, block_channels: int) -> TensorDescriptor:
    """A descriptor of the (N*H*W, C) matrix of a dense channels_last tensor, for tiles of this size."""
    rows, channels = matrix_shape(x)
    return TensorDescriptor(x, [rows, channels], [channels, 1], [block_rows, block_channels])


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """(rows, channels): (N*H*W, C)."""
    return x.numel() // x.shape[1], x.shape[1]
