"""Which backend is asked first, and who runs a pass without asking again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.bench.dry_run import DryRun
from fused_resnet.ops import backend, cuda, preference, reasons
from fused_resnet.ops.schemas import SCHEMAS

HOPPER, AMPERE = (9, 132), (8, 108)
SETTINGS = ([1, 1], [0, 0], [1, 1])


def on_cuda(*shape: int) -> SimpleNamespace:
    """As much of a CUDA tensor as the ranking looks at."""
    return SimpleNamespace(shape=shape, is_cuda=True, device=torch.device("cuda", 0))


def ranked(chip: tuple[int, int], monkeypatch: pytest.MonkeyPatch, *shape: int, filters: int = 256) -> str:
    monkeypatch.setattr(preference, "_chip", lambda device: chip)
    args = (on_cuda(*shape), on_cuda(filters, shape[1], 1, 1), None, None, None, *SETTINGS, 1, True)
    return preference.ranking("conv_bn_act", args)[0]


def test_a_convolution_goes_to_triton_where_it_fills_a_chip_with_wgmma(monkeypatch):
    assert ranked(HOPPER, monkeypatch, 256, 64, 56, 56) == "triton"
    assert ranked(HOPPER, monkeypatch, 1, 64, 56, 56) == "cuda"
    assert ranked(AMPERE, monkeypatch, 256, 64, 56, 56) == "cuda"
    # Exactly a tile of 128 x 128 for each of 132 multiprocessors, and one pixel less.
    assert ranked(HOPPER, monkeypatch, 66, 64, 16, 8) == "triton"
    assert ranked(HOPPER, monkeypatch, 1, 64, 1, 66 * 128 - 1) == "cuda"


def test_passes_go_to_cuda_first_and_every_backend_is_asked():
    assert preference.ranking("bn_apply", (on_cuda(256, 64, 56, 56),))[0] == "cuda"
    for order in (preference.CUDA_FIRST, preference.TRITON_FIRST):
        assert sorted(order) == sorted(reasons.MODULES) and order[-1] == "reference"


@pytest.fixture
def cuda_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuda backend says that it takes CPU tensors; nothing runs on it here."""
    monkeypatch.setattr(backend, "unavailable", lambda name: [])
    monkeypatch.setattr(cuda, "takes_device", lambda device: device.type == "cpu")


def test_passes_for(cuda_on_the_cpu):
    nhwc = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    dispatcher = torch.ops.fused_resnet
    assert backend.passes_for(nhwc) is cuda
    assert backend.passes_for(nn.Parameter(nhwc)) is cuda
    for other in (nhwc.contiguous(), nhwc.double(), nhwc[:0], nhwc.to("meta")):
        assert backend.passes_for(other) is dispatcher
    for name in ("reference", "separate"):
        with fused_resnet.use_backend(name):
            assert backend.passes_for(nhwc) is dispatcher
    with DryRun():
        assert backend.passes_for(nhwc) is dispatcher

    class Subclass(Tensor):
        pass

    assert backend.passes_for(nhwc.as_subclass(Subclass)) is dispatcher
    assert backend.passes_for(nhwc) is cuda


def test_the_cuda_backend_has_every_pass_that_is_asked_of_it():
    """``passes_for`` hands out the module without asking for the op."""
    passes = [name for name in SCHEMAS if name.startswith("bn_")]
    asked = {name for name in passes if not ("pool" in name or name == "bn_grad_coefficients")}
    assert asked <= set(cuda.__all__)
