"""Convolutions of a training step on the CPU by our own C++: a norm and ReLU before, and both gradients.

Weights are laid out anew in every call, since every step changes them; csrc/cpu/conv.h says which methods there are.
They are levels 1 and 2 of ``ops/route/fusion_level.py``: the norm before is applied to what the convolution reads, and
read again by the gradient of the weight; the statistics of the norm after are a pass of their own, and the gradient of
the output is given as it is.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings, Norm, RunningStatistics
from fused_resnet.ops.backends.extension import extension
from fused_resnet.ops.backends.native.conv import WORK_OF_A_THREAD, prefers_winograd, why_no_kernels
from fused_resnet.ops.backends.native.norm import bn_stats, empty_strided, vectors_of
from fused_resnet.ops.layout import PLAIN, is_channels_last_once_dense

DTYPE = torch.float32
_NHWC = torch.channels_last


def why_not_conv(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> list[str]:
    """The reasons why the convolutions here cannot take x, weight and settings that fit together, beyond those that
    hold for every op on x."""
    if x.dtype != DTYPE:
        return [f"x is {x.dtype}; its training convolutions take {DTYPE}"]
    if missing := why_no_kernels(DTYPE):
        return list(missing)
    if type(conv_weight) not in PLAIN:
        return [f"conv_weight is {type(conv_weight).__name__}, a subclass of Tensor"]
    reasons = []
    if not is_channels_last_once_dense(x):
        reasons.append("x is not channels_last")
    if not _takes(_conv(conv_weight.shape, settings), "gemm", "input"):
        stride, padding, dilation, _ = settings
        reasons.append(
            f"stride is {stride}, padding {padding} and dilation {dilation}; it takes a dilation where stride is 1, "
            "and padding that is less than the dilated kernel"
        )
    return reasons


class NativeConvolution:
    """A convolution without groups and its gradients, on inputs of one shape; float32, the threads that there are now.

    Args:
        x_shape: (N, C, H, W).
        weight_shape: (K, C, R, S).
    """

    __slots__ = ("_built", "_grad_weight_strides", "_shape", "_strides", "_weight_shape", "_x_shape", "_x_strides")

    def __init__(self, x_shape: torch.Size, weight_shape: torch.Size, settings: ConvSettings) -> None:
        images, _, height, width = x_shape
        size = settings.output_size(x_shape, weight_shape)
        self._x_shape, self._x_strides = x_shape, _nhwc_strides(x_shape)
        self._shape = torch.Size((images, weight_shape[0], *size))
        self._strides = _nhwc_strides(self._shape)
        self._weight_shape, self._grad_weight_strides = weight_shape, _nhwc_strides(weight_shape)
        conv = _conv(weight_shape, settings)
        work = math.prod(self._shape) * math.prod(weight_shape[1:])
        threads = min(torch.get_num_threads(), max(work // WORK_OF_A_THREAD, 1))
        methods = (
            _method(conv, "forward", images, *size),
            _method(conv, "input", images, height, width),
            _method(conv, "weight", images, *size),
        )
        self._built = extension.TrainingConv(conv, images, height, width, threads, *methods)

    def forward(self, x: Tensor, conv_weight: Tensor, norm: Norm | None) -> Tensor:
        """The convolution of x or, with a ``norm``, of what it and a ReLU make of x."""
        if not x.is_contiguous(memory_format=_NHWC):
            x = x.contiguous(memory_format=_NHWC)
        y = empty_strided(self._shape, self._strides, DTYPE)
        self._built.forward(x, None if norm is None else vectors_of(norm), conv_weight, conv_weight.stride(), y)
        return y

    def grad_input(self, dy: Tensor, conv_weight: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        """The gradient of what was convolved, in x's shape, plus ``residual``."""
        if not dy.is_contiguous(memory_format=_NHWC):
            dy = dy.contiguous(memory_format=_NHWC)
        if residual is not None and not residual.is_contiguous(memory_format=_NHWC):
            residual = residual.contiguous(memory_format=_NHWC)
        grad = empty_strided(self._x_shape, self._x_strides, DTYPE)
        self._built.grad_input(dy, conv_weight, conv_weight.stride(), residual, grad)
        return grad

    def grad_weight(self, dy: Tensor, conv_weight: Tensor, x: Tensor, norm: Norm | None) -> Tensor:
        """x and ``norm`` as of `forward`."""
        if not dy.is_contiguous(memory_format=_NHWC):
            dy = dy.contiguous(memory_format=_NHWC)
        if not x.is_contiguous(memory_format=_NHWC):
            x = x.contiguous(memory_format=_NHWC)
        grad = empty_strided(self._weight_shape, self._grad_weight_strides, DTYPE)
        self._built.grad_weight(x, None if norm is None else vectors_of(norm), dy, grad)
        return grad


def conv_stats(
    x: Tensor,
    conv_weight: Tensor,
    norm: Norm | None,
    running: RunningStatistics,
    settings: ConvSettings,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = NativeConvolution(x.shape, conv_weight.shape, settings).forward(x, conv_weight, norm)
    if not statistics:
        return y, _no_vector(), _no_vector()
    return (y, *bn_stats(y, running))


def conv_grad_input(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    conv_weight: Tensor,
    x: Tensor,
    norm: Norm | None,
    residual: Tensor | None,
    settings: ConvSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Without coefficients and norm (``reasons_against`` refuses them)."""
    convolution = NativeConvolution(x.shape, conv_weight.shape, settings)
    return convolution.grad_input(dz, conv_weight, x, residual), _no_vector(), _no_vector()


def conv_grad_weight(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Norm | None,
    conv_weight: Tensor,
    settings: ConvSettings,
) -> Tensor:
    """Without coefficients (``reasons_against`` refuses them)."""
    return NativeConvolution(x.shape, conv_weight.shape, settings).grad_weight(dz, conv_weight, x, norm)


def _method(conv: Any, what: str, images: int, height: int, width: int) -> Any:
    """Of the outputs of this size, the method that is likely the fastest."""
    winograd = _takes(conv, "winograd", what) and prefers_winograd(images, height, width, DTYPE)
    return getattr(extension.ConvMethod, "winograd" if winograd else "gemm")


def _takes(conv: Any, method: str, what: str) -> bool:
    return extension.conv_trains(conv, getattr(extension.ConvMethod, method), what)


@functools.lru_cache(maxsize=1024)
def _conv(weight_shape: torch.Size, settings: ConvSettings) -> Any:
    filters, channels, *kernel_size = weight_shape
    stride, padding, dilation, _ = settings
    return extension.Conv(channels, filters, kernel_size, stride, padding, dilation, 1, extension.DType.float32)


def _nhwc_strides(shape: torch.Size) -> tuple[int, int, int, int]:
    _, channels, height, width = shape
    return channels * height * width, 1, width * channels, channels


def _no_vector() -> Tensor:
    return torch.empty(0, dtype=DTYPE, device="cpu")
