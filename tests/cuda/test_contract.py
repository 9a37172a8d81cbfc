"""What every op of the cuda backend promises beside numbers: launches, streams, memory, sizes."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet.ops import reference
from fused_resnet.ops.backends.cuda import conv as cuda_conv
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from tests.accuracy import assert_at_most_twice
from tests.cpp import CSRC
from tests.cuda.cases import (
    DTYPES,
    HALF,
    HALVES,
    STREAM,
    TWO_LAUNCHES,
    assert_same_bits,
    by_reference,
    call,
    channels_last,
    every_call,
    every_name,
    host_only,
    misaligned,
    outputs,
    same_bits,
    with_own_running,
    x_of,
)

# Launches


@host_only
@every_name
def test_how_many_launches(name: str, device, host) -> None:
    """Statistics take two, everything else one; bn_stats_apply's is cooperative, and no other is."""
    op, args = every_call(HALF, device)[name]
    host.launches()
    call(op, *args)
    launches = host.launches()
    if op == "conv_bn_act":
        assert len(launches) in (1, 2)
    else:
        assert len(launches) == (2 if name in TWO_LAUNCHES else 1)
    assert [launch.cooperative for launch in launches] == [op == "bn_stats_apply"] * len(launches)


@host_only
@every_name
def test_the_stream_reaches_every_launch(name: str, device, host, monkeypatch) -> None:
    op, args = every_call(HALF, device)[name]
    host.launches()
    call(op, *args)
    assert {launch.stream for launch in host.launches()} == {0}
    for module in (cuda_launch, cuda_conv):
        monkeypatch.setattr(module, "current_stream", lambda device: STREAM)
    call(op, *args)
    launches = host.launches()
    assert launches and {launch.stream for launch in launches} == {STREAM}


FORBIDDEN = [
    r"cuda\w*Synchronize",
    r"cudaMalloc\w*",
    r"cudaFree\w*",
    r"cudaMem(cpy|set)\w*",
    r"cudaEvent\w*",
    r"cudaStreamWait\w*",
    r"<<<",
    r"\bnew\b",
    r"\bmalloc\b",
    r"\batomic\w*\(",  # sums in any order would not be the same bits in every run
    r"\bprintf\b",
]


@pytest.mark.parametrize("forbidden", FORBIDDEN)
def test_nothing_waits_or_allocates(forbidden: str) -> None:
    """So every op can be captured in a CUDA graph."""
    for path in sorted((CSRC / "cuda").iterdir()):
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(forbidden, code), path.name


@host_only
@every_name
def test_memory_comes_from_pytorch(name: str, device, host) -> None:
    """Once asked, a device is not asked again, and outputs do not share memory with arguments or each other."""
    op, args = every_call(HALF, device)[name]
    results = [tensor for tensor in outputs(call(op, *args)) if tensor.numel()]
    places = [tensor.untyped_storage().data_ptr() for tensor in results]
    given = [tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)]
    assert len({*places}) == len(places) and not {*places} & {*given}


# Sizes of what the kernels get


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    images=st.integers(1, 2**15),
    channels=st.integers(1, 5000) | st.integers(1, 600).map(lambda eighth: 8 * eighth),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    offset=st.booleans(),
    mask=st.booleans(),
)
@host_only
def test_workspaces_and_grids_are_large_enough(device, host, images, channels, size, dtype, offset, mask) -> None:
    """Of any size, aligned or not: partial results fit in the workspace, and every launch is one that CUDA takes.
    Nothing runs, so nothing is read."""
    kernels, address = host.module.cuda, 4096
    place = kernels.Place(images, channels, *size, getattr(host.module.DType, dtype), 0, 0)
    norm = [address] * 4
    x, bits = address + 4 * offset, address if mask else 0
    available = kernels.bn_workspace_bytes(place)
    host.skip_launches(True)
    host.launches()
    kernels.bn_stats(place, x, address, address, 0, 0, 0.1, 1e-5, address)
    kernels.bn_grad_stats(place, x, x, 0, bits, *norm, True, 0, address, address, address)
    if kernels.fits_on_chip(place) and not offset and (mask or channels % 8 == 0):
        kernels.bn_stats_apply(place, x, 0, 0, 0, *[address] * 4, 0.1, 1e-5, True, address, bits, address)
    for launch in host.launches()[::2]:  # bn_stats, bn_grad_stats, bn_stats_apply; not those that merge
        assert launch.grid[1] * channels * 12 <= available
    kernels.bn_apply(place, x, *norm, x, True, address, bits)
    kernels.bn_apply_dual(place, x, *norm, x, *norm, True, address, bits)
    kernels.bn_grad_apply(place, x, x, bits, *norm, address, address, True, address, address)
    kernels.avgpool(place, x, address)
    assert len(host.launches()) == 4


@host_only
def test_sizes_that_no_kernel_can_take(device, host) -> None:
    kernels, dtype = host.module.cuda, host.module.DType.float16
    for sizes in ((0, 8, 2, 2), (1, 0, 2, 2), (1, 8, -1, 2), (1, 8, 2, 2**31)):
        with pytest.raises(ValueError, match=r"images, channels, height and width must be 1 to 2\^31 - 1"):
            kernels.Place(*sizes, dtype, 0, 0)
    place = kernels.Place(1, 8, 4, 4, dtype, 0, 0)
    for filters, kernel in ((0, (1, 1)), (12, (1, 1)), (8, (5, 5))):
        with pytest.raises(ValueError, match="multiples of 8, and at least one output pixel"):
            kernels.ConvShape(place, filters, kernel, (1, 1), (0, 0), (1, 1))
    shape = kernels.ConvShape(place, 8, (1, 1), (1, 1), (0, 0), (1, 1))
    arguments = [4096, 4096, 0, 0, 0, True, 4096, 4096]
    for index in (0, 1, 2, 3, 4, 6, 7):
        wrong = list(arguments)
        wrong[index] = 4104
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            kernels.conv_bn_act(place, shape, kernels.ConvChoice(0, 1), *wrong)
    with pytest.raises(ValueError, match="takes a workspace"):
        kernels.conv_bn_act(place, shape, kernels.ConvChoice(0, 2), *arguments[:-1], 0)


@pytest.mark.parametrize("channels", [1, 3, 8, 31, 32, 33, 64, 2049])
def test_rows_of_a_mask(channels: int, device) -> None:
    """As ops/reference/mask.py says, where backward looks for them."""
    assert (5, cuda_launch.kernels().mask_stride(channels)) == reference.mask_shape((5, channels, 1, 1))


# Where tensors begin


@every_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [2, 4, 8])
def test_misaligned_addresses(name: str, dtype: torch.dtype, offset: int, device) -> None:
    """Each tensor alone so many bytes behind a multiple of 16. Passes without sums give the same bits; where rows go to
    other threads, sums are added in another order."""
    calls = every_call(dtype, device)
    if name not in calls or offset % dtype.itemsize:
        pytest.skip(f"{dtype} has no such {name}")
    op, args = calls[name]
    expected = call(op, *with_own_running(op, tuple(args)))
    x = x_of(op, args)
    for index, tensor in enumerate(args):
        if not isinstance(tensor, Tensor) or offset % tensor.element_size():
            continue
        other = with_own_running(op, tuple(args))
        other[index] = misaligned(tensor, offset // tensor.element_size())
        found = call(op, *other)
        if op in ("bn_stats", "bn_stats_apply", "bn_grad_stats", "bn_grad_stats_mask", "avgpool"):
            for part, (a, b) in enumerate(zip(outputs(found), outputs(expected), strict=True)):
                if a.is_floating_point():
                    unit = torch.finfo(a.dtype).eps
                    size = b.abs().max().item() if b.numel() else 0
                    torch.testing.assert_close(a, b, rtol=0, atol=8 * unit * size, msg=f"{name}: {index}, {part}")
        else:
            assert_same_bits(found, expected, x, f"{name}, argument {index}")


# On a real device


@pytest.mark.gpu
@every_name
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_captured_in_a_graph(name: str, dtype: torch.dtype, device) -> None:
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    op, args = every_call(dtype, device, (4, 64, 28, 28))[name]
    expected = call(op, *with_own_running(op, tuple(args)))
    own = with_own_running(op, tuple(args))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(op, *own)
    for _ in range(3):
        for tensor in outputs(found):
            tensor.zero_()
        graph.replay()
        assert_same_bits(found, expected, x_of(op, args), name)


@pytest.mark.gpu
@every_name
def test_on_a_stream_of_its_own(name: str, device) -> None:
    """Behind work on that stream which makes its input: on any other it would read zeros."""
    if device.type != "cuda":
        pytest.skip("streams are CUDA's")
    op, args = every_call(HALF, device, (4, 64, 28, 28))[name]
    expected = call(op, *with_own_running(op, tuple(args)))
    x = x_of(op, args)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        found = call(op, *(late if each is x else each for each in with_own_running(op, tuple(args))))
    stream.synchronize()
    assert_same_bits(found, expected, x, name)


@pytest.mark.gpu
def test_past_two_to_the_31(device) -> None:
    """Offsets past 2^31 elements: the last image of 2.2e9 elements is what it is alone."""
    if device.type != "cuda":
        pytest.skip("too large for the host")
    shape = (33, 64, 1024, 1024)
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("20 GB of free memory are needed")
    torch.use_deterministic_algorithms(False)  # no time for filling
    x = torch.zeros(shape, dtype=HALF, device=device, memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x[-1] = torch.randn(shape[1:], device=device)
    mean, invstd = call("bn_stats", x, None, None, 0.1, 1e-5)
    last, count = x[-1:].double(), 33 * 2**20
    torch.testing.assert_close(mean.double(), last.sum((0, 2, 3)) / count, rtol=1e-5, atol=1e-8)
    variance = last.square().sum((0, 2, 3)) / count - mean.double().square()
    torch.testing.assert_close(invstd.double(), torch.rsqrt(variance + 1e-5), rtol=1e-5, atol=0)
    out, mask = call("bn_apply_mask", x, mean, invstd, None, None, None)
    alone, bits = call("bn_apply_mask", channels_last(x[-1:]), mean, invstd, None, None, None)
    assert same_bits(out[-1:], alone) and torch.equal(mask[-(2**20) :], bits)
    exact = by_reference("bn_apply", last, mean.double(), invstd.double(), None, None, None, True)
    baseline = by_reference("bn_apply", x[-1:], mean, invstd, None, None, None, True)
    assert_at_most_twice(out[-1:], baseline, exact, what="the last image")
