"""The gradients of ``bn_act`` and ``bn_act_dual``, the statistics given.

Which elements the ReLU lets a gradient pass to is kept, where there was a residual, as the sign of the output or as a
mask of one bit (``ops/reference/mask.py``): ``passed`` below is either, a mask being uint8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.arguments import Norm
from fused_resnet.ops.batch_norm import BatchNorm, batch_norm
from fused_resnet.ops.reference import unpack_mask
from fused_resnet.ops.route.context import hears_backward
from fused_resnet.ops.route.routes import PassRoute
from fused_resnet.ops.synchronize import sums_over_ranks


class Normalization(NamedTuple):
    """A batch norm whose statistics are known: ``constant`` when they do not depend on x (eval mode), and with a
    ``share`` when they depend on what other ranks have too."""

    norm: Norm
    share: Tensor | None
    constant: bool
    eps: float
    process_group: Any


class BNAct(torch.autograd.Function):
    """``bn_act`` and its gradients, the statistics given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        share: Tensor | None,
        settings: tuple[bool, float, Any],
        relu: bool,
        done: tuple[Tensor, Tensor | None] | None,
        route: PassRoute,
    ) -> Tensor:
        """``done``: the result and its mask, if they are there already."""
        passed = None
        if done is not None:
            out, passed = done
        else:
            norm = Norm(mean, invstd, weight, bias)
            if not relu or residual is None:
                out = route.passes.bn_apply(x, norm, residual, relu)
            elif route.masks is not None:
                out, passed = route.masks.bn_apply_mask(x, norm, residual)
            else:
                passed = out = route.passes.bn_apply(x, norm, residual, relu)
        ctx.save_for_backward(x, mean, invstd, weight, bias, share, passed)
        ctx.settings, ctx.relu, ctx.route = settings, relu, route
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *vectors, share, passed = ctx.saved_tensors
        norm = Normalization(Norm(*vectors), share, *ctx.settings)
        route = ctx.route.heard if hears_backward(grad_out) else ctx.route
        grads = _backward(grad_out, x, passed, norm, ctx.relu, ctx.needs_input_grad[:4], route)
        return (*grads, None, None, None, None, None, None, None)


class BNActDual(torch.autograd.Function):
    """``bn_act_dual`` and its gradients, the statistics given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        share: Tensor | None,
        x2: Tensor,
        weight2: Tensor | None,
        bias2: Tensor | None,
        mean2: Tensor,
        invstd2: Tensor,
        share2: Tensor | None,
        settings: tuple[bool, float, Any],
        settings2: tuple[bool, float, Any],
        relu: bool,
        route: PassRoute,
    ) -> Tensor:
        norm, norm2 = Norm(mean, invstd, weight, bias), Norm(mean2, invstd2, weight2, bias2)
        passed = None
        if relu and route.masks is not None:
            out, passed = route.masks.bn_apply_dual_mask(x, norm, x2, norm2)
        else:
            out = route.passes.bn_apply_dual(x, norm, x2, norm2, relu)
            passed = out if relu else None
        ctx.save_for_backward(passed, x, *norm, share, x2, *norm2, share2)
        ctx.settings, ctx.settings2, ctx.relu, ctx.route = settings, settings2, relu, route
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        passed, *saved = ctx.saved_tensors
        x, *vectors, share = saved[:6]
        x2, *vectors2, share2 = saved[6:]
        norm = Normalization(Norm(*vectors), share, *ctx.settings)
        norm2 = Normalization(Norm(*vectors2), share2, *ctx.settings2)
        route = ctx.route.heard if hears_backward(grad_out) else ctx.route
        need, need2 = ctx.needs_input_grad[:3], ctx.needs_input_grad[6:9]
        grads2: list[Tensor | None] = [None, None, None]
        if passed is not None and is_mask(passed):  # which both read: nobody needs to write dz
            *grads, _ = _backward(grad_out, x, passed, norm, True, (*need, False), route)
            if any(need2):
                *grads2, _ = _backward(grad_out, x2, passed, norm2, True, (*need2, False), route)
        else:
            # To the first normalisation the second is a residual: its gradient is dz, the ReLU's part already done.
            *grads, dz = _backward(grad_out, x, passed, norm, ctx.relu, (*need, any(need2)), route)
            if dz is not None:
                *grads2, _ = _backward(dz, x2, None, norm2, False, (*need2, False), route)
        return (*grads, None, None, None, *grads2, None, None, None, None, None, None, None)


def is_mask(passed: Tensor) -> bool:
    return passed.dtype == torch.uint8


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, weight, bias and the residual."""


def _backward(
    grad_out: Tensor,
    x: Tensor,
    passed: Tensor | None,
    norm: Normalization,
    relu: bool,
    need: tuple[bool, ...],
    route: PassRoute,
) -> Gradients:
    """None for the gradients that are not in ``need``; no pass for what nobody asked for."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        if passed is not None and is_mask(passed):
            passed = unpack_mask(passed, x).to(x.dtype)
        return _differentiable_backward(grad_out, x, passed, norm, relu, need)
    masks = route.masks if passed is not None and is_mask(passed) else None
    need_x, need_weight, need_bias, need_residual = need
    vectors, share, constant, _, process_group = norm
    dz, sums = grad_out, None
    need_sums = need_weight or need_bias or (need_x and not constant)
    if passed is not None and masks is not None:
        if need_sums:
            sum_dz, sum_dz_xhat, _ = masks.bn_grad_stats_mask(grad_out, x, passed, vectors, False)
            sums = (sum_dz, sum_dz_xhat)
    elif need_sums or passed is not None:
        sum_dz, sum_dz_xhat, written = route.passes.bn_grad_stats(grad_out, x, passed, vectors, relu)
        sums = (sum_dz, sum_dz_xhat)
        if passed is not None:
            dz, relu = written, False
    grad_x = None
    if need_x:
        of_x = None if constant else sums
        if share is not None and sums is not None:
            of_x = sums_over_ranks(sums, share, process_group)
        if passed is not None and masks is not None:
            grad_x, dz = masks.bn_grad_apply_mask(grad_out, x, passed, vectors, of_x, need_residual)
        else:
            grad_x = route.passes.bn_grad_apply(dz, x, vectors, of_x, relu)
    elif need_residual and passed is not None and masks is not None:
        dz = torch.where(unpack_mask(passed, x), grad_out, 0)
    return (
        grad_x,
        sums[1].to(vectors.weight.dtype) if need_weight else None,  # type: ignore[index, union-attr]
        sums[0].to(vectors.bias.dtype) if need_bias else None,  # type: ignore[index, union-attr]
        dz if need_residual else None,
    )


def _differentiable_backward(
    grad_out: Tensor, x: Tensor, out: Tensor | None, norm: Normalization, relu: bool, need: tuple[bool, ...]
) -> Gradients:
    """``_backward`` for a second derivative: the same gradients, built of operations that autograd knows. Of ``out``
    only the sign matters."""
    (mean, invstd, weight, bias), share, constant, eps, _ = norm
    if share is not None:
        raise NotImplementedError(
            "create_graph must be False in a backward pass through a norm that shares its statistics with other ranks; "
            "as of torch.nn.SyncBatchNorm, there is no second derivative"
        )
    # Views: x may be made of the same weight, and what weight does there is no part of this norm.
    x = x.view_as(x)
    weight, bias = (None if vector is None else vector.view_as(vector) for vector in (weight, bias))
    if constant:
        variance = invstd.double().pow(-2).to(invstd.dtype) - eps
        z = batch_norm(x, BatchNorm(weight, bias, mean, variance, False, 0.0, eps))
    else:
        z = batch_norm(x, BatchNorm(weight, bias, None, None, True, 0.0, eps))
    dz = torch.where((z if out is None else out).detach() <= 0, 0, grad_out) if relu else grad_out
    wanted = [t for t, needed in zip((x, weight, bias), need[:3], strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(z, wanted, dz, create_graph=True) if wanted else ())
    grad_x, grad_weight, grad_bias = (next(found) if needed else None for needed in need[:3])
    return grad_x, grad_weight, grad_bias, dz if need[3] else None
