"""One link of a residual block in training: a convolution, the batch norm behind it, and the norm and ReLU in front.

What stands in front of a convolution is given raw, as the tensor that the convolution before wrote and the vectors that
normalise it; whether the activation is ever written is decided here, by the link's level
(``ops/route/fusion_level.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops.bn_act import BatchNorm
from fused_resnet.ops.reference import statistics_dtype
from fused_resnet.ops.route.backend import convolutions_for, passes_for, trains_natively
from fused_resnet.ops.route.fusion_level import training_level
from fused_resnet.ops.synchronize import group_to_share, statistics_over_ranks, sums_over_ranks

_ops = torch.ops.fused_resnet

Vectors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""mean, invstd, weight and bias of a norm."""
NO_NORM = (None, None, None, None)
_STILL = (None, None, 0.0, 0.0)
"""No running statistics, and how far they do not move."""


class ConvNorm(NamedTuple):
    """A convolution without bias and the batch norm behind it."""

    conv_weight: Tensor
    """(K, C / groups, R, S)."""
    norm: BatchNorm
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def sizes(self) -> tuple[list[int], list[int], list[int], int]:
        """stride, padding, dilation and groups, as the ops take them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


class Raw(NamedTuple):
    """An activation as it lies in memory: the block's input (``vectors`` None), or what a convolution wrote, which its
    norm's vectors and a ReLU would make the activation of."""

    tensor: Tensor
    vectors: Vectors | None = None

    @property
    def prologue(self) -> tuple[Tensor | None, ...]:
        return NO_NORM if self.vectors is None else self.vectors

    def activation(self) -> Tensor:
        """The activation itself; written, unless it is the input. Reads 1T and writes 1T."""
        if self.vectors is None:
            return self.tensor
        return passes_for(self.tensor).bn_apply(self.tensor, *self.vectors, None, True)


class Done(NamedTuple):
    """What a link's forward leaves for what follows and for backward."""

    link: ConvNorm
    level: int
    y: Tensor
    mean: Tensor
    invstd: Tensor
    share: Tensor | None
    """This rank's part of all values, where the statistics are those of several ranks."""

    @property
    def vectors(self) -> Vectors:
        return self.mean, self.invstd, self.link.norm.weight, self.link.norm.bias


KEPT_OF_A_LINK = 7


def keep(done: Done, parameters: Sequence[Tensor | None], without_y: bool = False) -> list[Tensor | None]:
    """The KEPT_OF_A_LINK tensors that ``restored`` needs: the three parameters as autograd knows them, y, vectors."""
    return [*parameters, None if without_y else done.y, done.mean, done.invstd, done.share]


def without_tensors(link: ConvNorm) -> ConvNorm:
    """The settings of a link: its tensors are kept by autograd, which knows if somebody changes them."""
    norm = link.norm._replace(weight=None, bias=None, running_mean=None, running_var=None)
    return link._replace(conv_weight=None, norm=norm)  # type: ignore[arg-type]


def restored(link: ConvNorm, level: int, kept: Sequence[Any]) -> Done:
    """What ``keep`` and ``without_tensors`` were given."""
    conv_weight, weight, bias, y, mean, invstd, share = kept
    norm = link.norm._replace(weight=weight, bias=bias)
    return Done(link._replace(conv_weight=conv_weight, norm=norm), level, y, mean, invstd, share)


class Upstream(NamedTuple):
    """A gradient on its way back, in front of the ReLU behind a link (``masked``) or still behind it; and its sums
    over each channel, masked and times xhat, None where they are not made yet."""

    grad: Tensor
    masked: bool
    sum_dz: Tensor | None
    sum_dz_xhat: Tensor | None


def forward_link(before: Raw, link: ConvNorm, level: int) -> Done:
    """The convolution of the activation, and the statistics that normalise its output; moves the running ones."""
    norm, share = link.norm, None
    if not norm.training:
        assert norm.running_mean is not None and norm.running_var is not None
        wide = statistics_dtype(before.tensor)
        mean = norm.running_mean.to(wide, copy=True)  # a copy: backward needs it as it is now
        invstd = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
        return Done(link, level, convolve(before, link, level), mean, invstd, None)
    # Those of one rank among several are moments to be merged: without eps, and no running statistics move yet.
    alone = group_to_share(norm) is None
    moving = (norm.running_mean, norm.running_var, norm.momentum, norm.eps) if alone else (None, None, 0.0, 0.0)
    if level == 0:
        y = convolve(before, link, level)
        mean, invstd = passes_for(y).bn_stats(y, *moving)
    else:
        if level == 1:
            before = Raw(before.activation())
        weight = link.conv_weight.to(before.tensor.dtype)
        arguments = (before.tensor, weight, *before.prologue)
        if trains_natively(before.tensor, weight, *link.sizes):
            y = convolutions_for(before.tensor, weight, *link.sizes).conv_stats(
                *arguments, *_STILL, *link.sizes, False
            )[0]
            mean, invstd = passes_for(y).bn_stats(y, *moving)
        else:
            y, mean, invstd = _ops.conv_stats(*arguments, *moving, *link.sizes, True)
    if not alone:
        mean, invstd, share = statistics_over_ranks(mean, invstd, values_per_channel(y), norm)
    return Done(link, level, y, mean, invstd, share)


def convolve(before: Raw, link: ConvNorm, level: int) -> Tensor:
    """The convolution of the activation, by itself."""
    weight = link.conv_weight.to(before.tensor.dtype)
    if level < 2:
        return F.conv2d(before.activation(), weight, None, *link.sizes)
    ops = convolutions_for(before.tensor, weight, *link.sizes)
    return ops.conv_stats(before.tensor, weight, *before.prologue, *_STILL, *link.sizes, False)[0]


def sums_for_convolution(upstream: Upstream, done: Done) -> tuple[Tensor | None, Tensor | None]:
    """The sums as the gradient of the convolution's output needs them: over all ranks, or None where the statistics are
    constant."""
    norm = done.link.norm
    if not norm.training:
        return None, None
    if done.share is None:
        return upstream.sum_dz, upstream.sum_dz_xhat
    assert upstream.sum_dz is not None and upstream.sum_dz_xhat is not None
    return sums_over_ranks(upstream.sum_dz, upstream.sum_dz_xhat, done.share, norm.process_group)


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
    y, dz, raw, coefficients = done.y, upstream.grad, None, None
    if done.level == 3 and upstream.masked:
        raw = y if done.link.norm.training else None
        coefficients = _ops.bn_grad_coefficients(*sums, *done.vectors[:3], values_per_channel(y))
    else:
        dz = passes_for(y, dz).bn_grad_apply(dz, y, *done.vectors, *sums, not upstream.masked)
    return convolution_gradients(dz, raw, coefficients, done, before, need_weight, need_input, residual)


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
    """``backward_link`` behind the norm: the gradient of the convolution's output is dz, or at level 3 what the
    ``coefficients`` make of dz and ``raw`` (the op ``conv_grad_input``)."""
    link, x = done.link, before.tensor
    weight = link.conv_weight.to(x.dtype) if need_input else like_x(link.conv_weight, x)
    if done.level < 3:
        return _separate_gradients(dz, before, weight, done, need_weight, need_input, residual)
    grad_weight = following = None
    if need_weight:
        grad_weight = _ops.conv_grad_weight(dz, raw, coefficients, x, *before.prologue, weight, *link.sizes)
        grad_weight = grad_weight.to(link.conv_weight.dtype)
    if need_input:
        arguments = (dz, raw, coefficients, weight, x, *before.prologue, residual)
        grad, *more_sums = _ops.conv_grad_input(*arguments, *link.sizes)
        following = Upstream(grad, True, *more_sums)
    return grad_weight, following


def _separate_gradients(
    dy: Tensor,
    before: Raw,
    weight: Tensor,
    done: Done,
    need_weight: bool,
    need_input: bool,
    residual: Tensor | None,
) -> tuple[Tensor | None, Upstream | None]:
    """``backward_link`` with convolutions alone, ours or PyTorch's."""
    link, x, first = done.link, before.tensor, before.vectors is None
    grad = grad_weight = None
    if done.level > 0 and trains_natively(x, weight, *link.sizes):
        ops = convolutions_for(x, weight, *link.sizes, dy)
        if need_weight:
            grad_weight = ops.conv_grad_weight(dy, None, None, x, *before.prologue, weight, *link.sizes)
        if need_input:
            added = residual if first else None
            grad = ops.conv_grad_input(dy, None, None, weight, x, *NO_NORM, added, *link.sizes)[0]
    else:
        grad, grad_weight = _gradients_of_pytorch(dy, before, weight, link, need_weight, need_input)
        if grad is not None and first and residual is not None:
            grad = grad + residual
    following = None if grad is None else Upstream(grad, first, None, None)
    return None if grad_weight is None else grad_weight.to(link.conv_weight.dtype), following


def _gradients_of_pytorch(
    dy: Tensor, before: Raw, weight: Tensor, link: ConvNorm, need_weight: bool, need_input: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of the input and the weight; the activation is made again for that of the weight."""
    activation = before.activation() if need_weight else before.tensor
    stride, padding, dilation, groups = link.sizes
    mask = [need_input, need_weight, False]
    settings = (None, stride, padding, dilation, False, [0, 0], groups, mask)
    grad, grad_weight, _ = torch.ops.aten.convolution_backward(dy, activation, weight, *settings)
    return grad if need_input else None, grad_weight if need_weight else None


def values_per_channel(y: Tensor) -> int:
    return y.numel() // y.shape[1]


def level_of(x: Tensor, link: ConvNorm) -> int:
    """The level at which the plan has this link's convolution of x, or of the activation that lies in x, train."""
    return training_level(x, like_x(link.conv_weight, x), *link.sizes)


def like_x(conv_weight: Tensor, x: Tensor) -> Tensor:
    """The weight in x's dtype for those who ask for its shape and layout only: nothing is copied."""
    return conv_weight.detach() if conv_weight.dtype == x.dtype else torch.empty_like(conv_weight, dtype=x.dtype)
