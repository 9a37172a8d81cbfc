"""Routes: who runs a pass, a convolution of a training step or a whole block, decided once and kept.

A route is found by everything that its decision depends on: shapes, strides, dtypes, device, settings and the current
`Request`; whoever asks again with the same gets the same object. Forward takes the route, backward gets it from
forward's context. A convolution that stays at level 0 keeps the reasons why with its route.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops.layout import are_plain, conv_memory_format, is_channels_last_once_dense
from fused_resnet.ops.plan import measured_plan
from fused_resnet.ops.route import context, fusion_level
from fused_resnet.ops.route.context import for_listeners, is_transformed
from fused_resnet.ops.route.reasons import FUSED_DTYPES, module, reasons_against, why_not_device
from fused_resnet.ops.route.request import AUTO, Request
from fused_resnet.ops.route.signatures import (
    Convolution,
    DispatchedConvolution,
    FusedConvolutions,
    MaskPasses,
    OneLaunch,
    Passes,
    PoolPasses,
    dispatched,
    functions_of,
)

MOST_KEPT = 4096
FEWEST_ELEMENTS = 1 << 15
"""Of a float32 activation on a CPU: with fewer, batch_norm, add and relu of PyTorch take less time than one step of
autograd in Python, forward and backward (they meet between 25 and 65 thousand, with one thread and with two)."""

kept: dict[tuple[Any, ...], Any] = {}
"""Every route of the process; none once the measured plan has changed."""
measured_plan.forget_answers.append(lambda: kept.clear())


UNKNOWN = object()
"""In the place of what is not kept: None is an answer."""


def keep(key: tuple[Any, ...], route: Any) -> Any:
    """The route itself, from now on found under the key."""
    if len(kept) >= MOST_KEPT:
        kept.clear()
    kept[key] = route
    return route


@dataclass(frozen=True, slots=True)
class PassRoute:
    """Who runs the passes over an activation."""

    passes: Passes
    masks: MaskPasses | None = None
    """Not None where the ReLU after a residual keeps a bit of each element for backward, instead of its output."""
    one_launch: OneLaunch | None = None
    """Not None where statistics, and what is made with them, are one launch."""
    asked: Request | None = None
    """What it was decided under; None in a graph of torch.compile's, which asks when it runs."""

    @property
    def heard(self) -> PassRoute:
        """The same passes by way of PyTorch's dispatcher."""
        masks = None if self.masks is None else dispatched(MaskPasses, self.asked)
        one_launch = None if self.one_launch is None else dispatched(OneLaunch, self.asked)
        return PassRoute(dispatched(Passes, self.asked), masks, one_launch, self.asked)


@dataclass(frozen=True, slots=True)
class LinkRoute:
    """Who runs a convolution of a training step, and the passes over its output."""

    level: int
    """How far it is fused with the norms around it, 0 to 3 (``ops/route/fusion_level.py``)."""
    settings: ConvSettings
    over_output: PassRoute
    convolution: Convolution | None = None
    """Of a level 1 or 2 that leaves statistics and gradients of norms to passes of their own."""
    fused: FusedConvolutions | None = None
    """Of the other levels from 1 on; neither at level 0, whose convolution is PyTorch's."""
    why_level_0: tuple[str, ...] = ()

    @property
    def passes(self) -> Passes:
        return self.over_output.passes

    @property
    def heard(self) -> LinkRoute:
        """The same by way of PyTorch's dispatcher."""
        asked = self.over_output.asked
        return replace(
            self,
            over_output=self.over_output.heard,
            convolution=None if self.convolution is None else DispatchedConvolution(self.settings, asked),
            fused=None if self.fused is None else dispatched(FusedConvolutions, asked),
        )


@dataclass(frozen=True, slots=True)
class BlockRoute:
    """Who runs a residual block in training: as one step of autograd, or link by link."""

    chain: tuple[LinkRoute, ...]
    """Empty where the block is better run link by link, a step of autograd for each norm."""
    shortcut: LinkRoute | None
    efficient: bool
    """Whether the output of the chain's last convolution is computed again in backward, and not kept."""
    before: PassRoute
    """Over the block's input."""
    fewest_values: int
    """Of a channel, of the convolutions' outputs: one alone has no variance."""
    heard: BlockRoute | None = field(default=None, repr=False)
    """The same by way of PyTorch's dispatcher; None of that itself."""

    @classmethod
    def of(
        cls,
        chain: tuple[LinkRoute, ...],
        shortcut: LinkRoute | None,
        efficient: bool,
        before: PassRoute,
        fewest_values: int,
    ) -> BlockRoute:
        other = None if shortcut is None else shortcut.heard
        heard = cls(tuple(link.heard for link in chain), other, efficient, before.heard, fewest_values)
        return cls(chain, shortcut, efficient, before, fewest_values, heard)


@dataclass(frozen=True, slots=True)
class StemRoute:
    """Who runs a network's stem in training: the convolution, and norm, ReLU and pooling as one pass."""

    link: LinkRoute
    pool: PoolPasses
    heard: StemRoute | None = field(default=None, repr=False)
    """The same by way of PyTorch's dispatcher; None of that itself."""

    @classmethod
    def of(cls, link: LinkRoute, pool: PoolPasses) -> StemRoute:
        return cls(link, pool, cls(link.heard, dispatched(PoolPasses, link.over_output.asked)))


def pass_route(x: Tensor, *beside: Tensor | None) -> PassRoute | None:
    """Who runs the passes over x, and what goes in beside it, by themselves; None where PyTorch's own batch_norm, add
    and relu are faster.

    A backend asked for by name, the reference included, always runs them (or raises). Inside ``torch.func`` and
    forward-mode differentiation, and for subclasses of Tensor (DTensor), which take PyTorch's own ops only, nobody.
    """
    if torch.compiler.is_compiling():
        return DISPATCHED if _compiles(x) else None
    if torch._C._get_tracing_state() is not None:  # sizes are no plain numbers, and not to be kept
        route = _decide_passes(x)
        return None if route is None else route.heard
    if x.is_cpu and x.dtype is torch.float32 and x.numel() < FEWEST_ELEMENTS and context.request().is_open:
        return None
    return for_listeners(kept_pass_route(x)) if are_plain(*beside) else None


def kept_pass_route(x: Tensor) -> PassRoute | None:
    """`pass_route`, however small x is, where nobody listens at the dispatcher and nothing is compiled."""
    key = (type(x), x.shape, x.stride(), x.dtype, x.device, context.request())
    route = kept.get(key, UNKNOWN)
    if route is not UNKNOWN:
        return route
    return None if is_transformed() else keep(key, _decide_passes(x))  # under vmap nobody may ask how x lies


def link_route(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> LinkRoute:
    """Who runs this convolution of x, of the dtype, device and memory format that it gets; not kept by itself."""
    over_output = kept_pass_route(output_like(x, conv_weight, settings)) or DISPATCHED
    reasons = fusion_level.why_not_fused(x, conv_weight, settings)
    level = 0 if reasons else fusion_level.level_of_fused(x, conv_weight, settings)
    forward = fusion_level.arguments_of_conv_stats(x, conv_weight, settings)
    natively = 0 < level <= fusion_level.NATIVE_LEVEL and fusion_level.is_native(x)
    convolution = fused = None
    if natively and not reasons_against("native", "conv_stats", forward):
        convolution = module("native").NativeConvolution(x.shape, conv_weight.shape, settings)
    elif level > 0:
        fused = _fused_convolutions(forward)
    return LinkRoute(level, settings, over_output, convolution, fused, tuple(reasons))


def output_like(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> Tensor:
    """An empty tensor such as the convolution of x gives."""
    shape = (x.shape[0], conv_weight.shape[0], *settings.output_size(x.shape, conv_weight.shape))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=conv_memory_format(x, conv_weight))


def pool_passes(y: Tensor) -> PoolPasses:
    """Who runs pooling fused with the norm and ReLU before it, where ``why_not_fused_pool`` is empty."""
    asked = context.request()
    if asked.backend == "triton" or (y.is_cuda and asked.backend == AUTO):
        return functions_of(module("triton"), PoolPasses)
    return (
        functions_of(module("reference"), PoolPasses) if asked.backend == "reference" else dispatched(PoolPasses, asked)
    )


def _fused_convolutions(forward: tuple[Any, ...]) -> FusedConvolutions:
    """For these arguments of ``conv_stats``."""
    asked = context.request()
    if asked.backend == "reference":
        return functions_of(module("reference"), FusedConvolutions)
    if asked.backend in (AUTO, "triton") and not reasons_against("triton", "conv_stats", forward):
        return functions_of(module("triton"), FusedConvolutions)
    return dispatched(FusedConvolutions, asked)


def _decide_passes(x: Tensor) -> PassRoute | None:
    asked = context.request()
    if not are_plain(x):
        return None
    if asked.backend == AUTO and (x.dtype not in FUSED_DTYPES or x.numel() == 0):
        return None
    masks = dispatched(MaskPasses, asked) if asked.masks else None
    name = _backend_of_passes(x)
    if name is None:
        fallback = asked.backend != AUTO
        return PassRoute(dispatched(Passes, asked), masks, asked=asked) if fallback else None
    backend = module(name)
    elsewhere = measured_plan.other_backend_for_passes(x, name)
    passes = dispatched(Passes, asked) if elsewhere else functions_of(backend, Passes)
    if name != "cuda":
        return PassRoute(passes, masks, asked=asked)
    one_launch = functions_of(backend, OneLaunch) if backend.fits_on_chip(x) else None
    return PassRoute(passes, functions_of(backend, MaskPasses), one_launch, asked)


def _backend_of_passes(x: Tensor) -> str | None:
    """The backend whose functions run every pass over x; None where each has to be asked for, or refused."""
    asked = context.request().backend
    if asked == "reference":
        return asked
    if x.dtype not in FUSED_DTYPES or x.numel() == 0:
        return None
    for name in ("cuda", "triton", "native"):
        if asked not in (AUTO, name) or why_not_device(name, x.device):
            continue
        if name == "native" and x.device.type != "cpu":
            continue
        return name if name == "native" or is_channels_last_once_dense(x) else None
    return None


def _works(backend: str, device: torch.device) -> bool:
    return not why_not_device(backend, device)


# What torch.compiler.assume_constant_result does, which imports torch._dynamo: ten times the time of this package.
_works._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _compiles(x: Tensor) -> bool:
    """``pass_route(x) is not None``, as torch.compile can trace it. An exported program has PyTorch's own ops, which
    the tools for it know."""
    if torch.compiler.is_exporting():
        return False
    if context.requested_backend() != AUTO:
        return True
    if x.dtype not in FUSED_DTYPES or x.numel() == 0:
        return False
    if x.device.type == "cuda":
        return (_works("cuda", x.device) or _works("triton", x.device)) and is_channels_last_once_dense(x)
    return x.device.type == "cpu" and _works("native", x.device)


DISPATCHED = PassRoute(dispatched(Passes))
"""What torch.compile's graphs hold."""
