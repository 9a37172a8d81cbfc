"""A subclass of Tensor anywhere among the arguments: PyTorch's own ops run, and say what it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from fused_resnet.ops import BatchNorm, ConvNorm, bn_act, bn_act_dual, conv_bn_act, conv_bn_act_pool, residual_block

Tensors = dict[str, Any]
VECTORS = ("weight", "bias", "running_mean", "running_var")


def norm(t: Tensors) -> BatchNorm:
    return BatchNorm(*(t[name] for name in VECTORS))


def link(t: Tensors) -> ConvNorm:
    return ConvNorm(t["conv_weight"], norm(t), padding=(1, 1))


def normalized(x: Tensor, t: Tensors) -> Tensor:
    return F.batch_norm(x, t["running_mean"], t["running_var"], t["weight"], t["bias"])


def convolved(t: Tensors) -> Tensor:
    return normalized(F.conv2d(t["x"], t["conv_weight"], padding=1), t)


FUNCTIONS: dict[str, tuple[Callable[[Tensors], Tensor], Callable[[Tensors], Tensor]]] = {
    "bn_act": (
        lambda t: bn_act(t["x"], *norm(t)[:4], t["residual"]),
        lambda t: F.relu(normalized(t["x"], t) + t["residual"]),
    ),
    "bn_act_dual": (
        lambda t: bn_act_dual(t["x"], norm(t), t["residual"], norm(t)),
        lambda t: F.relu(normalized(t["x"], t) + normalized(t["residual"], t)),
    ),
    "conv_bn_act": (
        lambda t: conv_bn_act(t["x"], t["conv_weight"], *norm(t)[:4], t["residual"], padding=1),
        lambda t: F.relu(convolved(t) + t["residual"]),
    ),
    "conv_bn_act_pool": (
        lambda t: conv_bn_act_pool(t["x"], link(t)),
        lambda t: F.max_pool2d(F.relu(convolved(t)), 3, 2, 1),
    ),
    "residual_block": (lambda t: residual_block(t["x"], [link(t)]), lambda t: F.relu(convolved(t) + t["x"])),
}


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("name", ["x", "conv_weight", "residual", *VECTORS])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_argument(function: str, name: str, differentiable: bool):
    ours, theirs = FUNCTIONS[function]
    t: Tensors = {"x": torch.randn(2, 4, 8, 8), "residual": torch.randn(2, 4, 8, 8)}
    t |= {each: torch.rand(4) + 0.5 for each in VECTORS}
    t["conv_weight"] = torch.randn(4, 4, 3, 3)
    t = {key: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
         for key, value in t.items()}  # fmt: skip
    t[name] = TwoTensor(t[name], t[name])
    if differentiable:
        t["x"].requires_grad_()
    actual, expected = ours(t), theirs(t)
    assert type(actual) is type(expected)
    if isinstance(expected, TwoTensor):
        actual, expected = actual.b, expected.b
    torch.testing.assert_close(actual, expected)
