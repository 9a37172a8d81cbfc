"""Convolutions of a training step on the CPU by our own C++: a norm and ReLU in front, and both gradients.

Weights are laid out anew in every call, since every step changes them; csrc/cpu/conv.h says which methods there are.
They are levels 1 and 2 of ``ops/route/fusion_level.py``: the norm in front is applied to what the convolution reads,
and read again by the gradient of the weight; the statistics of the norm behind are a pass of their own, and the
gradient of the output is given as it is.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_resnet.ops.backends.extension import extension
from fused_resnet.ops.backends.native.address import NormVectors, address
from fused_resnet.ops.backends.native.buffers import empty_strided
from fused_resnet.ops.backends.native.conv import (
    WORK_OF_A_THREAD,
    empty_channels_last,
    prefers_winograd,
    why_no_kernels,
)
from fused_resnet.ops.backends.native.norm import bn_stats
from fused_resnet.ops.layout import conv_output_size, is_channels_last_once_dense

DTYPE = torch.float32


def why_not_train_conv(
    x: Tensor, conv_weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> list[str]:
    """The reasons why the convolutions here cannot take these, beyond those that hold for every op on x."""
    if x.dim() != 4 or conv_weight.dim() != 4:
        return [f"x has {x.dim()} dimensions and conv_weight {conv_weight.dim()}; it takes 4 and 4"]
    if x.dtype != DTYPE or conv_weight.dtype != DTYPE:
        return [f"x is {x.dtype} and conv_weight {conv_weight.dtype}; its training convolutions take {DTYPE}"]
    if missing := why_no_kernels(DTYPE):
        return list(missing)
    if type(conv_weight) not in (Tensor, Parameter):
        return [f"conv_weight is {type(conv_weight).__name__}, a subclass of Tensor"]
    if groups != 1:
        return [f"groups is {groups}; it takes 1"]
    if conv_weight.shape[1] != x.shape[1]:
        return [f"conv_weight takes {conv_weight.shape[1]} channels; x has {x.shape[1]}"]
    if conv_weight.numel() == 0:
        return ["conv_weight is empty"]
    if conv_weight.device != x.device:
        return [f"conv_weight is on {conv_weight.device}; it takes x's device, {x.device}"]
    reasons = []
    if not is_channels_last_once_dense(x):
        reasons.append("x is not channels_last")
    sizes = [_output_size(x, conv_weight, stride, padding, dilation, i) for i in (0, 1)]
    if min(sizes) < 1:
        reasons.append(f"the output would be {sizes[0]} x {sizes[1]}; it takes at least one pixel")
    elif not _trains(_conv(conv_weight, stride, padding, dilation), "gemm", "input"):
        reasons.append(
            f"stride is {stride}, padding {padding} and dilation {dilation}; it takes a dilation where stride is 1, "
            "and padding that is less than the dilated kernel"
        )
    return reasons


def conv_stats(
    x: Tensor,
    conv_weight: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _channels_last(x)
    conv = _conv(conv_weight, stride, padding, dilation)
    height, width = (_output_size(x, conv_weight, stride, padding, dilation, i) for i in (0, 1))
    y = empty_channels_last((x.shape[0], conv_weight.shape[0], height, width), DTYPE)
    method = _method(conv, "forward", x.shape[0], height, width)
    with NormVectors(mean, invstd, weight, bias) as norm:
        extension.conv_forward(
            conv, method, _images(x, y, conv_weight), address(x), norm, *_place(conv_weight), address(y)
        )
    if not statistics:
        return y, _no_vector(), _no_vector()
    return (y, *bn_stats(y, running_mean, running_var, momentum, eps))


def conv_grad_input(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    conv_weight: Tensor,
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Without coefficients and norm (``reasons_against`` refuses them)."""
    dz = _channels_last(dz)
    residual = None if residual is None else _channels_last(residual)
    conv = _conv(conv_weight, stride, padding, dilation)
    grad = empty_channels_last(x.shape, DTYPE)
    method = _method(conv, "input", *x.shape[:1], *x.shape[2:])
    images = _images(x, dz, conv_weight)
    extension.conv_grad_input(conv, method, images, address(dz), *_place(conv_weight), address(residual), address(grad))
    return grad, _no_vector(), _no_vector()


def conv_grad_weight(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Without coefficients (``reasons_against`` refuses them)."""
    dz, x = _channels_last(dz), _channels_last(x)
    conv = _conv(conv_weight, stride, padding, dilation)
    _, channels, height, width = conv_weight.shape
    strides = (channels * height * width, 1, width * channels, channels)
    grad = empty_strided(conv_weight.shape, strides, DTYPE)
    method = _method(conv, "weight", dz.shape[0], *dz.shape[2:])
    with NormVectors(mean, invstd, weight, bias) as norm:
        images = _images(x, dz, conv_weight)
        extension.conv_grad_weight(conv, method, images, address(x), norm, address(dz), address(grad))
    return grad


def _method(conv: Any, what: str, images: int, height: int, width: int) -> Any:
    """Of the outputs of this size, the method that is likely the fastest."""
    winograd = _trains(conv, "winograd", what) and prefers_winograd(images, height, width, DTYPE)
    return getattr(extension.ConvMethod, "winograd" if winograd else "gemm")


@functools.lru_cache(maxsize=1024)
def _trains(conv: Any, method: str, what: str) -> bool:
    return extension.conv_trains(conv, getattr(extension.ConvMethod, method), what)


def _conv(conv_weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Any:
    return _conv_of(tuple(conv_weight.shape), tuple(stride), tuple(padding), tuple(dilation))


@functools.lru_cache(maxsize=1024)
def _conv_of(shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]):
    built = extension
    filters, channels, *kernel_size = shape
    return built.Conv(channels, filters, kernel_size, stride, padding, dilation, 1, built.DType.float32)


def _images(x: Tensor, out: Tensor, conv_weight: Tensor) -> tuple[int, int, int, int]:
    """images, height, width and threads."""
    images, _, height, width = x.shape
    work = out.numel() * math.prod(conv_weight.shape[1:])
    return images, height, width, min(torch.get_num_threads(), max(work // WORK_OF_A_THREAD, 1))


def _place(conv_weight: Tensor) -> tuple[int, tuple[int, ...]]:
    return address(conv_weight), conv_weight.stride()


def _output_size(
    x: Tensor, conv_weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], i: int
) -> int:
    return conv_output_size(x.shape[i + 2], conv_weight.shape[i + 2], stride[i], padding[i], dilation[i])


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _no_vector() -> Tensor:
    return torch.empty(0, dtype=torch.float32, device="cpu")
