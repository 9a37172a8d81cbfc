"""Every op of the cuda backend on a GPU: captured in a graph, on a stream of its own, past 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.ops import reference
from tests.accuracy import assert_at_most_twice
from tests.cuda.cases import (
    HALF,
    HALVES,
    assert_same_bits,
    call,
    channels_last,
    every_call,
    every_name,
    outputs,
    same_bits,
    with_own_running,
    x_of,
)


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
    exact = reference.bn_apply(last, mean.double(), invstd.double(), None, None, None, True)
    baseline = reference.bn_apply(x[-1:], mean, invstd, None, None, None, True)
    assert_at_most_twice(out[-1:], baseline, exact, what="the last image")
