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


def why_not_conv(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> list[str]:
    """The reasons why no convolution here can take x, weight and settings that fit together, beyond those that hold for
    every op on x."""
    reasons = []
    if INTERPRETED and x.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < OLDEST_CAPABILITY:
        reasons.append(f"the GPU is older than compute capability {'.'.join(map(str, OLDEST_CAPABILITY))}")
    return reasons
