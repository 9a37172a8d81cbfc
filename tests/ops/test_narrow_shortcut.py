"""The gradient of the weight of a convolution of one pixel with a stride and few channels, for which oneDNN writes past
the end of its memory: asked for with the pixels in between left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops.reference.conv import convolution_backward


class Strides(TorchDispatchMode):
    """Of the convolutions whose gradient of the weight PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[-1][1]:
            self.seen.append(args[4])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_same_gradients(stride: tuple[int, int], size: tuple[int, int], groups: int):
    x = torch.randn(3, 6, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(4, 6 // groups, 1, 1, requires_grad=True)
    wide = x.double(), weight.double()
    out = torch.nn.functional.conv2d(*wide, None, stride, groups=groups)
    dy = torch.randn(out.shape).contiguous(memory_format=torch.channels_last)
    exact = torch.autograd.grad(out, wide, dy.double())
    for needed in ((True, True), (False, True), (True, False)):
        with Strides() as strides:
            found = convolution_backward(
                dy, x.detach(), weight.detach(), ConvSettings(stride=stride, groups=groups), *needed
            )
        assert strides.seen == [[1, 1]] * needed[1]
        for actual, expected, wanted in zip(found, exact, needed, strict=True):
            assert (actual is not None) == wanted
            if actual is not None:
                torch.testing.assert_close(actual, expected.float())
