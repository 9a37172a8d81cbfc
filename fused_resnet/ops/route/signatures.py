"""Ops by group, each a function of some backend: what a route holds. ``ops/reference/`` says what each op means."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fused_resnet.arguments import NO_RUNNING_STATISTICS, ConvSettings, Norm, PoolSettings, RunningStatistics, Sums
from fused_resnet.ops.route.context import asking
from fused_resnet.ops.route.packing import BY_DISPATCHER
from fused_resnet.ops.route.request import Request

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes over an activation that every backend has."""

    bn_stats: Callable[[Tensor, RunningStatistics], Two]
    bn_apply: Callable[[Tensor, Norm, Tensor | None, bool], Tensor]
    bn_apply_dual: Callable[[Tensor, Norm, Tensor, Norm, bool], Tensor]
    bn_grad_stats: Callable[[Tensor, Tensor, Tensor | None, Norm, bool], Three]
    bn_grad_apply: Callable[[Tensor, Tensor, Norm, Sums | None, bool], Tensor]


@dataclass(frozen=True, slots=True)
class MaskPasses:
    """Passes that keep or read one bit of each element for a ReLU's backward."""

    bn_apply_mask: Callable[[Tensor, Norm, Tensor | None], Two]
    bn_apply_dual_mask: Callable[[Tensor, Norm, Tensor, Norm], Two]
    bn_grad_stats_mask: Callable[[Tensor, Tensor, Tensor, Norm, bool], Three]
    bn_grad_apply_mask: Callable[[Tensor, Tensor, Tensor, Norm, Sums | None, bool], Two]


@dataclass(frozen=True, slots=True)
class OneLaunch:
    """Statistics, and what is made with them, without reading x twice."""

    bn_stats_apply: Callable[
        [Tensor, RunningStatistics, Tensor | None, Tensor | None, Tensor | None, bool, bool],
        tuple[Tensor, Tensor, Tensor, Tensor],
    ]


@dataclass(frozen=True, slots=True)
class PoolPasses:
    """Norm, ReLU and max pooling as one pass, and its backward."""

    bn_apply_pool: Callable[[Tensor, Norm, PoolSettings], Two]
    bn_pool_grad_stats: Callable[[Tensor, Tensor, Tensor, Norm, PoolSettings], Two]
    bn_pool_grad_apply: Callable[[Tensor, Tensor, Tensor, Norm, Sums | None, PoolSettings], Tensor]


@dataclass(frozen=True, slots=True)
class FusedConvolutions:
    """Convolutions of a training step with what stands before and after them."""

    conv_stats: Callable[[Tensor, Tensor, Norm | None, RunningStatistics, ConvSettings, bool], Three]
    conv_grad_input: Callable[
        [Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Norm | None, Tensor | None, ConvSettings], Three
    ]
    conv_grad_weight: Callable[
        [Tensor, Tensor | None, Tensor | None, Tensor, Norm | None, Tensor, ConvSettings], Tensor
    ]
    bn_grad_coefficients: Callable[[Sums | None, Norm, float], Tensor]


class Convolution(Protocol):
    """A convolution of a training step and its gradients, the passes beside it left to others (levels 1 and 2).

    ``norm``: what, with a ReLU, makes of x what is convolved; None for x itself.
    """

    def forward(self, x: Tensor, conv_weight: Tensor, norm: Norm | None, /) -> Tensor: ...

    def grad_input(self, dy: Tensor, conv_weight: Tensor, x: Tensor, residual: Tensor | None, /) -> Tensor:
        """The gradient of what was convolved, in x's shape, plus ``residual``."""

    def grad_weight(self, dy: Tensor, conv_weight: Tensor, x: Tensor, norm: Norm | None, /) -> Tensor: ...


class DispatchedConvolution:
    """A `Convolution` by way of PyTorch's dispatcher."""

    def __init__(self, settings: ConvSettings, asked: Request | None) -> None:
        self._ops, self._settings = dispatched(FusedConvolutions, asked), settings

    def forward(self, x: Tensor, conv_weight: Tensor, norm: Norm | None) -> Tensor:
        return self._ops.conv_stats(x, conv_weight, norm, NO_RUNNING_STATISTICS, self._settings, False)[0]

    def grad_input(self, dy: Tensor, conv_weight: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._ops.conv_grad_input(dy, None, None, conv_weight, x, None, residual, self._settings)[0]

    def grad_weight(self, dy: Tensor, conv_weight: Tensor, x: Tensor, norm: Norm | None) -> Tensor:
        return self._ops.conv_grad_weight(dy, None, None, x, norm, conv_weight, self._settings)


Group = TypeVar("Group", Passes, MaskPasses, OneLaunch, PoolPasses, FusedConvolutions)


def functions_of(backend: ModuleType, group: type[Group]) -> Group:
    """The ops of this group as a backend's module exports them."""
    return group(*(getattr(backend, field.name) for field in fields(group)))


def dispatched(group: type[Group], asked: Request | None = None) -> Group:
    """The ops of this group by way of PyTorch's dispatcher, which chooses a backend at every call: for whoever listens
    there.

    Args:
        asked: what they run under, wherever they are called; None for the request there.
    """
    functions = [BY_DISPATCHER[field.name] for field in fields(group)]
    return group(*(functions if asked is None else (_under(asked, function) for function in functions)))


def _under(asked: Request, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with asking(**asked._asdict()):
            return function(*arguments)

    return run
