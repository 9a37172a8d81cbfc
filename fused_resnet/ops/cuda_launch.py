"""What every function of the ``cuda`` backend needs: where it runs, and tensors as the kernels take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from fused_resnet import _C as extension  # type: ignore[attr-defined]
except ImportError:  # ops/reasons.py says so
    extension = None

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def kernels() -> Any:
    """``fused_resnet._C.cuda``; in the tests that run the kernels on the CPU, what they put in its place."""
    return extension.cuda


def executed_on_host() -> bool:
    """True in the tests that run the kernels on the CPU, on CPU tensors."""
    return kernels().EXECUTED_ON_HOST


class Moved:
    """The running statistics as contiguous float32 for a kernel that moves them, themselves where they are that."""

    def __init__(self, *running: Tensor | None) -> None:
        self.running = running
        self.vectors = [vector_of(vector) for vector in running]

    def write_back(self) -> None:
        for running, moved in zip(self.running, self.vectors, strict=True):
            if running is not None and moved is not None and moved is not running:
                running.copy_(moved)


def channels_last(x: Tensor) -> Tensor:
    """x itself if it lies densely as NHWC, else a copy."""
    return x.contiguous(memory_format=torch.channels_last)


def dtype_of(dtype: torch.dtype) -> Any:
    return getattr(extension.DType, _DTYPES[dtype])


def stream_of(x: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0


def place_of(x: Tensor) -> Any:
    return kernels().Place(*x.shape, dtype_of(x.dtype), x.device.index or 0, stream_of(x))


def norm_of(vectors: list[Tensor | None]) -> Any:
    """``_C.Norm`` of vectors that the caller keeps alive."""
    return extension.Norm(*addresses(*vectors))


def addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def vector_of(vector: Tensor | None) -> Tensor | None:
    """A per-channel vector as contiguous float32; itself if it is that already."""
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return vector.to(torch.float32).contiguous()


def empty_vector(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=torch.float32, device=x.device)


def empty_workspace(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def empty_mask(x: Tensor) -> Tensor:
    """Of a ReLU: a row of bits for every pixel, as ``ops/reference_mask.py`` lays them out."""
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    return torch.empty((rows, kernels().mask_stride(x.shape[1])), dtype=torch.uint8, device=x.device)


def like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else channels_last(tensor.to(x.dtype))
