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

from fused_resnet.arguments import NO_RUNNING_STATISTICS, ConvSettings, Norm, Sums
from fused_resnet.ops.batch_norm import BatchNorm
from fused_resnet.ops.layout import resolved
from fused_resnet.ops.reference import statistics_dtype
from fused_resnet.ops.reference.conv import convolution_backward
from fused_resnet.ops.route.routes import LinkRoute
from fused_resnet.ops.route.signatures import Passes
from fused_resnet.ops.synchronize import group_to_share, statistics_over_ranks, sums_over_ranks


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
    """An activation as it lies in memory: the block's input (``norm`` None), or what a convolution wrote, of which its
    norm and a ReLU would make the activation."""

    tensor: Tensor
    norm: Norm | None
    passes: Passes
    """Who runs the pass that writes the activation."""

    def activation(self) -> Tensor:
        """The activation itself; written, unless it is the input. Reads 1T and writes 1T."""
        return self.tensor if self.norm is None else self.passes.bn_apply(self.tensor, self.norm, None, True)


class Done(NamedTuple):
    """What a link's forward leaves for what follows and for backward."""

    route: LinkRoute
    conv_weight: Tensor
    y: Tensor
    norm: Norm
    share: Tensor | None
    """This rank's part of all values, where the statistics are those of several ranks."""
    training: bool
    eps: float
    process_group: Any

    @property
    def raw(self) -> Raw:
        """The output, for the link that follows."""
        return Raw(self.y, self.norm, self.route.over_output.passes)

    def kept(self, parameters: Sequence[Tensor | None], without_y: bool = False) -> list[Tensor | None]:
        """The KEPT_OF_A_LINK tensors that autograd keeps, the parameters (conv_weight, weight, bias) as it knows them:
        conv_weight, y, the norm's four and the share."""
        conv_weight, weight, bias = parameters
        return [conv_weight, None if without_y else self.y, *self.norm[:2], weight, bias, self.share]


KEPT_OF_A_LINK = 7


class Upstream(NamedTuple):
    """A gradient on its way back, before the ReLU after a link (``masked``) or still after it; and its sums over each
    channel, None where they are not made yet."""

    grad: Tensor
    masked: bool
    sums: Sums | None


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
        return Done(route, conv_weight, y, Norm(mean, invstd, weight, bias), None, False, eps, None)
    group = None if group is None else group_to_share(link.norm)
    # Those of one rank among several are moments to be merged: without eps, and no running statistics move yet.
    running = (running_mean, running_var, momentum, eps) if group is None else NO_RUNNING_STATISTICS
    if route.fused is None:
        y = convolve(before, conv_weight, route)
        mean, invstd = route.over_output.passes.bn_stats(y, running)
    else:
        x, norm = before.tensor, before.norm
        if route.level == 1:
            x, norm = before.activation(), None
        weight_like_x = conv_weight if conv_weight.dtype is x.dtype else conv_weight.to(x.dtype)
        y, mean, invstd = route.fused.conv_stats(x, weight_like_x, norm, running, route.settings, True)
    if group is not None:
        mean, invstd, share = statistics_over_ranks(mean, invstd, values_per_channel(y), link.norm)
    return Done(route, conv_weight, y, Norm(mean, invstd, weight, bias), share, True, eps, group)


def convolve(before: Raw, conv_weight: Tensor, route: LinkRoute) -> Tensor:
    """The convolution of the activation, by itself."""
    x, norm = before.tensor, before.norm
    if conv_weight.dtype is not x.dtype:
        conv_weight = conv_weight.to(x.dtype)
    if route.level < 2 and norm is not None:
        x, norm = before.activation(), None
    if route.convolution is not None:
        return route.convolution.forward(x, conv_weight, norm)
    if route.level < 2 or route.fused is None:
        return F.conv2d(x, conv_weight, None, *route.settings)
    return route.fused.conv_stats(x, conv_weight, norm, NO_RUNNING_STATISTICS, route.settings, False)[0]


def sums_for_convolution(upstream: Upstream, done: Done) -> Sums | None:
    """The sums as the gradient of the convolution's output needs them: over all ranks, or None where the statistics are
    constant."""
    if not done.training:
        return None
    if done.share is None or upstream.sums is None:
        return upstream.sums
    return sums_over_ranks(upstream.sums, done.share, done.process_group)


def backward_link(
    upstream: Upstream,
    sums: Sums | None,
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
        coefficients = route.fused.bn_grad_coefficients(sums, done.norm, values_per_channel(y))
        return convolution_gradients(dz, raw, coefficients, done, before, need_weight, need_input, residual)
    dy = route.over_output.passes.bn_grad_apply(dz, y, done.norm, sums, not upstream.masked)
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
    grad = grad_weight = None
    if route.level == 3 and route.fused is not None:
        following = None
        if need_weight:
            grad_weight = route.fused.conv_grad_weight(dz, raw, coefficients, x, before.norm, weight, route.settings)
        if need_input:
            arguments = (dz, raw, coefficients, weight, x, before.norm, residual, route.settings)
            grad, *sums = route.fused.conv_grad_input(*arguments)
            following = Upstream(grad, True, (sums[0], sums[1]))
    else:
        first = before.norm is None
        added = residual if first else None
        if route.convolution is not None:
            if need_weight:
                grad_weight = route.convolution.grad_weight(dz, weight, x, before.norm)
            if need_input:
                grad = route.convolution.grad_input(dz, weight, x, added)
        else:
            grad, grad_weight = _gradients_of_pytorch(dz, before, weight, route, need_weight, need_input)
            if grad is not None and added is not None:
                grad = grad + added
        following = None if grad is None else Upstream(grad, first, None)
    if grad_weight is not None and grad_weight.dtype is not conv_weight.dtype:
        grad_weight = grad_weight.to(conv_weight.dtype)
    return grad_weight, following


def _gradients_of_pytorch(
    dy: Tensor, before: Raw, weight: Tensor, route: LinkRoute, need_weight: bool, need_input: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of the input and the weight; the activation is made again for that of the weight."""
    activation = before.activation() if need_weight else before.tensor
    return convolution_backward(dy, activation, weight, route.settings, need_input, need_weight)


def values_per_channel(y: Tensor) -> int:
    return y.numel() // y.shape[1]


def like_x(conv_weight: Tensor, x: Tensor) -> Tensor:
    """The weight in x's dtype for those who ask for its shape and layout only: nothing is copied."""
    return conv_weight.detach() if conv_weight.dtype == x.dtype else torch.empty_like(conv_weight, dtype=x.dtype)
