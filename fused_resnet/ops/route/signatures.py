"""Ops by group, each a function of some backend: what a route holds. ``ops/reference/`` says what each op means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Protocol, TypeVar

import torch
from torch import Tensor

import fused_resnet.ops.schemas  # noqa: F401  defines the ops of the dispatcher
from fused_resnet.ops.conv_settings import ConvSettings

Vector = Tensor | None
Vectors = tuple[Tensor, Tensor, Vector, Vector]
"""mean, invstd, weight and bias of a norm."""
Pair = list[int]
Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes over an activation that every backend has."""

    bn_stats: Callable[[Tensor, Vector, Vector, float, float], Two]
    bn_apply: Callable[[Tensor, Tensor, Tensor, Vector, Vector, Tensor | None, bool], Tensor]
    bn_apply_dual: Callable[
        [Tensor, Tensor, Tensor, Vector, Vector, Tensor, Tensor, Tensor, Vector, Vector, bool], Tensor
    ]
    bn_grad_stats: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Vector, Vector, bool], Three]
    bn_grad_apply: Callable[[Tensor, Tensor, Tensor, Tensor, Vector, Vector, Vector, Vector, bool], Tensor]


@dataclass(frozen=True, slots=True)
class MaskPasses:
    """Passes that keep or read one bit of each element for a ReLU's backward."""

    bn_apply_mask: Callable[[Tensor, Tensor, Tensor, Vector, Vector, Tensor | None], Two]
    bn_apply_dual_mask: Callable[[Tensor, Tensor, Tensor, Vector, Vector, Tensor, Tensor, Tensor, Vector, Vector], Two]
    bn_grad_stats_mask: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], Three]
    bn_grad_apply_mask: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Vector, Vector, Vector, bool], Two]


@dataclass(frozen=True, slots=True)
class OneLaunch:
    """Statistics, and what is made with them, without reading x twice."""

    bn_stats_apply: Callable[
        [Tensor, Vector, Vector, float, float, Vector, Vector, Tensor | None, bool, bool],
        tuple[Tensor, Tensor, Tensor, Tensor],
    ]


@dataclass(frozen=True, slots=True)
class PoolPasses:
    """Norm, ReLU and max pooling as one pass, and its backward; the pairs are kernel size, stride and padding."""

    bn_apply_pool: Callable[[Tensor, Tensor, Tensor, Vector, Vector, Pair, Pair, Pair], Two]
    bn_pool_grad_stats: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Vector, Vector, Pair, Pair, Pair], Two]
    bn_pool_grad_apply: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Vector, Vector, Vector, Vector, Pair, Pair, Pair], Tensor
    ]


@dataclass(frozen=True, slots=True)
class FusedConvolutions:
    """Convolutions of a training step with what stands before and after them; at the end stride, padding, dilation,
    groups (and whether statistics are wanted)."""

    # fmt: off
    conv_stats: Callable[
        [Tensor, Tensor, Vector, Vector, Vector, Vector, Vector, Vector, float, float, Pair, Pair, Pair, int, bool],
        Three,
    ]
    conv_grad_input: Callable[
        [Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Vector, Vector, Vector, Vector, Tensor | None,
         Pair, Pair, Pair, int],
        Three,
    ]
    conv_grad_weight: Callable[
        [Tensor, Tensor | None, Tensor | None, Tensor, Vector, Vector, Vector, Vector, Tensor, Pair, Pair, Pair, int],
        Tensor,
    ]
    # fmt: on
    bn_grad_coefficients: Callable[[Vector, Vector, Tensor, Tensor, Vector, float], Tensor]


class Convolution(Protocol):
    """A convolution of a training step and its gradients, the passes beside it left to others (levels 1 and 2).

    ``before``: mean, invstd, weight and bias of the norm that, with a ReLU, makes of x what is convolved; Nones for x
    itself.
    """

    def forward(self, x: Tensor, conv_weight: Tensor, before: tuple[Vector, ...], /) -> Tensor: ...

    def grad_input(self, dy: Tensor, conv_weight: Tensor, x: Tensor, residual: Tensor | None, /) -> Tensor:
        """The gradient of what was convolved, in x's shape, plus ``residual``."""

    def grad_weight(self, dy: Tensor, conv_weight: Tensor, x: Tensor, before: tuple[Vector, ...], /) -> Tensor: ...


class DispatchedConvolution:
    """A `Convolution` by way of PyTorch's dispatcher."""

    def __init__(self, settings: ConvSettings) -> None:
        self._sizes = settings.lists

    def forward(self, x: Tensor, conv_weight: Tensor, before: tuple[Vector, ...]) -> Tensor:
        still = (None, None, 0.0, 0.0)
        return torch.ops.fused_resnet.conv_stats(x, conv_weight, *before, *still, *self._sizes, False)[0]

    def grad_input(self, dy: Tensor, conv_weight: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        no_norm = (None, None, None, None)
        conv_grad_input = torch.ops.fused_resnet.conv_grad_input
        return conv_grad_input(dy, None, None, conv_weight, x, *no_norm, residual, *self._sizes)[0]

    def grad_weight(self, dy: Tensor, conv_weight: Tensor, x: Tensor, before: tuple[Vector, ...]) -> Tensor:
        return torch.ops.fused_resnet.conv_grad_weight(dy, None, None, x, *before, conv_weight, *self._sizes)


Group = TypeVar("Group", Passes, MaskPasses, OneLaunch, PoolPasses, FusedConvolutions)


def functions_of(backend: ModuleType, group: type[Group]) -> Group:
    """The ops of this group as a backend's module exports them."""
    return group(*(getattr(backend, field.name) for field in fields(group)))


def dispatched(group: type[Group]) -> Group:
    """The ops of this group by way of PyTorch's dispatcher, which chooses a backend at every call: for whoever listens
    there."""
    return group(*(getattr(torch.ops.fused_resnet, field.name) for field in fields(group)))
