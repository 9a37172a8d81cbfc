"""``residual_block`` against the plain PyTorch that its docstring says it equals: derivatives, numbers, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.blocks import (
    ACCURATE,
    BLOCKS,
    FROZEN,
    LANES,
    LEVELS,
    MEMORY,
    NARROW,
    ONE,
    TWO,
    Block,
    Link,
    Tensors,
    assert_at_most_twice_eager,
    assert_close,
    buffers,
    cotangent_of,
    fused,
    gradients,
    leaves_of,
    plain,
    running,
    step,
    tensors_of,
    widen,
)
from tests.ops.step import FORMATS

# Derivatives against finite differences.


def check_derivatives(check: Callable[..., bool], block: Block, level: int, memory: str, **settings: Any) -> None:
    tensors = tensors_of(block)
    names = [name for name in tensors if not name.startswith("running")]

    def function(*leaves: Tensor) -> Tensor:
        return fused(block, memory)({**tensors, **dict(zip(names, leaves, strict=True))})

    # The statistics that move do not matter to a norm in training, and do not move in eval.
    with running(level):
        assert check(function, [tensors[name].requires_grad_() for name in names], **settings)


SMALL = {
    "basic": Block((2, 2, 3, 3), (Link(2), Link(2))),
    "basic, projection": Block((2, 2, 3, 3), (Link(3, stride=TWO), Link(3)), Link(3, ONE, TWO)),
    "bottleneck": Block((2, 3, 3, 2), (Link(2, ONE), Link(2, **FROZEN), Link(3, ONE))),
    "bottleneck, projection": Block((2, 2, 3, 3), (Link(2, ONE), Link(2, stride=TWO), Link(3, ONE)), Link(3, ONE, TWO)),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("block", SMALL.values(), ids=SMALL)
def test_first_derivatives_against_finite_differences(block, level):
    for memory in MEMORY:
        check_derivatives(torch.autograd.gradcheck, block, level, memory)


@pytest.mark.parametrize("block", SMALL.values(), ids=SMALL)
def test_second_derivatives_against_finite_differences(block):
    check_derivatives(torch.autograd.gradgradcheck, block, 3, "efficient", fast_mode=True)


# The numbers, in float64.


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_output_gradients_and_buffers_are_those_of_plain_pytorch(block):
    tensors = tensors_of(block)
    cotangent = torch.randn(plain(block)(widen(tensors)).shape, dtype=torch.float64)
    expected = step(plain(block), tensors, cotangent)
    for level in LEVELS:
        for memory in MEMORY:
            with running(level):
                assert_close(step(fused(block, memory), tensors, cotangent), expected)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("level", [0, 2, 3])
def test_layout_and_odd_inputs(level, memory_format):
    """The result lies as conv2d's; an x that is cropped or expanded, and a gradient that is, are read as they lie."""
    block = Block((2, 4, 7, 6), (Link(4), Link(4)))
    tensors = tensors_of(block)
    wide = torch.randn(2, 4, 14, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    wide.requires_grad_()
    results = []
    for function in (fused(block), fused(block, "efficient"), plain(block)):
        leaves, wide.grad = leaves_of(tensors), None
        x = wide[:, :, ::2, 1:]
        with running(level):
            out = function({**leaves, "x": x})
            out.sum().backward()
        assert out.is_contiguous(memory_format=memory_format)
        results.append({"output": out.detach(), "x": wide.grad, **gradients(leaves), **buffers(leaves)})
    for result in results[:2]:
        assert_close(result, results[2])


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_empty_batch(backend):
    """As nn.BatchNorm2d: no error, gradients of 0."""
    block = Block((0, 3, 5, 7), (Link(4, stride=TWO), Link(4)), Link(4, ONE, TWO))
    tensors, cotangent = tensors_of(block), torch.empty(0, 4, 3, 4, dtype=torch.float64)
    expected = step(plain(block), tensors, cotangent)
    with running(3, backend):
        actual = step(fused(block), tensors, cotangent)
    for name, want in expected.items():
        if not name.startswith("running") or backend == "auto":  # the reference's moments of nothing are NaN
            assert torch.equal(actual[name], want), name


# Accuracy, in the dtypes that are trained in.


lanes = pytest.mark.parametrize("lane", LANES.values(), ids=LANES)
in_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def in_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def assert_accurate(
    block: Block,
    tensors: Tensors,
    lane: tuple[str, int | None, str],
    scale: float = 1.0,
    wanted: tuple[str, ...] | None = None,
) -> None:
    """The accuracy rule on the output, every gradient and every buffer.

    Statistics and the gradients of parameters are sums over N*H*W values, in float32 at least: that many roundings.
    """
    backend, level, memory = lane
    if backend == "auto" and level in (None, 1):  # what the kernels take
        tensors = {name: in_channels_last(tensor) for name, tensor in tensors.items()}
    cotangent = cotangent_of(block, tensors) * scale
    with running(level, backend):
        actual = step(fused(block, memory), tensors, cotangent, wanted)
    baseline = step(plain(block), tensors, cotangent, wanted)
    exact = step(plain(block), widen(tensors), cotangent.double(), wanted)
    assert_at_most_twice_eager(actual, baseline, exact)


@lanes
@in_both_dtypes
@pytest.mark.parametrize("block", ACCURATE.values(), ids=ACCURATE)
def test_accuracy(block, dtype, lane):
    assert_accurate(block, tensors_of(block, dtype), lane)


@lanes
@in_both_dtypes
@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_accuracy_of_huge_and_tiny_gradients(scale, dtype, lane):
    """Nothing on the way may overflow, or be lost, that is neither in PyTorch."""
    block = ACCURATE["basic, projection"]
    assert_accurate(block, tensors_of(block, dtype), lane, scale)


@lanes
@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_accuracy_where_the_mean_is_much_larger_than_the_deviation(offset, lane):
    """E(x^2) - E(x)^2 would have no digits left: of conv1's output, and of conv2's by a large bias in
    front of it. The convolutions have no padding, which would be a deviation. The gradient of bias1
    is left out: where the ReLU passes everything it is 0, a sum of nothing but rounding."""
    block = Block((4, 6, 9, 7), (Link(6, ONE), Link(6, ONE)))
    tensors = tensors_of(block)
    tensors["x"] = tensors["x"] + offset
    tensors["bias1"] += 30
    wanted = ("x", "conv1", "weight1", "conv2", "weight2", "bias2")
    assert_accurate(block, {name: tensor.float() for name, tensor in tensors.items()}, lane, wanted=wanted)


@lanes
@in_both_dtypes
def test_the_padding_is_of_the_activation(dtype, lane):
    """relu(bn(0)) of a padded 0 would be about 20, among activations of about 20 that are multiplied by 0 instead."""
    for block in (ACCURATE["basic"], Block((2, 4, 9, 8), (NARROW, Link(3, dilation=TWO), Link(4, ONE)))):
        tensors = tensors_of(block, dtype)
        tensors["bias1"] += 20
        assert_accurate(block, tensors, lane)


@lanes
@in_both_dtypes
def test_dead_channels(dtype, lane):
    """gamma = 0: y no longer says what the activation was. With a bias of 0 as well, z is 0 and passes no gradient."""
    block = ACCURATE["basic, projection"]
    tensors = tensors_of(block, dtype)
    for name in ("weight1", "weight2", "weights"):
        tensors[name][:3] = 0
    tensors["bias1"][:3] = torch.tensor([0.0, 1.0, -1.0])
    tensors["bias2"][:3] = torch.tensor([0.0, 1.0, -1.0])
    tensors["biass"][0] = 0
    assert_accurate(block, tensors, lane)


def test_gradients_of_float32_weights_of_bfloat16_images_are_not_rounded_to_bfloat16():
    """Vectors may be of either; level 3 has the sums of the weights' gradients in float32 and gives them so."""
    block = ACCURATE["basic"]
    for vectors in (torch.float32, torch.bfloat16):
        tensors = tensors_of(block, torch.bfloat16, vectors)
        assert_accurate(block, tensors, LANES["reference, level 3"])
