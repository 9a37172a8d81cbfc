"""Both residual blocks whole, every kernel of a training step together, against PyTorch's own and float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import kernels, unfuse
from fused_resnet.modules import BasicBlock, Bottleneck
from fused_resnet.modules.whole_block import MEMORY, why_not_whole
from fused_resnet.ops import use_backend, use_fusion_level
from tests.accuracy import assert_at_most_twice
from tests.kernels.conftest import why_no_device
from tests.modules.compare import counted


def projection(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


# Every input is (3, 16, 7, 5).
BLOCKS = {
    "basic": lambda: BasicBlock(16, 16),
    "basic projection, stride 2": lambda: BasicBlock(16, 24, 2, projection(16, 24, 2)),
    "bottleneck": lambda: Bottleneck(16, 4),
    "bottleneck projection, stride 2": lambda: Bottleneck(16, 8, 2, projection(16, 32, 2)),
    "bottleneck groups": lambda: Bottleneck(16, 4, 1, None, 2, 256),  # its 3x3 falls to level 0 alone
    "bottleneck dilated": lambda: Bottleneck(16, 4, 1, None, 1, 64, 2),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def block(request: pytest.FixtureRequest, device: torch.device) -> nn.Module:
    """In training, channels_last, its norms away from 1 and 0, and every ReLU far from its corner, where rounding would
    decide on the gradient: each channel open or shut."""
    block = BLOCKS[request.param]()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.1, 0.3)
            norm.bias.data = torch.where(torch.rand_like(norm.bias) < 0.8, 2.0, -2.0)
    return block.to(device).to(memory_format=torch.channels_last)


def image(device: torch.device) -> Tensor:
    """Numbers that float16 holds too, small beside the norms' biases: the last ReLU is far from its corner as well."""
    x = (torch.rand(3, 16, 7, 5) * 0.5 + 0.1).to(torch.float16).float()
    return x.to(device).contiguous(memory_format=torch.channels_last)


def step(block: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradients and buffers of a step in ``dtype``; 16-bit ones by autocast, the parameters float32."""
    x = x.detach().to(dtype, copy=True).requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2):
        out = block(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(x.device)
    out.backward(cotangent.to(torch.float16).to(out.dtype))
    result = {"output": out.detach(), "gradient of x": x.grad}
    result |= {f"gradient of {name}": parameter.grad for name, parameter in block.named_parameters()}
    return result | {name: buffer.clone() for name, buffer in block.named_buffers() if buffer.is_floating_point()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", ["default", "efficient"])
@pytest.mark.parametrize("block", BLOCKS, indirect=True)
def test_accuracy(block: nn.Module, memory: str, dtype: torch.dtype, device) -> None:
    if kernels.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if memory == "efficient" and dtype != torch.float32:
        pytest.skip("what is recomputed does not depend on the dtype")
    plain, exact = unfuse(copy.deepcopy(block)), unfuse(copy.deepcopy(block).double())
    block.__dict__[MEMORY] = memory
    assert why_not_whole(block) == []
    x = image(device)
    with use_backend("triton"), use_fusion_level(3):
        actual = step(block, x, dtype)
    baseline, wanted = step(plain, x, dtype), step(exact, x, torch.float64)
    assert list(actual) == list(baseline) == list(wanted)
    for name, tensor in actual.items():
        terms = 105 if name.startswith("gradient of") and name != "gradient of x" else 1
        # A gradient of a weight sums products that were rounded to the dtype, its own dtype is float32.
        magnitude = wanted[name].abs().max().item()
        if name.startswith("gradient") and tensor.dtype != dtype:
            magnitude *= torch.finfo(dtype).eps / torch.finfo(tensor.dtype).eps
        assert_at_most_twice(tensor, baseline[name], wanted[name], what=name, terms=terms, magnitude=magnitude)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("block", ["basic projection, stride 2", "bottleneck groups"], indirect=True)
def test_lower_levels(block: nn.Module, level: int, device) -> None:
    plain, exact = unfuse(copy.deepcopy(block)), unfuse(copy.deepcopy(block).double())
    x = image(device)
    with use_backend("triton"), use_fusion_level(level):
        actual = step(block, x, torch.float32)
    baseline, wanted = step(plain, x, torch.float32), step(exact, x, torch.float64)
    for name, tensor in actual.items():
        terms = 105 if name.startswith("gradient of") and name != "gradient of x" else 1
        assert_at_most_twice(tensor, baseline[name], wanted[name], what=name, terms=terms)


@pytest.mark.parametrize("block", ["bottleneck"], indirect=True)
def test_the_automatic_choice_is_level_3(block: nn.Module, device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that Triton runs on: no convolution of PyTorch's own runs in either direction."""
    called: list[str] = []
    for name in ("conv_stats", "conv_grad_input", "conv_grad_weight"):
        monkeypatch.setattr(kernels, name, _noting(called, name, getattr(kernels, name)))
    x = torch.rand(3, 16, 7, 5).to(device).contiguous(memory_format=torch.channels_last)
    dtype = torch.float32 if kernels.INTERPRETED else torch.bfloat16
    with counted(F.conv2d) as of_pytorch:
        step(block, x, dtype)
    assert of_pytorch == []
    assert sorted(called) == ["conv_grad_input"] * 3 + ["conv_grad_weight"] * 3 + ["conv_stats"] * 3


def _noting(called: list[str], name: str, function):
    def call(*args):
        called.append(name)
        return function(*args)

    return call


def test_this_lane_has_a_reason_where_it_cannot_run() -> None:
    reason = why_no_device()
    assert reason is None or "TRITON_INTERPRET" in reason or "numpy" in reason
