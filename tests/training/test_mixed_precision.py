"""Whole fused networks in mixed precision: with a GradScaler on the CPU, and on a device as they are meant to run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet
from fused_resnet.ops import use_fusion_level


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = fused_resnet.models.ResNet(fused_resnet.modules.BasicBlock, (1, 1, 1, 1), num_classes=4)
    return blocks.to(memory_format=torch.channels_last)


def batch(device: str = "cpu") -> tuple[Tensor, Tensor]:
    images = torch.randn(8, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(8, device=device) % 4


def test_grad_scaler_scales_skips_and_trains() -> None:
    """float16 gradients that overflow: the step is skipped, the scale halved, and the next one is taken."""
    model = network()
    weights = copy.deepcopy(list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    images, labels = batch()
    for skipped in (True, False):
        with torch.autocast("cpu", torch.float16), use_fusion_level(3):
            loss = F.cross_entropy(model(images).float(), labels)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True)]
        assert not any(moved) if skipped else all(moved)
    assert scaler.get_scale() == 2.0**10
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_scaled_gradients_are_the_gradients() -> None:
    images, labels = batch()
    found = []
    for scale in (1.0, 1024.0):
        model = network()
        with torch.autocast("cpu", torch.float16), use_fusion_level(3):
            (F.cross_entropy(model(images).float(), labels) * scale).backward()
        found.append(torch.cat([p.grad.flatten() / scale for p in model.parameters()]))
    assert torch.linalg.vector_norm(found[0] - found[1]) < 0.02 * torch.linalg.vector_norm(found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_the_device_it_trains_as_plain_pytorch(dtype: torch.dtype) -> None:
    """Level 3 by the automatic choice; losses of ten steps beside those of the same network unfused."""
    model = network().cuda()
    plain = fused_resnet.unfuse(copy.deepcopy(model))
    with torch.autocast("cuda", dtype):
        report = fused_resnet.fusion_report(copy.deepcopy(model).to(dtype))
    assert all(site.level == 3 for site in report.sites), str(report)
    losses = []
    for network_ in (model, plain):
        optimizer = torch.optim.SGD(network_.parameters(), lr=0.02, momentum=0.9)
        images, labels = (torch.manual_seed(1), batch("cuda"))[1]
        curve = []
        for _ in range(10):
            with torch.autocast("cuda", dtype):
                loss = F.cross_entropy(network_(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.02)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.gpu
def test_on_the_device_a_captured_step_is_the_uncaptured_one_bit_for_bit() -> None:
    """Every kernel of a fused step is deterministic, and the capture's warm-up leaves the running statistics alone."""
    model = network().cuda()
    twin = copy.deepcopy(model)
    images, labels = batch("cuda")
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin))
    torch.backends.cudnn.deterministic = True
    step = fused_resnet.graph_step(model, F.cross_entropy, optimizer, (images, labels), autocast_dtype=torch.bfloat16)
    assert step.captured
    for _ in range(3):
        step(images, labels)
        other.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(twin(images), labels)
        loss.backward()
        other.step()
    torch.backends.cudnn.deterministic = False
    for (name, tensor), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name
