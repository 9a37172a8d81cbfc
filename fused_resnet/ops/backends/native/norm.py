"""The ``native`` backend's passes over an activation, as it lies in memory: NHWC or NCHW."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import Norm, RunningStatistics, Sums
from fused_resnet.ops.backends.extension import extension
from fused_resnet.ops.backends.native.memory import LARGE, storage_of
from fused_resnet.ops.layout import dense, dense_like

_ELEMENTS_PER_THREAD = 16 * 1024  # with fewer a second thread gains nothing, and on a busy machine it is waited for
_FLOAT32, _NHWC, _CPU = torch.float32, torch.channels_last, torch.device("cpu")


def bn_stats(x: Tensor, running: RunningStatistics) -> tuple[Tensor, Tensor]:
    x, shape = _activation(x)
    mean, invstd = _two_vectors(x)
    running_mean, running_var, momentum, eps = running
    moved_mean, moved_var = vectors_of((running_mean, running_var))
    extension.bn_stats(shape, x, mean, invstd, moved_mean, moved_var, momentum, eps)
    if moved_mean is not running_mean or moved_var is not running_var:
        for vector, moved in ((running_mean, moved_mean), (running_var, moved_var)):
            if vector is not None and moved is not None:
                vector.copy_(moved)
    return mean, invstd


def bn_apply(x: Tensor, norm: Norm, residual: Tensor | None, relu: bool) -> Tensor:
    x, shape = _activation(x)
    residual = None if residual is None else _like(residual, x)
    out = empty_strided(x.shape, x.stride(), x.dtype)
    extension.bn_apply(shape, x, vectors_of(norm), residual, relu, out)
    return out


def bn_apply_dual(x: Tensor, norm: Norm, x2: Tensor, norm2: Norm, relu: bool) -> Tensor:
    x, shape = _activation(x)
    x2 = _like(x2, x)
    out = empty_strided(x.shape, x.stride(), x.dtype)
    extension.bn_apply_dual(shape, x, vectors_of(norm), x2, vectors_of(norm2), relu, out)
    return out


def bn_grad_stats(
    grad_out: Tensor, x: Tensor, out: Tensor | None, norm: Norm, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, shape = _activation(x)
    grad_out, dz = _like(grad_out, x), None
    if out is not None:
        out, dz = _like(out, x), empty_strided(x.shape, x.stride(), x.dtype)
        if not relu:
            dz.copy_(grad_out)
    sum_dz, sum_dz_xhat = _two_vectors(x)
    extension.bn_grad_stats(shape, grad_out, x, out, dz, vectors_of(norm), relu, sum_dz, sum_dz_xhat)
    return sum_dz, sum_dz_xhat, x.new_empty(0) if dz is None else dz


def bn_grad_apply(grad_out: Tensor, x: Tensor, norm: Norm, sums: Sums | None, relu: bool) -> Tensor:
    x, shape = _activation(x)
    grad_out, grad_x = _like(grad_out, x), empty_strided(x.shape, x.stride(), x.dtype)
    sum_dz, sum_dz_xhat = (None, None) if sums is None else vectors_of(sums)
    extension.bn_grad_apply(shape, grad_out, x, vectors_of(norm), sum_dz, sum_dz_xhat, relu, grad_x)
    return grad_x


def _activation(x: Tensor) -> tuple[Tensor, Any]:
    """x, dense, and its ``_C.Activation``."""
    channels_last = x.is_contiguous(memory_format=_NHWC)
    if not channels_last and not x.is_contiguous():
        x = dense(x)
        channels_last = x.is_contiguous(memory_format=_NHWC)
    threads = min(torch.get_num_threads(), max(x.numel() // _ELEMENTS_PER_THREAD, 1))
    return x, _described(x.shape, channels_last, x.dtype, threads)


@functools.lru_cache(maxsize=1024)
def _described(shape: torch.Size, channels_last: bool, dtype: torch.dtype, threads: int) -> Any:
    images, channels, height, width = shape
    return extension.Activation(images, channels, height * width, channels_last, dtype_of(dtype), threads)


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor in the dtype and memory format of the dense x."""
    if tensor.dtype is x.dtype and tensor.stride() == x.stride():
        return tensor
    return dense_like(tensor.to(x.dtype), x)


def _two_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return (
        torch.empty(channels, dtype=_FLOAT32, device=_CPU),
        torch.empty(channels, dtype=_FLOAT32, device=_CPU),
    )


def vectors_of(vectors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Per-channel vectors as contiguous float32; the tuple itself where they are that already."""
    for vector in vectors:
        if vector is not None and (vector.dtype is not _FLOAT32 or not vector.is_contiguous()):
            return tuple(None if each is None else each.to(_FLOAT32).contiguous() for each in vectors)
    return vectors


def empty_strided(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty_strided`` of a dense tensor, a large one perhaps in memory that was used before (``memory.py``); on
    the CPU, whatever the default device is. The extension is built."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE:
        return torch.empty_strided(shape, stride, dtype=dtype, device=_CPU)
    return torch.empty(0, dtype=dtype, device=_CPU).set_(storage_of(nbytes), 0, shape, stride)


@functools.cache
def dtype_of(dtype: torch.dtype) -> Any:
    """The extension's name of it."""
    return getattr(extension.DType, str(dtype).removeprefix("torch."))
