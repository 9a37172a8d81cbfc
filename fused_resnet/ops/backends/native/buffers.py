"""Memory for the results of the CPU kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_resnet.ops.backends.extension import extension

BUFFER_BYTES = 4 << 20  # below this, malloc itself keeps what is freed


def empty_strided(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty_strided`` of a dense tensor; a large one in memory that was used before (csrc/cpu/buffers.h says
    why). On the CPU, whatever the default device is. The extension is built."""
    elements = math.prod(shape)
    if elements * dtype.itemsize < BUFFER_BYTES:
        return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
    storage = torch.frombuffer(extension.Buffer(elements * dtype.itemsize), dtype=dtype).untyped_storage()
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)
