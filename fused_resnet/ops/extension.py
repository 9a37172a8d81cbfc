"""``fused_resnet._C``, which may not be built, and memory for the results of its CPU kernels."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BUFFER_BYTES = 4 << 20  # below this, malloc itself keeps what is freed


@functools.cache
def extension() -> Any:
    """``fused_resnet._C``, or None where it was not built."""
    try:
        return importlib.import_module("fused_resnet._C")
    except ImportError:
        return None


def empty_strided(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty_strided`` of a dense tensor; a large one in memory that was used before (csrc/buffers.h says why).
    On the CPU, whatever the default device is. The extension is built."""
    elements = math.prod(shape)
    if elements * dtype.itemsize < BUFFER_BYTES:
        return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
    storage = torch.frombuffer(extension().Buffer(elements * dtype.itemsize), dtype=dtype).untyped_storage()
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)
