"""``residual_block`` against the plain PyTorch that its docstring says it equals, at every level and in both modes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_resnet.bench.saved_bytes import saved_bytes
from fused_resnet.ops import BatchNorm, ConvNorm, residual_block, use_backend, use_fusion_level
from fused_resnet.ops.reference import statistics_dtype
from tests.accuracy import assert_at_most_twice
from tests.ops.step import FORMATS, NEEDS_NATIVE

LEVELS = (0, 1, 2, 3)
MEMORY = ("default", "efficient")
FLOAT64 = 1e-10
"""Relative to the largest value of a tensor: float64 rounds at 1e-16, a wrong formula shows at 1e-3 and above."""


@dataclass(frozen=True)
class Link:
    """A convolution and a norm. The padding keeps height and width, but for the stride."""

    filters: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    weight: bool = True
    bias: bool = True
    running: bool = True
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5


@dataclass(frozen=True)
class Block:
    """A block, and the shape of its input."""

    shape: tuple[int, int, int, int]
    chain: tuple[Link, ...]
    shortcut: Link | None = None

    @property
    def links(self) -> dict[str, Link]:
        """Every link by the suffix of its tensors' names."""
        links = {str(index): link for index, link in enumerate(self.chain, 1)}
        return links if self.shortcut is None else {**links, "s": self.shortcut}


ONE = (1, 1)
TWO = (2, 2)
NARROW = Link(3, ONE)
BASIC = Block((3, 4, 5, 7), (Link(4), Link(4)))
BASIC_PROJECTION = Block((2, 3, 7, 5), (Link(4, stride=TWO), Link(4)), Link(4, ONE, TWO))
BOTTLENECK = Block((2, 8, 5, 6), (NARROW, Link(3), Link(8, ONE)))
BOTTLENECK_PROJECTION = Block((2, 5, 9, 7), (NARROW, Link(3, stride=TWO), Link(8, ONE)), Link(8, ONE, TWO))
FROZEN = {"training": False}
BLOCKS = {
    "basic": BASIC,
    "basic, projection, odd sizes": BASIC_PROJECTION,
    "bottleneck": BOTTLENECK,
    "bottleneck, projection, odd sizes": BOTTLENECK_PROJECTION,
    "one image": Block((1, 4, 5, 3), (Link(4), Link(4))),
    "down to one pixel": Block((2, 3, 2, 2), (Link(4, stride=TWO), Link(4)), Link(4, ONE, TWO)),
    "a single link": Block((2, 4, 5, 6), (Link(4),)),
    "four links": Block((2, 3, 5, 6), (Link(3), Link(2, ONE), Link(2), Link(3, ONE))),
    "dilation": Block((2, 4, 9, 8), (NARROW, Link(3, dilation=(2, 3)), Link(4, ONE))),
    "groups in the middle": Block(
        (2, 8, 5, 6), (Link(4, ONE), Link(4, groups=2, stride=TWO), Link(8, ONE)), Link(8, ONE, TWO)
    ),
    "groups first": Block((2, 4, 5, 6), (Link(4, groups=4), Link(4))),
    "oblong kernel and stride": Block((2, 3, 6, 7), (Link(4, (1, 5), (1, 2)), Link(4, (3, 1))), Link(4, ONE, (1, 2))),
    "first norm frozen": Block((3, 4, 5, 7), (Link(4, **FROZEN), Link(4))),
    "last norm and projection's frozen": Block(
        (2, 3, 7, 5), (Link(4, stride=TWO), Link(4, **FROZEN)), Link(4, ONE, TWO, **FROZEN)
    ),
    "every norm frozen": Block((2, 5, 4, 7), (NARROW, Link(3, **FROZEN), Link(5, ONE, **FROZEN))),
    "affine=False": Block((3, 4, 5, 7), (Link(4, weight=False, bias=False), Link(4, weight=False, bias=False))),
    "no bias, no weight": Block((2, 3, 7, 5), (Link(4, bias=False), Link(4, weight=False)), Link(4, ONE, bias=False)),
    "no running statistics": Block((3, 4, 5, 7), (Link(4, running=False), Link(4)), Link(4, ONE, running=False)),
    "momentum and eps": Block(
        (3, 4, 5, 7), (Link(4, momentum=0.0, eps=0.5), Link(4, momentum=1.0)), Link(4, ONE, momentum=0.3)
    ),
}
Tensors = dict[str, Tensor]


def tensors_of(block: Block, dtype: torch.dtype = torch.float64, vectors: torch.dtype | None = None) -> Tensors:
    """Random arguments for the block; its vectors are in ``statistics_dtype`` unless given."""
    channels = block.shape[1]
    made = {"x": torch.randn(block.shape)}
    for suffix, link in block.links.items():
        channels = block.shape[1] if suffix == "s" else channels
        fan_in = channels // link.groups * link.kernel[0] * link.kernel[1]
        made["conv" + suffix] = torch.randn(link.filters, channels // link.groups, *link.kernel) * fan_in**-0.5
        made["weight" + suffix] = torch.rand(link.filters) + 0.5 if link.weight else None
        made["bias" + suffix] = torch.randn(link.filters) * 0.5 if link.bias else None
        made["running_mean" + suffix] = torch.randn(link.filters) * 0.3 if link.running else None
        made["running_var" + suffix] = torch.rand(link.filters) + 0.5 if link.running else None
        channels = link.filters
    vectors = vectors or statistics_dtype(torch.empty(0, dtype=dtype))
    return {
        name: tensor.to(dtype if tensor.dim() == 4 else vectors) for name, tensor in made.items() if tensor is not None
    }


def conv_norms(block: Block, tensors: Tensors) -> tuple[list[ConvNorm], ConvNorm | None]:
    """(chain, shortcut) as ``residual_block`` takes them."""
    links = {}
    for suffix, link in block.links.items():
        vectors = (tensors.get(name + suffix) for name in ("weight", "bias", "running_mean", "running_var"))
        padding = tuple(d * (k - 1) // 2 for d, k in zip(link.dilation, link.kernel, strict=True))
        norm = BatchNorm(*vectors, link.training, link.momentum, link.eps)
        links[suffix] = ConvNorm(tensors["conv" + suffix], norm, link.stride, padding, link.dilation, link.groups)
    shortcut = links.pop("s", None)
    return list(links.values()), shortcut


def fused(block: Block, memory: str = "default") -> Callable[[Tensors], Tensor]:
    def call(tensors: Tensors) -> Tensor:
        return residual_block(tensors["x"], *conv_norms(block, tensors), memory=memory)

    return call


def plain(block: Block, relu: bool = True) -> Callable[[Tensors], Tensor]:
    """The equivalent PyTorch of ``residual_block``'s docstring."""

    def batch_norm(h: Tensor, link: ConvNorm) -> Tensor:
        h = F.conv2d(h, link.conv_weight, None, link.stride, link.padding, link.dilation, link.groups)
        weight, bias, running_mean, running_var, training, momentum, eps, _ = link.norm
        return F.batch_norm(h, running_mean, running_var, weight, bias, training, momentum, eps)

    def call(tensors: Tensors) -> Tensor:
        chain, shortcut = conv_norms(block, tensors)
        h = x = tensors["x"]
        for link in chain:
            h = batch_norm(h if h is x else F.relu(h), link)
        z = h + (x.to(h.dtype) if shortcut is None else batch_norm(x, shortcut))
        return F.relu(z) if relu else z

    return call


def leaves_of(tensors: Tensors, wanted: tuple[str, ...] | None = None) -> Tensors:
    """Copies to compute with; all that is no buffer requires a gradient, or what ``wanted`` names."""
    leaves = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name in [name for name in leaves if not name.startswith("running")] if wanted is None else wanted:
        leaves[name].requires_grad_()
    return leaves


def gradients(tensors: Tensors) -> Tensors:
    return {f"gradient of {name}": t.grad for name, t in tensors.items() if t.grad is not None}


def buffers(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("running")}


def step(
    function: Callable[[Tensors], Tensor],
    tensors: Tensors,
    cotangent: Tensor,
    wanted: tuple[str, ...] | None = None,
) -> Tensors:
    """The output, every gradient, and every buffer after the pass."""
    leaves = leaves_of(tensors, wanted)
    out = function(leaves)
    if out.requires_grad:
        out.backward(cotangent.to(out.dtype))
    return {"output": out.detach(), **gradients(leaves), **buffers(leaves)}


def cotangent_of(block: Block, tensors: Tensors) -> Tensor:
    """A random gradient of the output, 0 where rounding may decide on which side of the ReLU's corner a value lies."""
    z = plain(block, relu=False)(widen(tensors))
    return torch.where(z.abs() > 0.05, torch.randn(z.shape), 0).to(tensors["x"].dtype)


def widen(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().double() for name, tensor in tensors.items()}


def assert_close(actual: Tensors, expected: Tensors, tolerance: float = FLOAT64) -> None:
    """The same names, dtypes and values, within ``tolerance`` of each tensor's largest."""
    assert list(actual) == list(expected)
    for name, want in expected.items():
        limit = tolerance * max(want.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            actual[name], want, rtol=0, atol=limit, check_stride=False, msg=lambda m, n=name: f"{n}: {m}"
        )


@contextlib.contextmanager
def running(level: int | None, backend: str = "reference") -> Iterator[None]:
    with use_backend(backend), use_fusion_level(level):
        yield


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


LANES = {
    "reference, level 1": ("reference", 1, "default"),
    "reference, level 2, efficient": ("reference", 2, "efficient"),
    "reference, level 3": ("reference", 3, "default"),
    "reference, level 3, efficient": ("reference", 3, "efficient"),
    "auto, one by one": ("auto", 0, "default"),
    "auto, efficient": ("auto", None, "efficient"),
    "auto, level 3": ("auto", 3, "default"),
}
lanes = pytest.mark.parametrize("lane", LANES.values(), ids=LANES)
in_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


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
    cotangent = cotangent_of(block, tensors) * scale
    with running(level, backend):
        actual = step(fused(block, memory), tensors, cotangent, wanted)
    baseline = step(plain(block), tensors, cotangent, wanted)
    exact = step(plain(block), widen(tensors), cotangent.double(), wanted)
    assert_at_most_twice_eager(actual, baseline, exact)


def assert_at_most_twice_eager(actual: Tensors, baseline: Tensors, exact: Tensors) -> None:
    assert list(actual) == list(baseline) == list(exact)
    values = actual["output"].numel() // actual["output"].shape[1]
    for name, tensor in actual.items():
        is_sum = tensor.dtype == torch.float32 and name not in ("output", "gradient of x")
        assert_at_most_twice(tensor, baseline[name], exact[name], what=name, terms=values if is_sum else 1)


ACCURATE = {
    "basic": Block((4, 6, 9, 7), (Link(6), Link(6))),
    "basic, projection": Block((4, 5, 9, 7), (Link(6, stride=TWO), Link(6)), Link(6, ONE, TWO)),
    "bottleneck, groups, frozen": Block((3, 8, 7, 9), (Link(4, ONE), Link(4, groups=2, **FROZEN), Link(8, ONE))),
    "bottleneck, projection": Block((3, 4, 9, 7), (NARROW, Link(3, stride=TWO), Link(8, ONE)), Link(8, ONE, TWO)),
}


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


# Nothing is computed that nobody asked for.


class Count(TorchDispatchMode):
    """What runs: our ops, and PyTorch's convolutions. convolution_backward by the gradients it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2]
        if func is torch.ops.aten.convolution_backward.default:
            of_input, of_weight, _ = args[-1]
            self.ran["conv_grad_input"] += of_input
            self.ran["conv_grad_weight"] += of_weight
        elif func.name().startswith("fused_resnet::") or func is torch.ops.aten.convolution.default:
            self.ran[name] += 1
        return func(*args, **(kwargs or {}))


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


# Refusals.


def wrong_link(index: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        link = arguments["chain"][index]
        norm = link.norm._replace(**{k: v for k, v in fields.items() if k in BatchNorm._fields})
        link = link._replace(norm=norm)
        arguments["chain"][index] = link._replace(**{k: v for k, v in fields.items() if k in ConvNorm._fields})

    return change


def wrong(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update(changed)


def wrong_shortcut(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update(shortcut=arguments["shortcut"]._replace(**fields))


def an_element(name: str, index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments[name].__setitem__(index, value)


# (what is wrong, error, what the message says)
REFUSALS = {
    "x of no tensor": (wrong(x=[1.0]), TypeError, "^x must be a Tensor; got list"),
    "x of three dimensions": (wrong(x=torch.randn(3, 7, 5)), ValueError, r"^x must have 4 dimensions .* got 3"),
    "x of integers": (wrong(x=torch.ones(2, 3, 7, 5, dtype=torch.int64)), TypeError, "^x must have dtype .*int64"),
    "x without channels": (wrong(x=torch.ones(2, 0, 7, 5)), ValueError, "^x must have at least one channel"),
    "x of other channels": (
        wrong(x=torch.randn(2, 4, 7, 5)),
        ValueError,
        r"^chain\[0\]: x must have 3 channels .* got 4",
    ),
    "x of another dtype": (wrong(x=torch.randn(2, 3, 7, 5).double()), TypeError, r"^chain\[0\]: conv_weight .*float64"),
    "x elsewhere": (wrong(x=torch.randn(2, 3, 7, 5, device="meta")), ValueError, r"conv_weight must be on x's device"),
    "memory": (wrong(memory="little"), ValueError, "^memory must be 'default' or 'efficient'; got 'little'"),
    "no memory": (wrong(memory=None), ValueError, "^memory must be .* got None"),
    "an empty chain": (wrong(chain=[]), ValueError, "^chain must hold at least one ConvNorm; got none"),
    "no chain": (wrong(chain=None), ValueError, "^chain must hold at least one"),
    "a chain of modules": (wrong(chain=[nn.Conv2d(3, 4, 1)]), TypeError, r"^chain\[0\] must be a ConvNorm; got Conv2d"),
    "a norm in the chain": (
        an_element("chain", 1, BatchNorm(*[None] * 4)),
        TypeError,
        r"^chain\[1\] must be a ConvNorm",
    ),
    "a norm as shortcut": (
        wrong(shortcut=BatchNorm(*[None] * 4)),
        TypeError,
        "^shortcut must be a ConvNorm; got BatchN",
    ),
    "channels in the middle": (
        wrong_link(1, conv_weight=torch.ones(4, 5, 3, 3)),
        ValueError,
        r"^chain\[1\]: x must have 5",
    ),
    "a kernel of 3 dimensions": (
        wrong_link(0, conv_weight=torch.ones(4, 3, 3)),
        ValueError,
        r"^chain\[0\]: conv_weight .* 4 d",
    ),
    "a kernel of bfloat16": (
        wrong_link(1, conv_weight=torch.ones(4, 4, 3, 3, dtype=torch.bfloat16)),
        TypeError,
        r"^chain\[1\]: conv_weight must have x's dtype, torch.float32; got torch.bfloat16",
    ),
    "groups": (wrong_link(0, groups=3), ValueError, r"^chain\[0\]: groups must .* divide the 4 output channels; got 3"),
    "a stride of 0": (wrong_link(0, stride=(0, 1)), ValueError, r"^chain\[0\]: stride must be >= 1"),
    "a stride of one number": (wrong_link(0, stride=2), TypeError, r"^chain\[0\]: stride must be two ints; got 2"),
    "a negative padding": (wrong_link(1, padding=(-1, 1)), ValueError, r"^chain\[1\]: padding must be >= 0"),
    "padding by name": (wrong_link(1, padding="same"), TypeError, r"^chain\[1\]: padding must be .* got 'same'"),
    "a dilation of 3": (wrong_link(1, dilation=(1, 1, 1)), TypeError, r"^chain\[1\]: dilation must be .*two ints"),
    "no norm": (wrong_link(1, norm=None), TypeError, r"^chain\[1\]: norm must be a BatchNorm; got NoneType"),
    "weight": (wrong_link(1, weight=torch.ones(3)), ValueError, r"^chain\[1\]: weight must have shape \(4,\)"),
    "running_var": (
        wrong_link(0, running_var=None),
        ValueError,
        r"^chain\[0\]: running_mean and running_var must both",
    ),
    "momentum": (wrong_link(1, momentum=None), TypeError, r"^chain\[1\]: momentum must be a float; got NoneType"),
    "eps": (wrong_link(1, eps=-1.0), ValueError, r"^chain\[1\]: eps must be >= 0"),
    "process_group": (wrong_link(1, process_group="world"), TypeError, r"^chain\[1\]: process_group must .* got str"),
    "eval without statistics": (
        wrong_link(1, training=False, running_mean=None, running_var=None),
        ValueError,
        r"^chain\[1\]: running_mean and running_var must be given",
    ),
    "nothing left": (
        wrong_link(1, padding=(0, 0), dilation=(4, 4)),
        ValueError,
        r"^chain\[1\]: .*pixel .* -4 x -5 from 4 x 3",
    ),
    "no shortcut": (wrong(shortcut=None), ValueError, r"chain's result, \(2, 4, 4, 3\), .* got \(2, 3, 7, 5\)"),
    "a shortcut of another stride": (
        wrong_shortcut(stride=(1, 1)),
        ValueError,
        r"shortcut's must .* got \(2, 4, 7, 5\)",
    ),
    "a shortcut to other channels": (
        wrong_shortcut(conv_weight=torch.ones(5, 3, 1, 1)),
        ValueError,
        r"^shortcut: weight must have shape \(5,\)",
    ),
    "one value per channel": (
        wrong(x=torch.randn(1, 3, 2, 2)),
        ValueError,
        r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 4, 1, 1\]\)",
    ),
}


@pytest.mark.parametrize("level", [None, 3])
@pytest.mark.parametrize(("change", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_the_argument_and_leave_the_statistics_alone(change, error, message, level):
    tensors = tensors_of(BASIC_PROJECTION, torch.float32)
    before = {name: tensor.clone() for name, tensor in buffers(tensors).items()}
    chain, shortcut = conv_norms(BASIC_PROJECTION, tensors)
    arguments = {"x": tensors["x"], "chain": chain, "shortcut": shortcut, "memory": "default"}
    change(arguments)
    with running(level, "auto"), pytest.raises(error, match=message):
        residual_block(**arguments)
    assert_close(buffers(tensors), before, 0)


# The four ops of a training convolution as the dispatcher and the compiler see them.


def op_arguments(x: Tensor) -> dict[str, tuple[Tensor | None, ...]]:
    """Every form of each op: with and without what is in front, statistics, the norm behind, and residual."""
    channels, filters, wide = x.shape[1], 8, statistics_dtype(x)
    conv_weight = torch.randn(filters, channels, 3, 3).to(x.dtype)
    conv = ([1, 2], [1, 1], [1, 1], 1)
    y = F.conv2d(x, conv_weight, None, *conv)
    dz = torch.randn_like(y)
    front = tuple(torch.rand(channels, dtype=wide) + 0.5 for _ in range(4))
    bare, no_affine = (None,) * 4, (*front[:2], None, None)
    behind = tuple(torch.rand(filters, dtype=wide) + 0.5 for _ in range(2))
    vectors = tuple(torch.rand(filters, dtype=wide) for _ in range(5))
    coefficients, residual = torch.rand(4, filters, dtype=wide), torch.randn_like(x)
    return {
        "conv_stats": (
            (x, conv_weight, *front, *behind, 0.1, 1e-5, *conv, True),
            (x, conv_weight, *no_affine, None, None, 0.1, 1e-5, *conv, True),
            (x, conv_weight, *bare, *behind, 0.1, 1e-5, *conv, True),
            (x, conv_weight, *front, None, None, 0.0, 0.0, *conv, False),
        ),
        "bn_grad_coefficients": ((*vectors, 12.0), (*vectors[:4], None, 12.0), (None, None, *vectors[2:], 12.0)),
        "conv_grad_input": (
            (dz, y, coefficients, conv_weight, x, *front, None, *conv),
            (dz, None, coefficients, conv_weight, x, *no_affine, None, *conv),
            (dz, y, coefficients, conv_weight, x, *bare, residual, *conv),
            (dz, None, None, conv_weight, x, *bare, None, *conv),
            (dz, None, None, conv_weight, x, *front, residual, *conv),
        ),
        "conv_grad_weight": (
            (dz, y, coefficients, x, *front, conv_weight, *conv),
            (dz, None, coefficients, x, *no_affine, conv_weight, *conv),
            (dz, None, None, x, *bare, conv_weight, *conv),
        ),
    }


OPS = ("conv_stats", "bn_grad_coefficients", "conv_grad_input", "conv_grad_weight")


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [(torch.float32, FORMATS["nhwc"]), (torch.bfloat16, FORMATS["nchw"]), (torch.float64, FORMATS["nchw"])],
    ids=["float32 nhwc", "bfloat16 nchw", "float64 nchw"],
)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, dtype, memory_format):
    """The schema tells the truth about mutation and aliasing, and fake tensors about shapes, dtypes and strides."""
    x = torch.randn(2, 5, 6, 7).to(dtype).contiguous(memory_format=memory_format)
    for arguments in op_arguments(x)[op]:
        torch.library.opcheck(getattr(torch.ops.fused_resnet, op).default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_cropped_images(op):
    x = torch.randn(2, 6, 7, 9).contiguous(memory_format=torch.channels_last)[:, 1:, :6, 1:]
    for arguments in op_arguments(x)[op]:
        torch.library.opcheck(getattr(torch.ops.fused_resnet, op).default, arguments, test_utils="test_faketensor")
