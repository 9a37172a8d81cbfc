"""Classes and memory formats: which tensors the kernels take as they lie, and how the rest are brought there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)


def are_plain(*tensors: Tensor | None) -> bool:
    """False where a subclass of Tensor is among them, which may mean anything: it takes PyTorch's own ops only."""
    return all([tensor is None or type(tensor) in PLAIN for tensor in tensors])


def is_negated(tensor: Tensor) -> bool:
    """True of a lazily negated view (``conj().imag``): other numbers lie in memory. Whoever compiles sees to it."""
    return not torch.compiler.is_compiling() and tensor.is_neg()


def resolved(tensor: Tensor) -> Tensor:
    """The tensor with its numbers in memory as they are."""
    return tensor.resolve_neg() if is_negated(tensor) else tensor


def resolved_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else resolved(tensor)


def is_channels_last(x: Tensor) -> bool:
    """True if x lies densely as NHWC (also true of shapes that are both NHWC and NCHW, such as 1x1 images)."""
    return x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """x itself if it lies densely as NHWC or NCHW; else a copy in whichever of the two is nearer."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def is_channels_last_once_dense(x: Tensor) -> bool:
    """``is_channels_last(dense(x))`` without making the copy."""
    return is_channels_last(x) or (not x.is_contiguous() and x.stride(1) == 1)


def dense_like(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` in the memory format of the dense ``x`` of the same shape; itself if it already lies so."""
    return tensor.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def conv_memory_format(x: Tensor, conv_weight: Tensor) -> torch.memory_format:
    """The memory format of conv2d's output: channels_last if the image or the weight lies so, as in torch."""
    lies_so = _strides_like_channels_last(x) or _strides_like_channels_last(conv_weight)
    return torch.channels_last if lies_so else torch.contiguous_format


def _strides_like_channels_last(x: Tensor) -> bool:
    """True if x lies as NHWC and not as NCHW, or has strides that torch's ``suggest_memory_format`` takes for NHWC:
    those of a slice, and of a 1x1 kernel from a channels_last model, which lies densely both ways."""
    if is_channels_last(x) and not x.is_contiguous():
        return True
    least = 1
    for dim in (1, 3, 2, 0):
        size, stride = x.shape[dim], x.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == x.stride(1)):
            return False
        least = stride * size
    return True
