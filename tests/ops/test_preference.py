"""Which backend is asked first, and who runs a pass without asking again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.bench.dry_run import DryRun
from fused_resnet.ops import backend, bn_act, cuda, cuda_launch, preference, reasons
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
    monkeypatch.setattr(backend, "why_not_device", lambda name, device: [])
    monkeypatch.setattr(cuda_launch, "device_type", lambda: "cpu")


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

    batched = []
    torch.func.vmap(lambda g: batched.append(backend.passes_for(nhwc, g)) or g)(torch.randn(4, *nhwc.shape))
    assert batched == [dispatcher]
    torch.jit.trace(lambda t: batched.append(backend.passes_for(t)) or t, nhwc, check_trace=False)
    assert batched == [dispatcher, dispatcher]

    class Subclass(Tensor):
        pass

    assert backend.passes_for(nhwc.as_subclass(Subclass)) is dispatcher
    assert backend.passes_for(nhwc) is cuda


def test_cpu_tensors_do_not_wake_a_gpu(monkeypatch):
    """A context costs half a gigabyte, and in a forked worker cannot be made at all."""

    def start(*args, **kwargs):
        raise AssertionError("CUDA was initialised for a CPU tensor")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", start)
    reasons.unavailable.cache_clear()
    try:
        x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
        vectors = (torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8))
        bn_act(x, *vectors, residual=x.detach(), training=True).sum().backward()
        bn_act(x.detach(), *vectors)
        fused_resnet.freeze(fused_resnet.resnet18(), torch.randn(1, 3, 32, 32))
        assert backend.why_not("cuda", "avgpool", x.detach())[0].endswith("it takes CUDA tensors") or not hasattr(
            cuda_launch.extension, "cuda"
        )
    finally:
        reasons.unavailable.cache_clear()


def test_the_cuda_backend_has_every_pass_that_is_asked_of_it():
    """``passes_for`` hands out the module without asking for the op."""
    passes = [name for name in SCHEMAS if name.startswith("bn_")]
    asked = {name for name in passes if not ("pool" in name or name == "bn_grad_coefficients")}
    assert asked <= set(cuda.__all__)
