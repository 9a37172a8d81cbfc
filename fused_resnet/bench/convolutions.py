"""The convolutions of a network, found by running it on tensors without memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet import models


class _Sizes(NamedTuple):
    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Convolution:
    """One shape of convolution, for one image, and how often the network has it."""

    sizes: _Sizes
    out_height: int
    out_width: int
    count: int

    def __str__(self) -> str:
        s = self.sizes
        kernel = "x".join(map(str, s.kernel))
        stride = f"/{s.stride[0]}" if max(s.stride) > 1 else ""
        groups = f" in {s.groups} groups" if s.groups > 1 else ""
        return f"{s.channels}x{s.height}x{s.width} {kernel}{stride} to {s.filters}{groups}"

    @property
    def settings(self) -> tuple[list[int], list[int], list[int], int]:
        """stride, padding, dilation and groups, as the ops take them."""
        s = self.sizes
        return list(s.stride), list(s.padding), list(s.dilation), s.groups

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.sizes.channels, self.sizes.height, self.sizes.width

    def output_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.sizes.filters, self.out_height, self.out_width

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.sizes.filters, self.sizes.channels // self.sizes.groups, *self.sizes.kernel

    def flop(self, batch: int) -> int:
        """Additions and multiplications of one of its three products, none of them with the padding."""
        taps = self.sizes.kernel[0] * self.sizes.kernel[1]
        outputs = batch * self.sizes.filters * self.out_height * self.out_width
        return 2 * outputs * taps * self.sizes.channels // self.sizes.groups


def convolutions(name: str, image_size: int = 224) -> list[Convolution]:
    """Those of one of this package's networks, each shape once, in the order in which they first run.

    Args:
        name: a builder of this package, such as "resnet50".
        image_size: height and width of its input.
    """
    found: Counter[tuple[_Sizes, int, int]] = Counter()

    def note(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d) and not isinstance(conv.padding, str)
        _, channels, height, width = inputs[0].shape
        windows = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        sizes = _Sizes(channels, height, width, conv.out_channels, *windows, conv.groups)
        found[sizes, output.shape[2], output.shape[3]] += 1

    with torch.device("meta"), torch.no_grad():
        model = getattr(models, name)().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, image_size, image_size))
    return [Convolution(*key, count) for key, count in found.items()]
