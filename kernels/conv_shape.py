"""The sizes of a convolution of channels_last tensors, and which of them the training kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.kernels.device import INTERPRETED

OLDEST_CAPABILITY = (8, 0)  # bfloat16 and TF32 matrix instructions, cp.async


@dataclass(frozen=True)
class ConvShape:
    """Of conv2d(x, conv_weight): x is (batch, channels, height, width), the weight (filters, channels, kernel_height,
    kernel_width) and the result (batch, filters, out_height, out_width)."""

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel_height: int
    kernel_width: int
    out_height: int
    out_width: int
    pointwise: bool
    """1x1, stride 1, no padding: input and output pixels are the same."""
    padded: bool
    """Some tap may lie outside the image."""

    @classmethod
    def of(cls, x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> ConvShape:
        batch, channels, height, width = x.shape
        filters, _, kernel_height, kernel_width = conv_weight.shape
        taps = kernel_height * kernel_width
        return cls(
            batch,
            channels,
            height,
            width,
            filters,
            kernel_height,
            kernel_width,
            *settings.output_size(x.shape, conv_weight.shape),
            pointwise=taps == 1 and settings[:2] == ((1, 1), (0, 0)),
            padded=max(settings.padding) > 0,
        )

    @property
    def taps(self) -> int:
        return self.kernel_height * self.kernel_width

    @property
    def rows(self) -> int:
        """Pixels of the output."""
        return self.batch * self.out_height * self.out_width

    @property
    def sizes(self) -> tuple[int, ...]:
        """Arguments of every kernel."""
        return self.height, self.width, self.channels, self.out_height, self.out_width, self.filters

    def constants(self, flat: bool) -> dict[str, int]:
        """Of a kernel that reads patches, ``flat`` or by taps (``patches.py``)."""
        return {
            "KERNEL_WIDTH": self.kernel_width,
            "TAPS": self.taps,
            "FLAT_CHANNELS": self.channels if flat else 0,
            "POINTWISE": self.pointwise,
            "PADDED": self.padded,
        }

    def empty_output(self, x: Tensor) -> Tensor:
        """An uninitialised result in x's dtype, channels_last."""
        shape = (self.batch, self.filters, self.out_height, self.out_width)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def is_full_precision(x: Tensor) -> bool:
    """True for float32 that torch's flag does not allow to be rounded to TF32."""
    return x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]


def why_not_train_conv(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> list[str]:
    """The reasons why ``conv_stats``, ``conv_grad_input`` and ``conv_grad_weight``, as every convolution here, cannot
    take these, beyond those that hold for every op on x."""
    if x.dim() != 4 or conv_weight.dim() != 4:
        return [f"x has {x.dim()} dimensions and conv_weight {conv_weight.dim()}; it takes 4 and 4"]
    reasons = []
    if settings.groups != 1:
        reasons.append(f"groups is {settings.groups}; it takes 1")
    elif conv_weight.shape[1] != x.shape[1]:
        reasons.append(f"conv_weight takes {conv_weight.shape[1]} channels; x has {x.shape[1]}")
    if conv_weight.numel() == 0:
        reasons.append("conv_weight is empty")
    if conv_weight.dtype != x.dtype:
        reasons.append(f"conv_weight is {conv_weight.dtype}; it takes x's dtype, {x.dtype}")
    if conv_weight.device != x.device:
        reasons.append(f"conv_weight is on {conv_weight.device}; it takes x's device, {x.device}")
    height, width = settings.output_size(x.shape, conv_weight.shape)
    if min(height, width) < 1:
        reasons.append(f"the output would be {height} x {width}; it takes at least one pixel")
    if INTERPRETED and x.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < OLDEST_CAPABILITY:
        reasons.append(f"the GPU is older than compute capability {'.'.join(map(str, OLDEST_CAPABILITY))}")
    return reasons
