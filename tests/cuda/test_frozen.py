"""Whole networks, frozen, on the CUDA kernels: stem, convolutions and pooling as a user meets them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import use_backend
from fused_resnet.frozen.fold import folded_conv
from fused_resnet.modules.plain import FROZEN
from fused_resnet.ops.route import choose
from tests.cuda.on_host import Host

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def trained(name: str) -> nn.Module:
    """A network whose norms have statistics and parameters of their own."""
    model = getattr(fused_resnet, name)(num_classes=10).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
                module.momentum = None
        for _ in range(2):
            model(torch.randn(8, 3, 64, 64))
    return model.eval()


def assert_nearly_exact(actual: Tensor, model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """By the accuracy of the dtype: a network in it, computed by PyTorch, is as far from float64."""
    exact = copy.deepcopy(model).double()(x.double())
    with use_backend("reference"):
        baseline = fused_resnet.freeze(model, x[:1], dtype=dtype)(x)
    error, baseline_error = ((tensor.double() - exact).abs().max().item() for tensor in (actual, baseline))
    assert error <= 2 * baseline_error + torch.finfo(dtype).eps * exact.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_a_frozen_network(host: Host, name: str, dtype: torch.dtype):
    model, x = trained(name), torch.randn(1, 3, 64, 64)
    frozen = fused_resnet.freeze(model, x, dtype=dtype)
    host.launches()
    with use_backend("cuda"):
        actual = frozen(x)
    assert_nearly_exact(actual, model, x, dtype)
    # One for the stem, one or (where the sum is split) two for every other convolution, one for the pooling.
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert convolutions + 1 <= len(host.launches()) <= 2 * convolutions


@torch.no_grad()
def test_images_of_bytes(host: Host):
    model, x = trained("resnet18"), torch.randint(0, 256, (1, 3, 48, 56), dtype=torch.uint8)
    numbers = (x / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    frozen = fused_resnet.freeze(model, x, dtype=torch.float16, normalize=(MEAN, STD))
    with use_backend("cuda"):
        actual = frozen(x)
        of_numbers = frozen(numbers)
    assert_nearly_exact(actual, model, numbers, torch.float16)
    assert_nearly_exact(of_numbers, model, numbers, torch.float16)
    with pytest.raises(ValueError, match=r"x must be \(N, 3, H, W\); got shape \(1, 4, 8, 8\)"):
        frozen(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_which_ends_are_kernels_of_ours():
    plain = trained("resnet18")
    other = copy.deepcopy(plain)
    other.maxpool, other.avgpool, other.fc = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((2, 2)), nn.Linear(4 * 512, 10)
    for model, expected in ((plain, True), (other, False)):
        frozen = fused_resnet.freeze(model, torch.randn(1, 3, 64, 64))
        plan = frozen.module.__dict__[FROZEN]._kept.plan
        assert (plan.stem.is_kernels, plan.average is None) == (expected, expected)


@torch.no_grad()
def test_the_choice_of_a_frozen_convolution_is_remembered(host: Host, monkeypatch: pytest.MonkeyPatch):
    """For an x and a residual like those of the first call; another device, size or request asks again."""
    asked = []
    once = choose.choose
    monkeypatch.setattr(choose, "choose", lambda op, args: asked.append(op) or once(op, args))
    frozen = fused_resnet.freeze(trained("resnet18"), torch.randn(1, 3, 32, 32), dtype=torch.float16)
    block = frozen.module.layer1[0]
    conv = folded_conv(block.conv1, block.bn1, True, torch.float16)
    x = torch.randn(1, 64, 8, 8).half().to(memory_format=torch.channels_last)
    asked.clear()
    with use_backend("cuda"):
        first, second = conv(x), conv(x)
        assert torch.equal(first, second) and asked == ["conv_bn_act"]
        conv(x[:, :, :4])
        conv(x, first)
        assert len(asked) == 3
        with pytest.raises(fused_resnet.ops.BackendError, match="residual is"):
            conv(x, first[:, :, :3])
    with use_backend("reference"):
        torch.testing.assert_close(conv(x), first, rtol=1e-2, atol=1e-2)
    assert len(asked) == 5
