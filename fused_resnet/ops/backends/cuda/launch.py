"""What every function of the ``cuda`` backend needs: where it runs, and tensors as the kernels take them.

Written to be called a hundred times in a step: the launch of a small kernel costs about as much as two attributes of a
tensor and an allocation (benchmarks/bench_launch.py counts them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.ops.backends.extension import extension
from fused_resnet.ops.reference import mask_shape

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
DEVICE_TYPE = "cuda"  # of the tensors that the kernels take; the tests run them on the CPU
_FLOAT32, _NHWC = torch.float32, torch.channels_last
_MOST_PLACES = 4096
_places: dict[tuple[Any, ...], Any] = {}


def kernels() -> Any:
    """``fused_resnet._C.cuda``; in the tests that run the kernels on the CPU, what they put in its place."""
    return extension.cuda


def launch(device: int | None, function: Any, *args: Any) -> None:
    """``function(*args)`` with this CUDA device the current one. PyTorch's own way back to the device before it makes
    no context there where there was none."""
    if device is None or device == torch._C._cuda_getDevice():
        function(*args)
        return
    before = torch.cuda._maybe_exchange_device(device)
    try:
        function(*args)
    finally:
        torch.cuda._maybe_exchange_device(before)


def place_of(x: Tensor) -> Any:
    """``_C.cuda.Place`` of an activation: its sizes and dtype, its device and the current stream there."""
    index = x.device.index
    key = (x.shape, x.dtype, index, current_stream(index))
    place = _places.get(key)
    if place is None:
        if len(_places) >= _MOST_PLACES:
            _places.clear()
        place = _places[key] = kernels().Place(*x.shape, dtype_of(x.dtype), index or 0, key[-1])
    return place


def current_stream(device: int | None) -> int:
    """PyTorch's current stream on a CUDA device, as a ``cudaStream_t``; 0 for the CPU, which has no number."""
    return 0 if device is None else torch._C._cuda_getCurrentRawStream(device)


def dtype_of(dtype: torch.dtype) -> Any:
    return getattr(extension.DType, _DTYPES[dtype])


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def channels_last(x: Tensor) -> Tensor:
    """x itself if it lies densely as NHWC, else a copy."""
    return x if x.is_contiguous(memory_format=_NHWC) else x.contiguous(memory_format=_NHWC)


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor in x's dtype, channels_last."""
    return channels_last(tensor if tensor.dtype == x.dtype else tensor.to(x.dtype))


def aligned(tensor: Any) -> Any:
    """The tensor, or a copy where its first element is not at a multiple of 16 bytes (a slice of another)."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()


def vector_of(vector: Tensor | None) -> Tensor | None:
    """A per-channel vector as contiguous float32; itself if it is that already."""
    if vector is None or (vector.dtype is _FLOAT32 and vector.is_contiguous()):
        return vector
    return vector.to(_FLOAT32).contiguous()


def empty_vectors(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    device = x.device
    return torch.empty(channels, dtype=_FLOAT32, device=device), torch.empty(channels, dtype=_FLOAT32, device=device)


def empty_workspace(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def empty_mask(x: Tensor) -> Tensor:
    """Of a ReLU: a row of bits for every pixel, as ``ops/reference/mask.py`` lays them out."""
    return torch.empty(mask_shape(x.shape), dtype=torch.uint8, device=x.device)


class Moved:
    """The running statistics as contiguous float32 for a kernel that moves them, themselves where they are that."""

    def __init__(self, running_mean: Tensor | None, running_var: Tensor | None) -> None:
        self.running = running_mean, running_var
        self.vectors = vector_of(running_mean), vector_of(running_var)

    def addresses(self) -> tuple[int, int]:
        return address(self.vectors[0]), address(self.vectors[1])

    def write_back(self) -> None:
        for running, moved in zip(self.running, self.vectors, strict=True):
            if running is not None and moved is not None and moved is not running:
                running.copy_(moved)
