"""Autograd, autocast, compilers and transforms around ``residual_block``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.ops.blocks import (
    ACCURATE,
    BASIC,
    BASIC_PROJECTION,
    BLOCKS,
    BOTTLENECK_PROJECTION,
    FLOAT64,
    LANES,
    LEVELS,
    MEMORY,
    Block,
    Count,
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

# Autograd around the block.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["x", "conv1", "weight1", "bias1", "conv2", "weight2", "convs", "weights"])
def test_changing_in_place_what_backward_needs_raises(name, level):
    leaves = leaves_of(tensors_of(BASIC_PROJECTION))
    with running(level):
        out = fused(BASIC_PROJECTION)(leaves)
        with torch.no_grad():
            leaves[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_changing_the_result_in_place_raises():
    """It is the mask of the last ReLU."""
    with running(3), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused(BASIC)(leaves_of(tensors_of(BASIC))).add_(1).sum().backward()


@pytest.mark.parametrize("level", [0, 3])
def test_running_statistics_may_move_before_backward(level):
    """Frozen norms included: what normalised in forward is what backward goes by."""
    block = BLOCKS["last norm and projection's frozen"]
    results = []
    for move in (False, True):
        leaves = leaves_of(TENSORS)
        with running(level):
            out = fused(block, "efficient")(leaves)
            if move:
                for buffer in buffers(leaves).values():
                    buffer.add_(1)
            out.square().sum().backward()
        results.append(gradients(leaves))
    assert_close(results[1], results[0], 0)


TENSORS = tensors_of(BLOCKS["last norm and projection's frozen"])


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("level", [0, 3])
def test_backward_twice_gives_the_same_and_gradients_add_up(level, memory):
    leaves = leaves_of(tensors_of(BOTTLENECK_PROJECTION))
    wanted = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    with running(level):
        loss = fused(BOTTLENECK_PROJECTION, memory)(leaves).square().sum()
        first, second = (torch.autograd.grad(loss, wanted.values(), retain_graph=True) for _ in range(2))
        loss.backward(retain_graph=True)
        loss.backward()
    for name, one, other in zip(wanted, first, second, strict=True):
        assert torch.equal(one, other), name
        torch.testing.assert_close(leaves[name].grad, 2 * one, rtol=1e-14, atol=0)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("level", [1, 3])
def test_parameters_used_twice(level, create_graph):
    """The block behind itself, and one convolution and norm in both places of a block: gradients are of one use each,
    and autograd adds them. With ``create_graph``, backward must not go on into the graph that x came from."""

    def twice(function: Callable[[Tensors], Tensor]) -> Tensors:
        leaves = leaves_of(tensors)
        loss = function({**leaves, "x": function(leaves)}).square().sum()
        wanted = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
        found = torch.autograd.grad(loss, wanted.values(), create_graph=create_graph, allow_unused=True)
        return {name: grad.detach() for name, grad in zip(wanted, found, strict=True) if grad is not None}

    def tied(function: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Tensor]:
        return lambda t: function({**t, **{name + "2": t[name + "1"] for name in ("conv", "weight", "bias")}})

    tensors = tensors_of(BASIC)
    with running(level):
        assert_close(twice(fused(BASIC)), twice(plain(BASIC)))
        assert_close(twice(tied(fused(BASIC))), twice(tied(plain(BASIC))))


@pytest.mark.parametrize("level", [1, 3])
def test_create_graph_is_the_same_gradient_and_has_one_of_its_own(level):
    """A gradient penalty, in bfloat16 too, of an x that was copied to lie densely, and of some parameters only."""
    for dtype, tolerance in ((torch.float64, FLOAT64), (torch.bfloat16, 0.1)):
        block = BLOCKS["last norm and projection's frozen"]
        tensors = tensors_of(block, dtype)
        wide = torch.randn(2, 3, 7, 10).to(dtype)
        penalties = []
        for function, given in ((fused(block), tensors), (plain(block), widen(tensors))):
            leaves = leaves_of(given, ("conv2", "weights", "bias1"))
            image = wide.clone().to(given["x"].dtype).requires_grad_()
            with running(level):
                out = function({**leaves, "x": image[:, :, :, ::2]})
                (grad,) = torch.autograd.grad(out.square().sum(), image, create_graph=True)
                grad.square().sum().backward()
            penalties.append([grad.detach(), image.grad, *gradients(leaves).values()])
        for mine, theirs in zip(*penalties, strict=True):
            assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


def test_a_block_keeps_its_level_for_backward():
    """Autograd runs backward wherever the user calls it, long after the ``with``."""
    tensors, ran = tensors_of(BASIC), []
    for level in (1, 3):
        leaves = leaves_of(tensors)
        with running(level):
            out = fused(BASIC)(leaves)
        with Count() as count:
            out.sum().backward()
        ran.append(count.ran)
    assert "bn_grad_coefficients" not in ran[0] and ran[1]["bn_grad_coefficients"] == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("memory", MEMORY)
def test_checkpointing_gives_the_same_gradients(memory, use_reentrant):
    tensors = tensors_of(BOTTLENECK_PROJECTION)
    function = fused(BOTTLENECK_PROJECTION, memory)
    cotangent = cotangent_of(BOTTLENECK_PROJECTION, tensors)
    with running(3):
        expected = step(function, tensors, cotangent)
        actual = step(
            lambda leaves: checkpoint(lambda x: function({**leaves, "x": x}), leaves["x"], use_reentrant=use_reentrant),
            tensors,
            cotangent,
        )
    moved = [name for name in expected if name.startswith("running")]  # twice: only a module knows of checkpoints
    assert_close(*({name: t for name, t in result.items() if name not in moved} for result in (actual, expected)), 0)


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("images", [torch.float32, torch.bfloat16], ids=["first block", "later block"])
@pytest.mark.parametrize(
    "lane", [LANES["reference, level 3"], LANES["reference, level 2, efficient"], LANES["auto, efficient"]]
)
def test_autocast(lane, images, inside):
    """float32 weights get float32 gradients; the result is in autocast's dtype, as the convolutions of eager's are."""
    backend, level, memory = lane
    block = ACCURATE["bottleneck, projection"]
    tensors = tensors_of(block, torch.float32)
    tensors["x"] = tensors["x"].to(images)
    cotangent = cotangent_of(block, tensors).to(torch.bfloat16)

    def run(function: Callable[[Tensors], Tensor]) -> Tensors:
        leaves = leaves_of(tensors)
        with torch.autocast("cpu", torch.bfloat16):
            out = function(leaves)
            if inside:
                out.backward(cotangent)
        if not inside:
            out.backward(cotangent)
        return {"output": out.detach(), **gradients(leaves), **buffers(leaves)}

    with running(level, backend):
        actual = run(fused(block, memory))
    baseline, exact = run(plain(block)), step(plain(block), widen(tensors), cotangent.double())
    assert actual["output"].dtype == torch.bfloat16
    assert actual["gradient of conv2"].dtype == torch.float32
    assert_at_most_twice_eager(actual, baseline, exact)


class ImageDtypes(TorchDispatchMode):
    """The dtypes of the images and kernels that each of our ops gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("fused_resnet::"):
            images = {arg.dtype for arg in args if isinstance(arg, Tensor) and arg.dim() == 4}
            self.seen.setdefault(func.name().partition("::")[2], set()).update(images)
        return func(*args, **(kwargs or {}))


def test_under_autocast_the_ops_get_one_dtype():
    """The reference's conv2d would be autocast; a kernel's is not."""
    leaves = leaves_of(tensors_of(BASIC_PROJECTION, torch.float32))
    with running(3), ImageDtypes() as dtypes, torch.autocast("cpu", torch.bfloat16):
        fused(BASIC_PROJECTION, "efficient")(leaves).sum().backward()
    assert {"conv_stats", "conv_grad_input", "conv_grad_weight"} <= dtypes.seen.keys()
    assert set().union(*dtypes.seen.values()) == {torch.bfloat16}


def test_autocast_leaves_float64_alone():
    tensors = tensors_of(BASIC)
    cotangent = torch.randn(BASIC.shape, dtype=torch.float64)
    with running(3):
        expected = step(fused(BASIC), tensors, cotangent)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(step(fused(BASIC), tensors, cotangent), expected, 0)


# Compilers and transforms, which get the links one by one.


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("block", [BASIC, BOTTLENECK_PROJECTION], ids=["basic", "bottleneck projection"])
def test_compiles_without_a_graph_break(block, memory):
    tensors = tensors_of(block, torch.float32)
    cotangent = cotangent_of(block, tensors)
    torch._dynamo.reset()
    compiled = torch.compile(fused(block, memory), fullgraph=True, backend="aot_eager")
    with running(3):
        assert_close(step(compiled, tensors, cotangent), step(plain(block), tensors, cotangent), 1e-5)


def test_torch_func():
    tensors = tensors_of(BASIC_PROJECTION)
    x = tensors.pop("x")

    def results(block: Block, function: Callable[[Block], Callable[[Tensors], Tensor]]) -> tuple[Tensor, ...]:
        def loss(x: Tensor) -> Tensor:
            return function(block)({**tensors, "x": x}).square().sum()

        _, forward_mode = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
        return torch.func.grad(loss)(x), forward_mode

    with running(3):
        torch.testing.assert_close(results(BASIC_PROJECTION, fused), results(BASIC_PROJECTION, plain))
