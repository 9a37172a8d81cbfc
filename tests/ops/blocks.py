"""Residual blocks as data, run by ``residual_block`` and by the plain PyTorch that it equals."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.ops import BatchNorm, ConvNorm, residual_block, use_backend, use_fusion_level
from fused_resnet.ops.reference import statistics_dtype
from tests.accuracy import assert_at_most_twice

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


LANES = {
    "reference, level 1": ("reference", 1, "default"),
    "reference, level 2, efficient": ("reference", 2, "efficient"),
    "reference, level 3": ("reference", 3, "default"),
    "reference, level 3, efficient": ("reference", 3, "efficient"),
    "auto, one by one": ("auto", 0, "default"),
    "auto": ("auto", None, "default"),
    "auto, efficient": ("auto", None, "efficient"),
    "auto, level 1": ("auto", 1, "default"),
    "auto, level 3": ("auto", 3, "default"),
}


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
