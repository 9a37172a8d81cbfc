"""What ``residual_block`` computes in backward, and what it keeps for it: nothing that nobody asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fused_resnet.bench.ledger import saved_bytes
from tests.ops.blocks import (
    BASIC,
    BASIC_PROJECTION,
    BOTTLENECK,
    BOTTLENECK_PROJECTION,
    FROZEN,
    LEVELS,
    MEMORY,
    ONE,
    TWO,
    Block,
    Count,
    Link,
    Tensors,
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
)
from tests.ops.step import NEEDS_NATIVE

# Nothing is computed that nobody asked for.


def ran_backward(block: Block, level: int, wanted: tuple[str, ...], memory: str = "default") -> dict[str, int]:
    leaves = leaves_of(tensors_of(block), wanted)
    with running(level):
        out = fused(block, memory)(leaves)
        with Count() as count:
            out.sum().backward()
    assert sorted(gradients(leaves)) == sorted(f"gradient of {name}" for name in wanted)
    return {name: times for name, times in count.ran.items() if times}


EVERYTHING = ("x", *(name + suffix for suffix in "12" for name in ("conv", "weight", "bias")))
VECTORS = ("weight1", "bias1", "weight2", "bias2")
# Of a basic block at level 3: (what requires a gradient, the passes of its backward).
PASSES = {
    "everything": (
        EVERYTHING,
        {"bn_grad_stats": 1, "bn_grad_coefficients": 2, "conv_grad_weight": 2, "conv_grad_input": 2},
    ),
    "not x": (
        EVERYTHING[1:],
        {"bn_grad_stats": 1, "bn_grad_coefficients": 2, "conv_grad_weight": 2, "conv_grad_input": 1},
    ),
    "x": (("x",), {"bn_grad_stats": 1, "bn_grad_coefficients": 2, "conv_grad_input": 2}),
    "convolutions frozen": (
        ("x", *VECTORS),
        {"bn_grad_stats": 1, "bn_grad_coefficients": 2, "conv_grad_input": 2},
    ),
    "norms alone": (VECTORS, {"bn_grad_stats": 1, "bn_grad_coefficients": 1, "conv_grad_input": 1}),
    "last bias": (("bias2",), {"bn_grad_stats": 1}),
    "last norm": (("weight2", "bias2"), {"bn_grad_stats": 1}),
    "last convolution": (("conv2",), {"bn_grad_stats": 1, "bn_grad_coefficients": 1, "conv_grad_weight": 1}),
    "first convolution": (
        ("conv1",),
        {"bn_grad_stats": 1, "bn_grad_coefficients": 2, "conv_grad_weight": 1, "conv_grad_input": 1},
    ),
}


@pytest.mark.parametrize(("wanted", "passes"), PASSES.values(), ids=PASSES)
def test_passes_of_backward(wanted, passes):
    assert ran_backward(BASIC, 3, wanted) == passes


@pytest.mark.parametrize(("wanted", "passes"), PASSES.values(), ids=PASSES)
def test_passes_of_backward_with_the_convolutions_of_pytorch(wanted, passes):
    """Level 0: bn_grad_apply for each dy; bn_grad_stats for each norm; conv1's activation again for conv2's weight, and
    before that, the memory being "efficient", for conv2's output."""
    expected = Counter({name: times for name, times in passes.items() if name.startswith("conv")})
    expected["bn_grad_apply"] = passes.get("bn_grad_coefficients", 0)
    expected["bn_grad_stats"] = 1 + ("conv_grad_input" in passes)
    expected["bn_apply"] = 1 + ("conv2" in wanted)
    expected["convolution"] = 1
    assert ran_backward(BASIC, 0, wanted, "efficient") == {name: times for name, times in expected.items() if times}


def test_what_efficient_computes_again():
    """The last convolution, at level 1 with the activation in front of it."""
    once = ran_backward(BOTTLENECK, 3, ("x",))
    assert ran_backward(BOTTLENECK, 3, ("x",), "efficient") == {**once, "conv_stats": 1}
    once = ran_backward(BOTTLENECK, 1, ("x",))
    assert ran_backward(BOTTLENECK, 1, ("x",), "efficient") == {**once, "convolution": 1, "bn_apply": 1}


def test_passes_of_a_projection():
    coefficients, weight, grad = "bn_grad_coefficients", "conv_grad_weight", "conv_grad_input"
    for wanted, passes in {
        ("convs",): {"bn_grad_stats": 2, coefficients: 1, weight: 1},
        ("biass",): {"bn_grad_stats": 2},
        ("bias2",): {"bn_grad_stats": 1},
        ("conv2",): {"bn_grad_stats": 1, coefficients: 1, weight: 1},
        ("x",): {"bn_grad_stats": 2, coefficients: 3, grad: 3},
    }.items():
        assert ran_backward(BASIC_PROJECTION, 3, wanted) == passes, wanted


def test_no_sums_for_frozen_norms_that_need_none():
    """Fine-tuning with frozen norms: the sums over a channel are the gradients of weight and bias, and no more."""
    frozen = Block((2, 3, 7, 5), (Link(4, stride=TWO, **FROZEN), Link(4, **FROZEN)), Link(4, ONE, TWO, **FROZEN))
    wanted = ("x", "conv1", "conv2", "convs")
    convolutions = {"conv_grad_weight": 3, "conv_grad_input": 3}
    assert ran_backward(frozen, 3, wanted) == {"bn_grad_stats": 1, "bn_grad_coefficients": 3, **convolutions}
    passes = {"bn_grad_stats": 1, "bn_grad_apply": 3, "bn_apply": 2, "convolution": 1}
    assert ran_backward(frozen, 0, wanted, "efficient") == {**passes, **convolutions}
    assert ran_backward(frozen, 0, (*wanted, "bias1"), "efficient")["bn_grad_stats"] == 2
    assert ran_backward(frozen, 0, (*wanted, "weights"), "efficient")["bn_grad_stats"] == 2


@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("block", [BASIC_PROJECTION, BOTTLENECK], ids=["projection", "identity"])
def test_a_gradient_is_the_same_whatever_else_is_wanted(block, level):
    tensors = tensors_of(block)
    cotangent = cotangent_of(block, tensors)
    with running(level):
        everything = step(fused(block), tensors, cotangent)
        for name in tensors:
            if not name.startswith("running"):
                alone = step(fused(block), tensors, cotangent, (name,))
                assert list(gradients_in(alone)) == [f"gradient of {name}"]
                assert_close(alone, {n: everything[n] for n in alone}, 0)


def gradients_in(result: Tensors) -> Tensors:
    return {name: tensor for name, tensor in result.items() if name.startswith("gradient")}


# What is kept for backward.


def kept_bytes(function: Callable[[Tensors], Tensor], leaves: Tensors) -> int:
    """Of all that is saved beside the parameters and buffers, each storage once."""
    owned = nn.ParameterList([t for name, t in leaves.items() if name != "x" and not name.startswith("running")])
    return saved_bytes(owned, lambda: function(leaves))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("block", "inside"),
    [
        (BASIC, [(3, 4, 5, 7), (3, 4, 5, 7)]),
        (BOTTLENECK, [(2, 3, 5, 6), (2, 3, 5, 6), (2, 8, 5, 6)]),
        (BASIC_PROJECTION, [(2, 4, 4, 3), (2, 4, 4, 3), (2, 4, 4, 3)]),
    ],
    ids=["basic", "bottleneck", "basic, projection"],
)
def test_kept_for_backward_are_x_the_result_and_the_outputs_of_the_convolutions(block, inside, level):
    """And mean and invstd of each norm; of the efficient block, not the last convolution's output."""
    leaves = leaves_of(tensors_of(block, torch.float32))
    sizes = [torch.Size(shape).numel() for shape in inside]
    last = len(block.chain) - 1
    vectors = sum(2 * shape[1] for shape in inside)
    values = leaves["x"].numel() + sizes[last] + sum(sizes) + vectors
    with running(level):
        if level > 0:  # else there is no block: each norm is a step of its own
            assert kept_bytes(fused(block), leaves) == 4 * values
        assert kept_bytes(fused(block, "efficient"), leaves) == 4 * (values - sizes[last])


@NEEDS_NATIVE
def test_efficient_keeps_less_than_pytorch_does():
    """Where no level was asked for: the default is a step of autograd for each norm there, efficient the whole."""
    block = Block((2, 16, 9, 9), (Link(4, ONE), Link(4), Link(16, ONE)))
    leaves = leaves_of(tensors_of(block, torch.float32))
    with running(None, "auto"):
        ours, efficient, theirs = (
            kept_bytes(function, leaves) for function in (fused(block), fused(block, "efficient"), plain(block))
        )
    assert efficient < 0.75 * ours < theirs


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("level", LEVELS)
def test_without_gradients_nothing_is_kept_and_the_statistics_move_all_the_same(level, memory):
    tensors = tensors_of(BOTTLENECK_PROJECTION)
    expected = step(plain(BOTTLENECK_PROJECTION), tensors, torch.zeros(2, 8, 5, 4))
    for mode in (torch.no_grad(), torch.inference_mode()):
        leaves = leaves_of(tensors)
        with running(level), mode:
            out = fused(BOTTLENECK_PROJECTION, memory)(leaves)
        assert not out.requires_grad
        assert_close({"output": out, **buffers(leaves)}, {n: t for n, t in expected.items() if n[:8] != "gradient"})
    with running(level):
        leaves = leaves_of(tensors, ())
        assert fused(BOTTLENECK_PROJECTION, memory)(leaves).grad_fn is None  # nothing requires a gradient
        assert kept_bytes(fused(BOTTLENECK_PROJECTION, memory), leaves) == 0
