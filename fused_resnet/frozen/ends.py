"""What the first and the last layers of a network become when it is frozen: its stem, and its global pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.arguments import ConvSettings, PoolSettings
from fused_resnet.frozen.block import FrozenConvAct
from fused_resnet.frozen.chains import weights_changed
from fused_resnet.modules.plain import is_intercepted
from fused_resnet.ops.backends.native.conv import NativeConv, average, max_pool, takes_dtype
from fused_resnet.ops.route.choose import runs_in_cuda
from fused_resnet.ops.route.listeners import runs_unseen

_ops = torch.ops.fused_resnet

STEM = ConvSettings((2, 2), (3, 3))
STEM_KERNEL = (3, 7, 7)  # channels, height, width
POOL = PoolSettings((3, 3), (2, 2), (1, 1))
BYTE = 255.0


class FrozenStem(nn.Module):
    """``max_pool2d(act(conv2d(x, weight) + bias), 3, stride=2, padding=1)``, of a 7x7 convolution of stride 2.

    One kernel where the CUDA C++ one runs, which never writes what is pooled; else the convolution and the pooling.

    Args:
        conv: the convolution with its norm and ReLU folded.
        pool: 3x3 of stride 2 and padding 1.
        normalize: (mean, std) of each of the 3 channels: x may then be uint8, and stands for (x / 255 - mean) / std.
    """

    def __init__(
        self, conv: FrozenConvAct, pool: nn.MaxPool2d, normalize: tuple[Sequence[float], Sequence[float]] | None = None
    ) -> None:
        super().__init__()
        self.conv = conv
        self.pool = pool
        self.pixel_scale: list[float] | None = None
        self.pixel_shift: list[float] | None = None
        if normalize is not None:
            self.pixel_scale, self.pixel_shift = pixel_scale_and_shift(*normalize)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) of the weight's dtype and any memory format, or uint8."""
        pixels = (self.pixel_scale, self.pixel_shift) if x.dtype == torch.uint8 else (None, None)
        arguments = (x, self.conv.weight, None, self.conv.bias, *pixels)
        if runs_in_cuda("stem", arguments):
            return _ops.stem(*arguments)
        if x.dtype == torch.uint8 and self.pixel_scale is not None and self.pixel_shift is not None:
            x = normalized(x, self.pixel_scale, self.pixel_shift, self.conv.weight.dtype)
        y = self.conv(x.to(memory_format=torch.channels_last))
        if runs_unseen(y) and self.conv.native_for(y) is not None and not is_intercepted(self.pool):
            return max_pool(y, POOL)
        return self.pool(y)


class FrozenAvgPool(nn.Module):
    """``nn.AdaptiveAvgPool2d(1)``, added up in float32; one pass in CUDA C++ where that runs."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W). Returns (N, C, 1, 1)."""
        if runs_unseen(x) and takes_dtype(x.dtype):
            return average(x)
        return _ops.avgpool(x) if runs_in_cuda("avgpool", (x,)) else nn.functional.adaptive_avg_pool2d(x, 1)


class FrozenLinear(nn.Linear):
    """``nn.Linear`` with its weight laid out for our own C++ where that runs: a convolution of one pixel."""

    _native: NativeConv | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, device="meta")
        self.__dict__.update(linear.__dict__)
        self._forget()

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_features) or any other shape that ``nn.Linear`` takes."""
        if x.dim() == 2 and x.dtype == self.weight.dtype and runs_unseen(x) and takes_dtype(x.dtype):
            return self.native()(x[:, :, None, None])[:, :, 0, 0]
        return super().forward(x)

    def native(self) -> NativeConv:
        """Our own C++ for this weight."""
        if self._native is None:
            bias = self.weight.new_zeros(self.out_features) if self.bias is None else self.bias
            self._native = NativeConv(self.weight[:, :, None, None], bias, ConvSettings(), relu=False)
        return self._native

    def _forget(self) -> None:
        weights_changed()
        self._native = None

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        self._forget()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}


def is_stem(conv: nn.Module, pool: nn.Module) -> bool:
    """True if ``FrozenStem`` can stand for both."""
    if type(conv) is not FrozenConvAct or not conv.relu or type(pool) is not nn.MaxPool2d:
        return False
    window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
    fits = conv.settings == STEM and tuple(conv.weight.shape[1:]) == STEM_KERNEL
    return fits and window == (3, 2, 1, 1, False, False)


def pixel_scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Of each channel, such that byte * scale + shift = (byte / 255 - mean) / std."""
    scale = [1.0 / (BYTE * deviation) for deviation in std]
    return scale, [-center / deviation for center, deviation in zip(mean, std, strict=True)]


def normalized(x: Tensor, pixel_scale: list[float], pixel_shift: list[float], dtype: torch.dtype) -> Tensor:
    """The numbers that bytes stand for, channels_last."""
    scale, shift = (torch.tensor(vector, device=x.device)[:, None, None] for vector in (pixel_scale, pixel_shift))
    return (x.float() * scale + shift).to(dtype, memory_format=torch.channels_last)
