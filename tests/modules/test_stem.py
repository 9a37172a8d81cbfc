"""The stem of a ResNet as a whole against torchvision's, and the reasons why it is run part by part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet

import fused_resnet
from fused_resnet.modules import stem
from fused_resnet.ops import use_fusion_level
from tests.modules.compare import assert_close, step


class Stem(nn.Module):
    """The children of a ResNet's stem, under a ResNet's names."""

    def __init__(self, **pool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(**({"kernel_size": 3, "stride": 2, "padding": 1} | pool))

    def forward(self, x):
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def fused(self, x):
        return stem.conv_norm_act_pool(self.conv1, self.bn1, self.relu, self.maxpool, x)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a stem was run whole."""
    calls: list[int] = []
    run = stem.conv_bn_act_pool

    def note(*args, **kwargs):
        calls.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(stem, "conv_bn_act_pool", note)
    return calls


def test_two_training_steps_and_eval(whole) -> None:
    block = Stem().double()
    twin = copy.deepcopy(block)
    for training in (True, True, False):
        block.train(training), twin.train(training)
        x = torch.randn(2, 3, 21, 19, dtype=torch.float64)
        with use_fusion_level(3):
            actual = step(block, block.fused, x, backend="reference")
        assert_close(actual, step(twin, twin, x))
    assert len(whole) == 3  # in eval too: step wants gradients


def test_a_whole_network_at_level_3_is_torchvisions(whole) -> None:
    torch.manual_seed(0)
    twin = resnet.resnet18(num_classes=5).double()
    model = fused_resnet.fuse(copy.deepcopy(twin))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with use_fusion_level(3):
        actual = step(model, model, x, backend="reference")
    assert_close(actual, step(twin, twin, x), tolerance=1e-9)
    assert len(whole) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.maxpool.register_forward_hook(lambda *args: None), "the pooling has hooks"),
        (lambda s: s.bn1.register_forward_hook(lambda *args: None), "the norm has hooks"),
        (lambda s: setattr(s, "maxpool", nn.MaxPool2d(3, 2, 1, ceil_mode=True)), "ceil_mode"),
        (lambda s: setattr(s, "maxpool", nn.MaxPool2d(3, 2, 1, dilation=2)), "a dilation"),
        (lambda s: setattr(s, "maxpool", nn.MaxPool2d(17, 2, 1)), "one byte tells 256 places apart"),
        (lambda s: setattr(s, "maxpool", nn.AvgPool2d(3, 2, 1)), "AvgPool2d, not torch.nn.MaxPool2d"),
        (lambda s: setattr(s, "relu", nn.SiLU()), "SiLU"),
        (lambda s: setattr(s, "conv1", nn.Conv2d(3, 8, 7, 2, 3, padding_mode="circular", bias=False)), "of zeros"),
        (lambda s: setattr(s, "bn1", nn.GroupNorm(2, 8)), "GroupNorm"),
    ],
)
def test_reasons(change, reason: str, whole) -> None:
    block = Stem()
    change(block)
    reasons = stem.why_not_whole_stem(block.conv1, block.bn1, block.relu, block.maxpool)
    assert any(reason in each for each in reasons)
    twin = copy.deepcopy(block)
    x = torch.randn(2, 3, 48, 48)
    with use_fusion_level(3):
        assert_close(step(block, block.fused, x), step(twin, twin, x))
    assert whole == []


@pytest.mark.parametrize(
    "x", [torch.randn(2, 4, 32, 32), torch.randn(2, 3, 32, 32).double()], ids=["channels", "dtype"]
)
def test_a_wrong_image_gets_torchs_own_error(x, whole) -> None:
    block = Stem()
    with pytest.raises(RuntimeError), use_fusion_level(3):
        block.fused(x)
    assert whole == [] and block.bn1.num_batches_tracked == 0


def test_level_1_keeps_the_pooling_apart(whole) -> None:
    with use_fusion_level(1):
        Stem().fused(torch.randn(2, 3, 32, 32))
    assert whole == []
    with torch.no_grad(), use_fusion_level(3):
        Stem().eval().fused(torch.randn(2, 3, 32, 32))
    assert whole == []
