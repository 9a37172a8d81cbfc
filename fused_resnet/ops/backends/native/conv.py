"""Inference convolutions on the CPU by our own C++: bias, add and ReLU in the epilogue, weights laid out once.

csrc/cpu/conv.h says which methods there are: a 3x3 convolution of stride 1 by Winograd's method, where the image is
large enough; one in groups by vectors that hold several groups or a part of one; the rest as a matrix product.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings, PoolSettings
from fused_resnet.ops.backends.extension import extension
from fused_resnet.ops.backends.native.norm import empty_strided
from fused_resnet.ops.layout import is_channels_last
from fused_resnet.ops.plan import measured_plan
from fused_resnet.ops.plan.plan_key import method_key

CAPABILITIES = {torch.float32: ("avx2", "avx512", "avx512_bf16"), torch.bfloat16: ("avx512_bf16",)}
"""Builds of csrc/cpu in which these convolutions are no slower than oneDNN's, by dtype."""
NARROWEST_GROUP = 32  # filters of a group: a matrix product of fewer leaves lanes empty
WORK_OF_A_THREAD = 1 << 19  # multiplications; with fewer a second thread is waited for
MOST_CALLS = 64  # shapes of x that are remembered

# Of one Zen 4 core, where Winograd's method is weighed against the matrix product.
FLOAT32_SPEED, BFLOAT16_SPEED = 117e9, 233e9  # operations a second
MEMORY_SPEED = 12e9  # bytes a second of weights that are in no cache
TRANSFORMS = 0.1  # of the products' time


@functools.cache
def why_no_kernels(dtype: torch.dtype) -> tuple[str, ...]:
    if dtype not in CAPABILITIES:
        return (f"the dtype is {dtype}; the C++ convolutions take float32 and bfloat16",)
    built = extension
    if built is None:
        return ("fused_resnet._C is not built",)
    capability = built.build_info()["cpu_capability"]
    if capability not in CAPABILITIES[dtype]:
        return (f"this processor's kernels are {capability}; in {dtype} it takes {' or '.join(CAPABILITIES[dtype])}",)
    return ()


def takes_dtype(dtype: torch.dtype) -> bool:
    """True if the kernels of this processor take it."""
    return not why_no_kernels(dtype)


def why_not_native(x: Tensor, weight: Tensor, settings: ConvSettings) -> list[str]:
    """The reasons why ``NativeConv`` cannot take x; an empty list means that it can.

    Args:
        x: (N, C, H, W).
        weight: (K, C / groups, R, S), x's dtype.
    """
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return [f"x is on {x.device}, weight on {weight.device}; it takes CPU tensors"]
    if reasons := why_no_kernels(x.dtype):
        return list(reasons)
    if settings.groups > 1 and (filters := weight.shape[0] // settings.groups) < NARROWEST_GROUP:
        conv = _conv(weight, settings._replace(padding=(0, 0)))
        if not extension.conv_takes(conv, extension.ConvMethod.grouped):
            return [f"groups of {filters} filters; it takes 3x3 groups of 4, 8 or 16, or from 32 on"]
    return []


class DoesNotFit(ValueError):
    """An x or a residual whose size or dtype a convolution does not take."""


class NativeConv:
    """``act(F.conv2d(x, weight, bias, *settings) + residual)`` as one pass.

    Copies what it needs of weight and bias. An output is the same bits whatever the number of threads, and whatever the
    other images of its batch show; how many they are may decide the method.

    Args:
        weight: (K, C / groups, R, S), float32 or bfloat16, any memory format.
        bias: (K,).
        relu: whether a ReLU follows.
        method: one of `candidates`; None for the one that was measured (``python -m fused_resnet tune``) or else
            estimated to be the fastest for an x of each shape.

    Raises:
        ValueError: the method cannot do this.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, settings: ConvSettings, relu: bool, method: str | None = None
    ) -> None:
        self._weight = weight.detach().permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        self._bias = bias.detach().float().contiguous()
        self._conv, self._settings = _conv(weight, settings), settings
        self._narrow = settings.groups > 1 and weight.shape[0] // settings.groups < NARROWEST_GROUP
        self._relu = relu
        self._weight_shape = weight.shape
        self._method = method
        if method is not None and method not in self.candidates:
            raise ValueError(f"method must be one of {', '.join(self.candidates)}; got {method!r}")
        self._packed: dict[str, Any] = {}
        self._calls: dict[torch.Size, tuple[Any, list[int], int]] = {}

    def __call__(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """x: (N, C, H, W) of the weight's dtype, channels_last for speed; residual: of the result's shape and dtype, or
        None, and with ``overwrite`` its memory may become the result's. Returns channels_last.

        Raises:
            ValueError: x or residual does not fit.
        """
        call = self._calls.get(x.shape)
        if call is None or x.dtype != self._weight.dtype:
            call = self._prepare(x.shape, x.dtype)
        packed, shape, most_threads = call
        threads = min(torch.get_num_threads(), most_threads)
        if not is_channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        if residual is None:
            out = empty_channels_last(shape, x.dtype)
            added = 0
        else:
            if list(residual.shape) != shape or residual.dtype != x.dtype:
                raise DoesNotFit(
                    f"residual must be {tuple(shape)} in {x.dtype}; got {tuple(residual.shape)} in {residual.dtype}"
                )
            if not is_channels_last(residual):
                residual = residual.contiguous(memory_format=torch.channels_last)
            out = residual if overwrite else empty_channels_last(shape, x.dtype)
            added = residual.data_ptr()
        images, _, height, width = x.shape
        packed.run(images, height, width, threads, x.data_ptr(), added, self._relu, out.data_ptr())
        return out

    @property
    def methods(self) -> list[str]:
        """Those that weights were laid out for so far."""
        return list(self._packed)

    @property
    def candidates(self) -> list[str]:
        """The methods that can do this convolution."""
        if self._narrow:
            return ["grouped"]
        return ["gemm", *filter(self._takes, ("grouped", "winograd"))]

    def estimated(self, shape: Sequence[int], dtype: torch.dtype) -> str:
        """The method that is likely the fastest for an x of this shape and dtype."""
        images, _, height, width = self.output_shape(shape, dtype)
        *_, last = self.candidates
        return "gemm" if last == "winograd" and not prefers_winograd(images, height, width, dtype) else last

    def call(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Any, bool, int]:
        """(``_C.PackedConv``, whether a ReLU follows, threads) for an x of this shape and dtype."""
        packed, _, most_threads = self._prepare(torch.Size(shape), dtype)
        return packed, self._relu, min(torch.get_num_threads(), most_threads)

    def output_shape(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
        """Of the result for an x of this shape and dtype.

        Raises:
            ValueError: it does not fit.
        """
        channels = self._weight_shape[1] * self._settings.groups
        if shape[1] != channels or dtype != self._weight.dtype:
            raise DoesNotFit(f"x must have {channels} channels in {self._weight.dtype}; got {tuple(shape)} in {dtype}")
        size = self._settings.output_size(shape, self._weight_shape)
        if min(shape[0], *size) < 1:
            raise DoesNotFit(f"x must have images at least as large as the kernel; got shape {tuple(shape)}")
        return (shape[0], self._weight_shape[0], *size)

    def _prepare(self, shape: torch.Size, dtype: torch.dtype) -> tuple[Any, list[int], int]:
        images, filters, height, width = self.output_shape(shape, dtype)
        method = self._method or measured_plan.winner(
            measured_plan.METHOD, method_key(shape, dtype, self._weight_shape, self._settings)
        )
        if method not in self.candidates:
            method = self.estimated(shape, dtype)
        if method not in self._packed:
            kind = getattr(extension.ConvMethod, method)
            self._packed[method] = extension.PackedConv(
                kind, self._weight.data_ptr(), self._bias.data_ptr(), self._conv
            )
        work = images * height * width * self._weight.numel()
        most_threads = max(work // WORK_OF_A_THREAD, 1)
        if len(self._calls) >= MOST_CALLS:
            self._calls.clear()
        call = self._calls[shape] = (self._packed[method], [images, filters, height, width], most_threads)
        return call

    def _takes(self, method: str) -> bool:
        return extension.conv_takes(self._conv, getattr(extension.ConvMethod, method))


def max_pool(x: Tensor, settings: PoolSettings) -> Tensor:
    """``F.max_pool2d(x, *settings)``; x as `why_not_native` takes it. Returns channels_last."""
    images, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    pool = pooling_window(channels, settings, x.dtype)
    out = empty_channels_last((images, channels, *settings.output_size(x.shape)), x.dtype)
    extension.max_pool(pool, images, height, width, torch.get_num_threads(), x.data_ptr(), out.data_ptr())
    return out


def pooling_window(channels: int, settings: PoolSettings, dtype: torch.dtype) -> Any:
    """A ``_C.Conv`` that says what is pooled."""
    return extension.Conv(channels, channels, *settings, (1, 1), 1, _dtype(dtype))


def average(x: Tensor) -> Tensor:
    """``F.adaptive_avg_pool2d(x, 1)``, summed in float32; x as `why_not_native` takes it."""
    images, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty(images, channels, 1, 1, dtype=x.dtype, device="cpu")
    threads = min(torch.get_num_threads(), max(x.numel() // WORK_OF_A_THREAD, 1))
    sizes = (images, channels, height, width)
    extension.average(*sizes, _dtype(x.dtype), threads, x.data_ptr(), out.data_ptr())
    return out


def empty_channels_last(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a result."""
    _, channels, height, width = shape
    return empty_strided(shape, (height * width * channels, 1, width * channels, channels), dtype)


def prefers_winograd(images: int, height: int, width: int, dtype: torch.dtype) -> bool:
    """True if Winograd's method is faster for outputs of this size. Its weights are four to eight times as large, which
    only pays where they are used often enough; both times are of one channel and filter, measured on a Zen 4 core."""
    step, products, speed = (2, 16, FLOAT32_SPEED) if dtype == torch.float32 else (4, 36, BFLOAT16_SPEED)
    windows = images * -(-height // step) * -(-width // step)
    directly = 2 * 9 * images * height * width / speed
    by_windows = 2 * products * windows / FLOAT32_SPEED * (1 + TRANSFORMS)
    return max(by_windows, 4 * products / MEMORY_SPEED) < directly


def _conv(weight: Tensor, settings: ConvSettings) -> Any:
    filters, channels, *kernel_size = weight.shape
    return extension.Conv(channels * settings.groups, filters, kernel_size, *settings, _dtype(weight.dtype))


def _dtype(dtype: torch.dtype) -> Any:
    kinds = extension.DType
    return {torch.float32: kinds.float32, torch.bfloat16: kinds.bfloat16}[dtype]
