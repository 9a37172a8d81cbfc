"""FoldedConv and FoldedBlock by themselves: folding, packed weights, when they are made anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_resnet.frozen.block import FoldedBlock, OrdinaryPart
from fused_resnet.frozen.fold import PACKED_SIZES, FoldedConv, folded_conv
from fused_resnet.modules import BasicBlock
from tests.modules.compare import randomize


def conv_norm(**settings) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    pair = randomize(nn.ModuleList([nn.Conv2d(6, 8, 3, bias=False, **settings), nn.BatchNorm2d(8)])).eval()
    return pair[0], pair[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": 1}, {"padding": (0, 2), "dilation": 2}, {"groups": 2}]
)
@torch.no_grad()
def test_it_is_the_convolution_norm_add_and_relu(settings, dtype):
    conv, norm = conv_norm(**settings)
    x = torch.randn(2, 6, 9, 11).to(dtype)
    for relu in (True, False):
        frozen = FoldedConv(conv, norm, relu, dtype)
        act = torch.relu if relu else lambda z: z
        exact = norm.double()(conv.double()(x.double()))
        residual = torch.randn(exact.shape).to(dtype)
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(frozen(x).double(), act(exact), rtol=4 * unit, atol=8 * unit)
        for memory_format in (torch.channels_last, torch.contiguous_format):
            laid_out = residual.contiguous(memory_format=memory_format)
            out = frozen(x, laid_out)
            torch.testing.assert_close(out.double(), act(exact + residual.double()), rtol=4 * unit, atol=8 * unit)
            assert torch.equal(laid_out, residual)
        conv.float(), norm.float()


@torch.no_grad()
def test_the_scale_is_multiplied_in_before_rounding():
    """One rounding of each weight: the folded weight is the bfloat16 nearest to the exact product."""
    conv, norm = conv_norm()
    frozen = FoldedConv(conv, norm, True, torch.bfloat16)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert torch.equal(frozen.weight, (conv.weight.double() * scale[:, None, None, None]).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda conv, norm: conv.weight.mul_(2),
        lambda conv, norm: norm.running_var.detach().zero_(),
        lambda conv, norm: setattr(norm, "bias", nn.Parameter(torch.ones(8))),
        lambda conv, norm: setattr(conv.weight, "data", torch.ones(8, 6, 3, 3)),
        lambda conv, norm: setattr(norm, "eps", 1.0),
        lambda conv, norm: setattr(conv, "stride", (2, 2)),
        lambda conv, norm: (conv.double(), norm.double()),
    ],
)
def test_it_is_made_anew_when_something_has_changed_and_only_then(change):
    conv, norm = conv_norm()
    x = torch.randn(2, 6, 9, 9)
    before = folded_conv(conv, norm, False, torch.float32)
    assert folded_conv(conv, norm, False, torch.float32) is before
    change(conv, norm)
    after = folded_conv(conv, norm, False, torch.float32)
    assert after is not before and folded_conv(conv, norm, False, torch.float32) is after
    torch.testing.assert_close(after(x), norm(conv(x.to(conv.weight.dtype))).float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_are_packed_for_a_few_sizes_at_most(monkeypatch):
    monkeypatch.setattr(FoldedConv, "native_for", lambda *unused: None)  # which packs once for all sizes
    conv, norm = conv_norm()
    frozen = FoldedConv(conv, norm, False, torch.float32)
    for size in [*range(3, 12), *range(11, 3, -1)]:
        x = torch.randn(1, 6, size, 5)
        torch.testing.assert_close(frozen(x), norm(conv(x)), rtol=1e-5, atol=1e-5)
        assert len(frozen._packed) <= PACKED_SIZES


@torch.no_grad()
def test_block():
    block = randomize(BasicBlock(4, 4)).eval()
    convs = [FoldedConv(block.conv1, block.bn1, True, torch.float32)]
    convs.append(FoldedConv(block.conv2, block.bn2, True, torch.float32))
    x = torch.randn(2, 4, 6, 5)
    before = x.clone()
    torch.testing.assert_close(FoldedBlock(convs, None)(x), block(x), rtol=1e-5, atol=1e-5)
    halved = FoldedBlock(convs, OrdinaryPart(nn.AvgPool2d(1), torch.float32, torch.float32))(x)
    torch.testing.assert_close(halved, block(x), rtol=1e-5, atol=1e-5)
    plain = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))))
    torch.testing.assert_close(FoldedBlock(convs, None, shortcut=False)(x), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)
