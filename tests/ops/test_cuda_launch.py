"""What no host without a GPU can run of the cuda backend's launches, with PyTorch's CUDA functions replaced."""

from __future__ import annotations

import functools

import pytest
import torch

from fused_resnet.ops.backends import cuda
from fused_resnet.ops.backends.cuda import launch as cuda_launch


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that were made the current one, the first the one that was."""
    seen = [0]

    def exchange(device: int) -> int:
        seen.append(device)
        return seen[-2]

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: seen[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return seen


def test_a_launch_is_on_its_device(devices):
    launched = []
    cuda_launch.launch(1, lambda *args: launched.append((devices[-1], args)), "a", "b")
    cuda_launch.launch(0, lambda *args: launched.append((devices[-1], args)), "c")
    assert launched == [(1, ("a", "b")), (0, ("c",))]
    assert devices == [0, 1, 0]  # the second had nothing to change


def test_a_launch_that_fails_restores_the_device(devices):
    def fail() -> None:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        cuda_launch.launch(1, fail)
    assert devices == [0, 1, 0]


def test_reasons_belong_to_who_asked(monkeypatch):
    """One call's further reasons must not stay with the device."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "_why_not_cuda_device", functools.cache(lambda device: ()))
    cuda.why_not_device(device).append("x is not channels_last")
    assert cuda.why_not_device(device) == []
