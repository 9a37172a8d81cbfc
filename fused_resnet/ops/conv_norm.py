"""One link of a residual block in training: a convolution, the batch norm after it, and the norm and ReLU before.

What stands before a convolution is given raw, as the tensor that the convolution before wrote and the vectors that
normalise it; whether the activation is ever written is decided here, by the level of the link's route.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops.batch_norm import BatchNorm
from fused_resnet.ops.conv_settings import ConvSettings
from fused_resnet.ops.layout import resolved
from fused_resnet.ops.reference import statistics_dtype
from fused_resnet.ops.route.routes import LinkRoute
from fused_resnet.ops.route.signatures import Passes, Vector, Vectors
from fused_resnet.ops.synchronize import group_to_share, statistics_over_ranks, sums_over_ranks

Prologue = tuple[Vector, Vector, Vector, Vector]
NO_NORM: Prologue = (None, None, None, None)
Moving = tuple[Vector, Vector, float, float]
"""Running statistics, how far they move, and eps."""
STILL: Moving = (None, None, 0.0, 0.0)


class ConvNorm(NamedTuple):
    """A convolution without bias and the batch norm after it."""

    conv_weight: Tensor
    """(K, C / groups, R, S)."""
    norm: BatchNorm
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def resolved(self) -> ConvNorm:
        """The same; no lazily negated view among what is only read."""
        return self._replace(conv_weight=resolved(self.conv_weight), norm=self.norm.resolved())

    @property
    def settings(self) -> ConvSettings:
        return ConvSettings.of(self.stride, self.padding, self.dilation, self.groups)

    @property
    def conv(self) -> tuple[Tensor, ConvSettings]:
        return self.conv_weight, self.settings


class Raw(NamedTuple):
    """An activation as it lies in memory: the block's input (``vectors`` None), or what a convolution wrote, which its
    norm's vectors and a ReLU would make the activation of."""

    tensor: Tensor
    vectors: Vectors | None
    passes: Passes
    """Who runs the pass that writes the activation."""

    def activation(self) -> Tensor:
        """The activation itself; written, unless it is the input. Reads 1T and writes 1T."""
        if self.vectors is None:
            return self.tensor
        return self.passes.bn_apply(self.tensor, *self.vectors, None, True)


class Done(NamedTuple):
    """What a link's forward leaves for what follows and for backward."""

    route: LinkRoute
    conv_weight: Tensor
    weight: Tensor | None
    bias: Tensor | None
    y: Tensor
    mean: Tensor
    invstd: Tensor
    share: Tensor | None
    """This rank's part of all values, where the statistics are those of several ranks."""
    training: bool
    eps: float
    process_group: Any

    @property
    def vectors(self) -> Vectors:
        return self.mean, self.invstd, self.weight, self.bias

    @property
    def raw(self) -> Raw:
        """The output, for the link that follows."""
        return Raw(self.y, (self.mean, self.invstd, self.weight, self.bias), self.route.over_output.passes)

    def kept(self, parameters: Sequence[Tensor | None], without_y: bool = False) -> list[Tensor | None]:
        """The KEPT_OF_A_LINK tensors that autograd keeps, the three parameters as it knows them."""
        return [*parameters, None if without_y else self.y, self.mean, self.invstd, self.share]


KEPT_OF_A_LINK = 7


class Upstream(NamedTuple):
    """A gradient on its way back, before the ReLU after a link (``masked``) or still after it; and its sums over each
    channel, masked and times xhat, None where they are not made yet."""

    grad: Tensor
    masked: bool
    sum_dz: Tensor | None
    sum_dz_xhat: Tensor | None


def forward_link(before: Raw, link: ConvNorm, route: LinkRoute) -> Done:
    """The convolution of the activation, and the statistics that normalise its output; moves the running ones."""
    conv_weight, (weight, bias, running_mean, running_var, training, momentum, eps, group) = link[0], link[1]
    share = None
    if not training:
        assert running_mean is not None and running_var is not None
        wide = statistics_dtype(before.tensor)
        mean = running_mean.to(wide, copy=True)  # a copy: backward needs it as it is now
        invstd = torch.rsqrt(running_var.to(wide) + eps)
        y = convolve(before, conv_weight, route)
        return Done(route, conv_weight, weight, bias, y, mean, invstd, None, False, eps, None)
    group = None if group is None else group_to_share(link.norm)
    # Those of one rank among several are moments to be merged: without eps, and no running statistics move yet.
    moving: Moving = (running_mean, running_var, momentum, eps) if group is None else STILL
    if route.fused is None:
        y = convolve(before, conv_weight, route)
        mean, invstd = route.over_output.passes.bn_stats(y, *moving)
    else:
        x, vectors = before.tensor, before.vectors
        if route.level == 1:
            x, vectors = before.activation(), None
        weight_like_x = conv_weight if conv_weight.dtype is x.dtype else conv_weight.to(x.dtype)
        prologue: Prologue = vectors or NO_NORM
        y, mean, invstd = route.fused.conv_stats(x, weight_like_x, *prologue, *moving, *route.sizes, True)
    if group is not None:
        mean, invstd, share = statistics_over_ranks(mean, invstd, values_per_channel(y), link.norm)
    return Done(route, conv_weight, weight, bias, y, mean, invstd, share, True, eps, group)


def convolve(before: Raw, conv_weight: Tensor, route: LinkRoute) -> Tensor:
    """The convolution of the activation, by itself."""
    x, vectors = before.tensor, before.vectors
    if conv_weight.dtype is not x.dtype:
        conv_weight = conv_weight.to(x.dtype)
    if route.level < 2 and vectors is not None:
        x, vectors = before.activation(), None
    prologue: Prologue = vectors or NO_NORM
    if route.convolution is not None:
        return route.convolution.forward(x, conv_weight, prologue)
    if route.level < 2 or route.fused is None:
        return F.conv2d(x, conv_weight, None, *route.sizes)
    return route.fused.conv_stats(x, conv_weight, *prologue, *STILL, *route.sizes, False)[0]


def sums_for_convolution(upstream: Upstream, done: Done) -> tuple[Tensor | None, Tensor | None]:
    """The sums as the gradient of the convolution's output needs them: over all ranks, or None where the statistics are
    constant."""
    if not done.training:
        return None, None
    if done.share is None:
        return upstream.sum_dz, upstream.sum_dz_xhat
    assert upstream.sum_dz is not None and upstream.sum_dz_xhat is not None
    return sums_over_ranks(upstream.sum_dz, upstream.sum_dz_xhat, done.share, done.process_group)


def backward_link(
    upstream: Upstream,
    sums: tuple[Tensor | None, Tensor | None],
    done: Done,
    before: Raw,
    need_weight: bool,
    need_input: bool,
    residual: Tensor | None,
) -> tuple[Tensor | None, Upstream | None]:
    """(the gradient of conv_weight, the gradient on its way on); None for what is not needed.

    ``sums`` are those of ``sums_for_convolution``; ``residual`` is added to the gradient of the block's input.
    """
    route, y, dz = done.route, done.y, upstream.grad
    if route.level == 3 and route.fused is not None and upstream.masked:
        raw = y if done.training else None
        count = values_per_channel(y)
        coefficients = route.fused.bn_grad_coefficients(*sums, done.mean, done.invstd, done.weight, count)
        return convolution_gradients(dz, raw, coefficients, done, before, need_weight, need_input, residual)
    vectors = (done.mean, done.invstd, done.weight, done.bias)
    dy = route.over_output.passes.bn_grad_apply(dz, y, *vectors, *sums, not upstream.masked)
    return convolution_gradients(dy, None, None, done, before, need_weight, need_input, residual)


def convolution_gradients(
    dz: Tensor,
    raw: Tensor | None,
    coefficients: Tensor | None,
    done: Done,
    before: Raw,
    need_weight: bool,
    need_input: bool,
    residual: Tensor | None,
) -> tuple[Tensor | None, Upstream | None]:
    """``backward_link`` past the norm: the gradient of the convolution's output is dz, or at level 3 what the
    ``coefficients`` make of dz and ``raw`` (the op ``conv_grad_input``)."""
    route, x, conv_weight = done.route, before.tensor, done.conv_weight
    weight = conv_weight
    if weight.dtype is not x.dtype:  # of which the gradient of the weight reads shape and layout only
        weight = weight.to(x.dtype) if need_input else torch.empty_like(weight, dtype=x.dtype)
    vectors: Prologue = before.vectors or NO_NORM
    grad = grad_weight = None
    if route.level == 3 and route.fused is not None:
        sums: list[Tensor] = []
        if need_weight:
            grad_weight = route.fused.conv_grad_weight(dz, raw, coefficients, x, *vectors, weight, *route.sizes)
        if need_input:
            arguments = (dz, raw, coefficients, weight, x, *vectors, residual, *route.sizes)
            grad, *sums = route.fused.conv_grad_input(*arguments)
        following = None if grad is None else Upstream(grad, True, *sums)
    else:
        first = before.vectors is None
        added = residual if first else None
        if route.convolution is not None:
            if need_weight:
                grad_weight = route.convolution.grad_weight(dz, weight, x, vectors)
            if need_input:
                grad = route.convolution.grad_input(dz, weight, x, added)
        else:
            grad, grad_weight = _gradients_of_pytorch(dz, before, weight, route, need_weight, need_input)
            if grad is not None and added is not None:
                grad = grad + added
        following = None if grad is None else Upstream(grad, first, None, None)
    if grad_weight is not None and grad_weight.dtype is not conv_weight.dtype:
        grad_weight = grad_weight.to(conv_weight.dtype)
    return grad_weight, following


def _gradients_of_pytorch(
    dy: Tensor, before: Raw, weight: Tensor, route: LinkRoute, need_weight: bool, need_input: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of the input and the weight; the activation is made again for that of the weight."""
    activation = before.activation() if need_weight else before.tensor
    stride, padding, dilation, groups = route.sizes
    mask = [need_input, need_weight, False]
    settings = (None, stride, padding, dilation, False, [0, 0], groups, mask)
    grad, grad_weight, _ = torch.ops.aten.convolution_backward(dy, activation, weight, *settings)
    return grad if need_input else None, grad_weight if need_weight else None


def values_per_channel(y: Tensor) -> int:
    return y.numel() // y.shape[1]


def like_x(conv_weight: Tensor, x: Tensor) -> Tensor:
    """The weight in x's dtype for those who ask for its shape and layout only: nothing is copied."""
    return conv_weight.detach() if conv_weight.dtype == x.dtype else torch.empty_like(conv_weight, dtype=x.dtype)
