"""Backward of a residual block: the order of the gradients, and nothing computed that nobody asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import Sums
from fused_resnet.ops.conv_norm import Done, Raw, Upstream, backward_link, convolve, sums_for_convolution

NO_SECOND_DERIVATIVE = "a second derivative through statistics of several ranks is not implemented"


def block_gradients(
    grad_out: Tensor,
    before: Raw,
    passed: Tensor,
    links: list[Done],
    shortcut: Done | None,
    need_x: bool,
    need: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(the gradient of x, those of each link's three parameters); no pass for what nobody asked for.

    ``before``: x. ``passed``: the block's output, or the mask of its ReLU (``ops/bn_act_autograd.py``).
    """
    befores = [before, *[done.raw for done in links[:-1]]]
    last = links[-1]
    if last.y is None:
        links[-1] = last = last._replace(y=convolve(befores[-1], last.conv_weight, last.route))
    end = last.route.over_output
    if end.masks is not None:
        sum_dz, sum_dz_xhat, dz = end.masks.bn_grad_stats_mask(grad_out, last.y, passed, last.norm, True)
    else:
        sum_dz, sum_dz_xhat, dz = end.passes.bn_grad_stats(grad_out, last.y, passed, last.norm, True)
    grads: list[Tensor | None] = [None] * len(need)

    # Over the ranks in the order of their norms in forward, which is also that of norms run one by one.
    at_end = Upstream(dz, True, (sum_dz, sum_dz_xhat))
    upstream: Upstream | None = at_end
    sums = sums_for_convolution(at_end, last) if need_x or True in need[: 3 * len(links) - 2] else None
    residual: Tensor | None = dz
    if shortcut is not None and (need_x or True in need[3 * len(links) :]):
        needed = need[3 * len(links) :]
        projected = _with_sums(Upstream(dz, True, None), shortcut, needed, need_x)
        projected_sums = sums_for_convolution(projected, shortcut) if need_x or needed[0] else None
        found, following = _link_gradients(projected, projected_sums, shortcut, before, needed, need_x, None)
        grads[3 * len(links) :] = found
        residual = None if following is None else following.grad

    for index in reversed(range(len(links))):
        assert upstream is not None
        needed, need_input = need[3 * index : 3 * index + 3], need_x or True in need[: 3 * index]
        if links[index] is not last:
            upstream = _with_sums(upstream, links[index], needed, need_input)
            sums = sums_for_convolution(upstream, links[index]) if needed[0] or need_input else None
        added = residual if index == 0 else None
        found, upstream = _link_gradients(upstream, sums, links[index], befores[index], needed, need_input, added)
        grads[3 * index : 3 * index + 3] = found
        if upstream is None:
            break
    return upstream.grad if need_x and upstream is not None else None, grads


def _with_sums(upstream: Upstream, done: Done, need: Sequence[bool], need_input: bool) -> Upstream:
    """``upstream`` with its sums, where it came without and they are needed: a norm in training, a gradient of its
    weight or bias."""
    need_conv_weight, need_weight, need_bias = need
    of_statistics = done.training and (need_conv_weight or need_input)
    if upstream.sums is not None or not (need_weight or need_bias or of_statistics):
        return upstream
    grad, masked, _ = upstream
    first, second, _ = done.route.over_output.passes.bn_grad_stats(grad, done.y, None, done.norm, not masked)
    return Upstream(grad, masked, (first, second))


def _link_gradients(
    upstream: Upstream,
    sums: Sums | None,
    done: Done,
    before: Raw,
    need: Sequence[bool],
    need_input: bool,
    residual: Tensor | None,
) -> tuple[list[Tensor | None], Upstream | None]:
    """(the gradients of conv_weight, weight and bias; the gradient on its way on, None if nobody needs it)."""
    need_conv_weight, need_weight, need_bias = need
    grad_conv_weight = following = None
    if need_conv_weight or need_input:
        arguments = (before, need_conv_weight, need_input, residual)
        grad_conv_weight, following = backward_link(upstream, sums, done, *arguments)
    _, _, weight, bias = done.norm
    grad_weight = upstream.sums[1].to(weight.dtype) if need_weight else None  # type: ignore[index, union-attr]
    grad_bias = upstream.sums[0].to(bias.dtype) if need_bias else None  # type: ignore[index, union-attr]
    return [grad_conv_weight, grad_weight, grad_bias], following


def differentiable_gradients(
    grad_out: Tensor, x: Tensor, links: list[Done], shortcut: Done | None, need_x: bool, need: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The same gradients, built of operations that autograd knows, for a second derivative."""
    # Views: x, or a link before, may be made of the same parameters, and what they do there is no part of this block.
    x, links = x.view_as(x), [of_views(done) for done in links]
    shortcut = None if shortcut is None else of_views(shortcut)
    every = [*links, *([] if shortcut is None else [shortcut])]
    if any(done.share is not None for done in every):
        raise NotImplementedError(NO_SECOND_DERIVATIVE)
    h = x
    for index, done in enumerate(links):
        h = plain_norm(plain_conv(h, done), done)
        h = F.relu(h) if index < len(links) - 1 else h
    end = x
    if shortcut is not None:
        end = plain_norm(plain_conv(x, shortcut), shortcut)
    out = F.relu(h + end)
    inputs = [x, *(tensor for done in every for tensor in (done.conv_weight, *done.norm[2:]))]
    wanted = [tensor for tensor, needed in zip(inputs, (need_x, *need), strict=True) if needed and tensor is not None]
    found = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True, allow_unused=True))
    grad_x, *grads = (next(found) if needed else None for needed in (need_x, *need))
    return grad_x, grads


def of_views(done: Done) -> Done:
    """The link with views of its parameters."""
    weight, bias = (None if vector is None else vector.view_as(vector) for vector in done.norm[2:])
    norm = done.norm._replace(weight=weight, bias=bias)
    return done._replace(conv_weight=done.conv_weight.view_as(done.conv_weight), norm=norm)


def plain_conv(x: Tensor, done: Done) -> Tensor:
    """The link's convolution of x as autograd knows it."""
    return F.conv2d(x, done.conv_weight.to(x.dtype), None, *done.route.settings)


def plain_norm(y: Tensor, done: Done) -> Tensor:
    """The link's norm of y as autograd knows it, in y's dtype; nothing moves."""
    wide = done.norm.invstd.dtype
    weight, bias = (None if vector is None else vector.to(wide) for vector in done.norm[2:])
    mean = variance = None
    if not done.training:
        mean, variance = done.norm.mean, done.norm.invstd.double().pow(-2).to(wide) - done.eps
    return F.batch_norm(y.to(wide), mean, variance, weight, bias, done.training, 0.0, done.eps).to(y.dtype)
