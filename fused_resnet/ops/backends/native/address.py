"""Tensors as the addresses that the CPU kernels take: what could make C++ read the wrong memory is settled here."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fused_resnet.ops.backends.extension import extension


def address(tensor: Tensor | None) -> int:
    """0 for None."""
    if tensor is None:
        return 0
    found = tensor.data_ptr()
    if found == 0 and tensor.numel() > 0:  # a subclass that wraps others, which C++ would take for None
        raise TypeError(f"the native backend takes tensors with memory of their own; got {type(tensor).__name__}")
    return found


class NormVectors:
    """A ``_C.Norm`` of float32 vectors, which it keeps alive for as long as the ``with`` lasts; None without a mean."""

    def __init__(self, *vectors: Tensor | None) -> None:
        self.vectors = [as_vector(vector) for vector in vectors]

    def __enter__(self) -> Any:
        return None if self.vectors[0] is None else extension.Norm(*map(address, self.vectors))

    def __exit__(self, *exception: object) -> None:
        self.vectors.clear()


def as_vector(vector: Tensor | None) -> Tensor | None:
    """A per-channel vector as contiguous float32; itself if it is that already."""
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return vector.to(torch.float32).contiguous()


@functools.cache
def dtype_of(dtype: torch.dtype) -> Any:
    """The extension's name of it."""
    return getattr(extension.DType, str(dtype).removeprefix("torch."))
