"""How a convolution moves over its input, in one value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fused_resnet.ops.layout import conv_output_size


class ConvSettings(NamedTuple):
    """What ``F.conv2d`` takes beside tensors; each pair is (vertical, horizontal)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> ConvSettings:
        """The settings from lists, as the dispatcher gives them to an op."""
        return cls((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)

    @property
    def lists(self) -> tuple[list[int], list[int], list[int], int]:
        """As the ops take them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def output_size(self, x_shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of the result for x of (N, C, H, W) and a weight of (K, C / groups, R, S)."""
        height, width = (
            conv_output_size(x_shape[i + 2], weight_shape[i + 2], self.stride[i], self.padding[i], self.dilation[i])
            for i in (0, 1)
        )
        return height, width
