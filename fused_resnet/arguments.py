"""What the ops take beside activations and weights, each in one immutable value.

The schemas of PyTorch's dispatcher have the same one by one (``ops/route/packing.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """What normalises an activation, a vector of C each: ``(x - mean) * invstd * weight + bias``."""

    mean: Tensor
    invstd: Tensor
    weight: Tensor | None = None
    """None for 1."""
    bias: Tensor | None = None
    """None for 0."""


Sums = tuple[Tensor, Tensor]
"""Of dz and of dz * xhat, over each channel."""
RunningStatistics = tuple[Tensor | None, Tensor | None, float, float]
"""running_mean and running_var (moved in place, or None), momentum and eps."""
NO_RUNNING_STATISTICS: RunningStatistics = (None, None, 0.0, 0.0)


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
    def numbers(self) -> tuple[int, ...]:
        """Of stride, padding and dilation, one by one."""
        return *self.stride, *self.padding, *self.dilation

    def output_size(self, x_shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of the result for x of (N, C, H, W) and a weight of (K, C / groups, R, S)."""
        return _output_size(x_shape, weight_shape[2:], self.stride, self.padding, self.dilation)


class PoolSettings(NamedTuple):
    """What ``F.max_pool2d`` takes beside a tensor; each pair is (vertical, horizontal)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> PoolSettings:
        """The settings from lists, as the dispatcher gives them to an op."""
        return cls((kernel_size[0], kernel_size[1]), (stride[0], stride[1]), (padding[0], padding[1]))

    def output_size(self, x_shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of the result for x of (N, C, H, W)."""
        return _output_size(x_shape, self.kernel_size, self.stride, self.padding, (1, 1))


def _output_size(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    height, width = (
        (shape[i + 2] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return height, width
