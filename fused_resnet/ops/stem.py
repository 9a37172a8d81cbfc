"""The stem of a ResNet in training as one step of autograd: convolution, batch norm, ReLU and max pooling.

The activation in front of the pooling is the largest of the whole network, and nobody but the pooling needs it. Forward
writes the convolution's output, its statistics in the same pass, and then the pooled result::

    y = conv(x)                     conv_stats: reads x, writes y
    out = max_pool(relu(bn(y)))     bn_apply_pool: reads y, writes out and the place of each maximum (one byte)

and backward, for the gradient of out::

    the norm's two sums             bn_pool_grad_stats: reads the gradient, the places and y
    dy                              bn_pool_grad_apply: reads the same, writes dy
    dw                              conv_grad_weight: reads dy and x
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import ConvSettings, Norm, PoolSettings
from fused_resnet.ops import checks
from fused_resnet.ops.autocast import autocast_dtype
from fused_resnet.ops.bn_act import bn_act, wants_gradient
from fused_resnet.ops.conv_norm import (
    ConvNorm,
    Done,
    Raw,
    Upstream,
    convolution_gradients,
    forward_link,
    like_x,
    sums_for_convolution,
)
from fused_resnet.ops.layout import are_plain, conv_memory_format, dense, resolved
from fused_resnet.ops.residual_block import check_link
from fused_resnet.ops.residual_block_grad import NO_SECOND_DERIVATIVE, of_views, plain_conv, plain_norm
from fused_resnet.ops.route import context, routes
from fused_resnet.ops.route.context import for_listeners, hears_backward, is_transformed
from fused_resnet.ops.route.fusion_level import needs_full_float32, why_not_fused_pool
from fused_resnet.ops.route.routes import StemRoute


def conv_bn_act_pool(
    x: Tensor,
    link: ConvNorm,
    *,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 1,
) -> Tensor:
    """``max_pool2d(relu(batch_norm(conv2d(x))), kernel_size, stride, padding)``, with gradients.

    Gradients and the updated running statistics are those of that expression too. Under autocast the convolution runs
    in autocast's dtype. A second derivative is computed by PyTorch's own ops.

    Args:
        x: (N, C, H, W), floating point, any memory format.
        link: the convolution, its weight in x's dtype (in any under autocast), and the norm.
        kernel_size, stride, padding: of the pooling, an int or (vertical, horizontal); at most half of it padded.

    Returns:
        (N, K, H', W') in the dtype and memory format of ``F.conv2d``'s result.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong rank, shape, device or value; one value per channel when training, as ``nn.BatchNorm2d``.
        BackendError: the backend asked for by ``use_backend`` cannot run this.
    """
    checks.check_image("x", x)
    pooling = PoolSettings.of(
        checks.check_pair("kernel_size", kernel_size, minimum=1),
        checks.check_pair("stride", stride, minimum=1),
        checks.check_pair("padding", padding, minimum=0),
    )
    x = resolved(x).to(autocast_dtype(x) or x.dtype)
    shape = check_link(x, tuple(x.shape), link, "link")
    link = link.resolved()
    _check_pooling(shape, pooling)
    route = stem_route(x, *link.conv, pooling)
    if route is None or not are_plain(link.conv_weight, *link.norm[:4]):
        y = F.conv2d(x, link.conv_weight, None, *link.settings)
        vectors, (training, momentum, eps, group) = link.norm[:4], link.norm[4:]
        a = bn_act(y, *vectors, training=training, momentum=momentum, eps=eps, process_group=group)
        return F.max_pool2d(a, *pooling)
    x = dense(x)
    if wants_gradient(x, link.conv_weight, link.norm.weight, link.norm.bias):
        return _Stem.apply(x, route, link, pooling, link.conv_weight, link.norm.weight, link.norm.bias)
    with torch.no_grad():
        done = forward_link(Raw(x, None, route.link.passes), link, route.link)
        return route.pool.bn_apply_pool(done.y, done.norm, pooling)[0]


def stem_route(x: Tensor, conv_weight: Tensor, settings: ConvSettings, pooling: PoolSettings) -> StemRoute | None:
    """Who runs a stem on x; None where pooling is not fused with the norm and ReLU before it."""
    if torch.compiler.is_compiling():
        return None
    of_weight = (type(conv_weight), conv_weight.shape, conv_weight.stride(), conv_weight.dtype, conv_weight.device)
    key = (
        *(type(x), x.shape, x.stride(), x.dtype, x.device, context.request()),
        *(of_weight, settings, pooling),
        torch.get_num_threads() if x.is_cpu else x.dtype is torch.float32 and needs_full_float32(x),
    )
    route = routes.kept.get(key, routes.UNKNOWN)
    if route is routes.UNKNOWN:
        if is_transformed():
            return None
        route = None
        if routes.kept_pass_route(x) is not None and not why_not_pooled(x, conv_weight, pooling):
            weight = like_x(conv_weight, x)
            y = routes.output_like(x, weight, settings)
            route = StemRoute.of(routes.link_route(x, weight, settings), routes.pool_passes(y))
        routes.keep(key, route)
    return for_listeners(route)


def why_not_pooled(x: Tensor, conv_weight: Tensor, pooling: PoolSettings) -> list[str]:
    """The reasons why the norm, ReLU and pooling behind this convolution of x are not one pass; [] if they are."""
    weight = like_x(conv_weight, x)
    shape = (1, weight.shape[0], *pooling.kernel_size)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=conv_memory_format(x, weight))
    return why_not_fused_pool(y, pooling)


def _check_pooling(shape: tuple[int, ...], pooling: PoolSettings) -> None:
    kernel_size, _, padding = pooling
    if any(2 * padding[i] > kernel_size[i] for i in (0, 1)):
        raise checks.WrongValue(f"padding must be at most half of kernel_size, {[*kernel_size]}; got {[*padding]}")
    size = pooling.output_size(shape)
    if min(size) < 1:
        raise checks.WrongValue(
            f"the pooling must leave at least one pixel; got {size[0]} x {size[1]} from {shape[2:]}"
        )


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        route: StemRoute,
        link: ConvNorm,
        pooling: PoolSettings,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        done = forward_link(Raw(x, None, route.link.passes), link, route.link)
        out, place = route.pool.bn_apply_pool(done.y, done.norm, pooling)
        ctx.save_for_backward(x, place, *done.kept((conv_weight, weight, bias)))
        ctx.route, ctx.pooling = route, pooling
        ctx.settings = (done.training, done.eps, done.process_group)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, place, conv_weight, y, *vectors, share = ctx.saved_tensors
        route: StemRoute = ctx.route
        if route.heard is not None and hears_backward(grad_out):
            route = route.heard
        done = Done(route.link, conv_weight, y, Norm(*vectors), share, *ctx.settings)
        need_x, _, _, _, *need = ctx.needs_input_grad
        need_conv_weight, need_weight, need_bias = need
        if torch.is_grad_enabled():  # create_graph=True
            if done.share is not None:
                raise NotImplementedError(NO_SECOND_DERIVATIVE)
            x, done = x.view_as(x), of_views(done)
            out = F.max_pool2d(F.relu(plain_norm(plain_conv(x, done), done)), *ctx.pooling)
            inputs = [x, done.conv_weight, *done.norm[2:]]
            wanted = [tensor for tensor, needed in zip(inputs, (need_x, *need), strict=True) if needed]
            found = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True, allow_unused=True))
            grad_x, *grads = (next(found) if needed else None for needed in (need_x, *need))
            return (grad_x, None, None, None, *grads)
        arguments, sums = (grad_out, place, done.y, done.norm), None
        if done.training or need_weight or need_bias:
            sums = route.pool.bn_pool_grad_stats(*arguments, ctx.pooling)
        grad_conv_weight = following = None
        if need_conv_weight or need_x:
            over_ranks = sums_for_convolution(Upstream(grad_out, False, sums), done)
            dy = route.pool.bn_pool_grad_apply(*arguments, over_ranks, ctx.pooling)
            before = Raw(x, None, route.link.passes)
            grad_conv_weight, following = convolution_gradients(
                dy, None, None, done, before, need_conv_weight, need_x, None
            )
        return (
            following.grad if following is not None else None,
            *(None, None, None),
            grad_conv_weight,
            sums[1].to(done.norm.weight.dtype) if need_weight else None,  # type: ignore[index, union-attr]
            sums[0].to(done.norm.bias.dtype) if need_bias else None,  # type: ignore[index, union-attr]
        )
