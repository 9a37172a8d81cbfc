"""The ``cuda`` backend: our CUDA C++ kernels (csrc/cuda), for dense channels_last float32, float16 and bfloat16.

Same names and meaning as ``ops/reference/``, which says what each reads and writes. Tensors become addresses here,
so everything that could make a kernel read the wrong memory is settled here: layout, dtype, lifetime. Every function
runs on the device and the current stream of its first tensor, allocates from PyTorch alone and waits for nothing, so
all of them can be captured in a CUDA graph. Results are bitwise the same in every run on the same device.

Memory of a temporary may be handed out again while its kernel has not run yet: PyTorch's allocator only gives it to
what comes after on the same stream.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import Norm
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from fused_resnet.ops.backends.cuda.conv import avgpool, conv_bn_act, stem, why_not_conv, why_not_stem
from fused_resnet.ops.backends.cuda.launch import dtype_of, kernels
from fused_resnet.ops.backends.cuda.norm import (
    bn_apply,
    bn_apply_dual,
    bn_apply_dual_mask,
    bn_apply_mask,
    bn_grad_apply,
    bn_grad_apply_mask,
    bn_grad_stats,
    bn_grad_stats_mask,
    bn_stats,
    bn_stats_apply,
)

__all__ = [
    "avgpool",
    "bn_apply",
    "bn_apply_dual",
    "bn_apply_dual_mask",
    "bn_apply_mask",
    "bn_grad_apply",
    "bn_grad_apply_mask",
    "bn_grad_stats",
    "bn_grad_stats_mask",
    "bn_stats",
    "bn_stats_apply",
    "conv_bn_act",
    "fits_on_chip",
    "stem",
    "why_not_conv",
    "why_not_device",
    "why_not_stem",
    "why_unavailable",
]

_OLDEST_CAPABILITY = (8, 0)


def why_unavailable() -> list[str]:
    """The reasons why no kernel of this backend can run in this process. Asks no device anything."""
    if not hasattr(cuda_launch.extension, "cuda"):
        return [
            "fused_resnet._C was built without CUDA kernels: there was no nvcc, or they were not asked for"
            " (FUSED_RESNET_BUILD=cuda insists)"
        ]
    if cuda_launch.DEVICE_TYPE == "cpu" or torch.cuda.is_available():
        return []
    return ["no CUDA device is usable"]


def why_not_device(device: torch.device) -> list[str]:
    """The reasons why this backend cannot run on a device; of a CUDA device, after a first kernel there."""
    wanted = cuda_launch.DEVICE_TYPE
    if device.type != wanted:
        return [f"x is on {device}; it takes {wanted.upper()} tensors"]
    return list(_why_not_cuda_device(device)) if wanted == "cuda" else []


@functools.cache
def _why_not_cuda_device(device: torch.device) -> tuple[str, ...]:
    """The driver may be older than the toolkit that built the kernels, and the device than all that they were built
    for."""
    try:
        if (capability := torch.cuda.get_device_capability(device)) < _OLDEST_CAPABILITY:
            return (f"{device} has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0",)
        x, vector = torch.zeros(1, 8, 1, 1, device=device), torch.zeros(8, device=device)
        bn_apply(x, Norm(vector, vector), None, True)
    except RuntimeError as error:
        return (f"a first kernel could not be launched on {device} ({error})",)
    return ()


def fits_on_chip(x: Tensor) -> bool:
    """True if ``bn_stats_apply`` takes x: if the device's shared memory holds all of it."""
    return _fits_on_chip(x.shape, x.dtype, x.device, kernels())


@functools.lru_cache(maxsize=4096)
def _fits_on_chip(shape: torch.Size, dtype: torch.dtype, device: torch.device, _kernels: Any) -> bool:
    return kernels().fits_on_chip(kernels().Place(*shape, dtype_of(dtype), device.index or 0, 0))
