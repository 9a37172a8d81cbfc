"""A residual block in training as one step of autograd: ``relu(F(x) + x)`` that keeps what its convolutions wrote, and
no activation in between.

F is a chain of convolutions, each with a batch norm behind it and a ReLU between one pair and the next; the shortcut is
x itself or a projection (a convolution and a norm). Forward of a ``BasicBlock`` at level 3::

    y1 = conv1(x)                   conv_stats: reads x, writes y1 and its statistics
    y2 = conv2(relu(bn1(y1)))       conv_stats: reads y1, writes y2 and its statistics
    out = relu(bn2(y2) + x)         bn_apply: reads y2 and x, writes out

Backward, dz being the gradient in front of a ReLU::

    dz2, its sums                   bn_grad_stats: reads the gradient of out, out and y2; writes dz2, the shortcut's too
    dw2                             conv_grad_weight: reads dz2, y2 and y1
    dz1, its sums                   conv_grad_input: reads dz2, y2 and y1, writes dz1
    dw1                             conv_grad_weight: reads dz1, y1 and x
    dx                              conv_grad_input: reads dz1, y1 and dz2, writes dx

Every convolution has a level of its own (``ops/route/fusion_level.py``): one that no kernel fuses runs as PyTorch's,
with the passes of ``ops/bn_act.py`` beside it, and its activation is made again in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import ConvSettings, Norm
from fused_resnet.ops import checks
from fused_resnet.ops.autocast import autocast_dtype
from fused_resnet.ops.batch_norm import BatchNorm
from fused_resnet.ops.bn_act import normalize, normalize_dual
from fused_resnet.ops.conv_norm import (
    KEPT_OF_A_LINK,
    ConvNorm,
    Done,
    Raw,
    forward_link,
    like_x,
    values_per_channel,
)
from fused_resnet.ops.layout import are_plain, dense, resolved
from fused_resnet.ops.residual_block_grad import block_gradients, differentiable_gradients
from fused_resnet.ops.route import context, routes
from fused_resnet.ops.route.context import for_listeners, hears_backward, is_transformed
from fused_resnet.ops.route.fusion_level import needs_full_float32
from fused_resnet.ops.route.routes import BlockRoute
from fused_resnet.ops.synchronize import group_to_share

MEMORY_MODES = ("default", "efficient")


def residual_block(
    x: Tensor, chain: Sequence[ConvNorm], shortcut: ConvNorm | None = None, *, memory: str = "default"
) -> Tensor:
    """``relu(F(x) + shortcut(x))``, with gradients; F is the chain with a ReLU between one link and the next.

    Equivalent PyTorch, gradients and running statistics included::

        h = x
        for link in chain:
            h = batch_norm(conv2d(h, link.conv_weight), link.norm)  # and relu(h), but for the last
        relu(h + x)  # with a projection: relu(h + batch_norm(conv2d(x, shortcut.conv_weight), shortcut.norm))

    Under autocast the convolutions run in autocast's dtype. A second derivative is computed by PyTorch's own ops.

    Args:
        x: (N, C, H, W), floating point; channels_last is what is fused on CUDA.
        chain: at least one link, the convolutions' weights in x's dtype (in any under autocast).
        shortcut: a projection of x to the shape of the chain's result; None for x itself.
        memory: what is kept for backward beside x and the result: every convolution's output ("default"), or all but
            that of the chain's last one, which is then computed again in backward ("efficient"). Where no backend but
            the reference takes x, and under torch.compile, it is what PyTorch's own operations keep.

    Returns:
        (N, K, H', W') in the dtype and memory format of ``F.conv2d``'s result.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong rank, shape, device or value; one value per channel when training, as ``nn.BatchNorm2d``.
        BackendError: the backend asked for by ``use_backend`` cannot run this.
    """
    checks.check_image("x", x)
    check_memory(memory)
    x = resolved(x).to(autocast_dtype(x) or x.dtype)
    _check_links(x, chain, shortcut)
    chain, shortcut = [link.resolved() for link in chain], None if shortcut is None else shortcut.resolved()
    route = None
    if not torch.compiler.is_compiling() and x.device.type in ("cpu", "cuda"):
        route = block_route(x, [link.conv for link in chain], None if shortcut is None else shortcut.conv, memory)
    links = chain if shortcut is None else [*chain, shortcut]
    if route is None or not all(are_plain(*link.norm[:4]) for link in links):
        return link_by_link(x, chain, shortcut)
    return run(route, x, chain, shortcut)


Conv = tuple[Tensor, ConvSettings]
"""The weight of a convolution, and how it moves."""


def block_route(x: Tensor, chain: Sequence[Conv], shortcut: Conv | None, memory: str = "default") -> BlockRoute | None:
    """Who runs a block on x; None where PyTorch's own ops do, or nobody can. One without a chain runs link by link: its
    first convolution is not fused with its norm, and no memory is to be saved. The other links have the dtype, device
    and memory format of the first, and so its reasons; a convolution with groups of its own falls to level 0 alone.

    Args:
        x: of the dtype that the convolutions get; the weights' own, but under autocast.
        chain, shortcut: the block's convolutions.
        memory: as of `residual_block`.
    """
    efficient = memory == "efficient" and torch.is_grad_enabled()
    key = (
        *(type(x), x.shape, x.stride(), x.dtype, x.device, context.request(), efficient, shortcut is None),
        torch.get_num_threads() if x.is_cpu else x.dtype is torch.float32 and needs_full_float32(x),
        torch.is_autocast_enabled(x.device.type),
        *[
            (type(weight), weight.shape, weight.stride(), weight.dtype, weight.device, settings)
            for weight, settings in ([*chain, shortcut] if shortcut is not None else chain)
        ],
    )
    route = routes.kept.get(key, routes.UNKNOWN)
    if route is routes.UNKNOWN:
        if is_transformed():  # under vmap nobody may ask how x lies
            return None
        route = routes.keep(key, _decide(x, chain, shortcut, efficient))
    return for_listeners(route)


def _decide(x: Tensor, chain: Sequence[Conv], shortcut: Conv | None, efficient: bool) -> BlockRoute | None:
    over_input = routes.kept_pass_route(x)
    if over_input is None:
        return None
    outputs = _outputs(x, chain)
    other_outputs = [x] if shortcut is None else _outputs(x, [shortcut])
    if outputs is None or other_outputs is None or outputs[-1].shape != other_outputs[-1].shape:
        return None
    befores = [x, *outputs[:-1]]
    found = [routes.link_route(y, like_x(weight, y), how) for y, (weight, how) in zip(befores, chain, strict=True)]
    fewest = min(values_per_channel(y) for y in outputs)
    if found[0].level == 0 and not efficient:
        return BlockRoute.of((), None, False, over_input, fewest)
    other = None if shortcut is None else routes.link_route(x, like_x(shortcut[0], x), shortcut[1])
    return BlockRoute.of(tuple(found), other, efficient, over_input, fewest)


def _outputs(x: Tensor, convs: Sequence[Conv]) -> list[Tensor] | None:
    """Empty tensors such as the convolutions in a row give; None where one would refuse what it gets."""
    found = []
    for weight, settings in convs:
        takes = (
            are_plain(weight)
            and weight.dim() == 4
            and weight.numel() > 0
            and weight.device == x.device
            and x.dim() == 4
        )
        if not takes or weight.shape[1] * settings.groups != x.shape[1] or min(x.shape) == 0:
            return None
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        if min(settings.output_size(x.shape, weight.shape)) < 1:
            return None
        x = routes.output_like(x, like_x(weight, x), settings)
        found.append(x)
    return found


def check_memory(memory: str) -> None:
    if memory not in MEMORY_MODES:
        raise checks.WrongValue(f"memory must be 'default' or 'efficient'; got {memory!r}")


def _check_links(x: Tensor, chain: Sequence[ConvNorm], shortcut: ConvNorm | None) -> None:
    """Every refusal before anything is computed or moved."""
    if not chain:
        raise checks.WrongValue("chain must hold at least one ConvNorm; got none")
    shape = tuple(x.shape)
    for index, link in enumerate(chain):
        shape = check_link(x, shape, link, f"chain[{index}]")
    end = tuple(x.shape) if shortcut is None else check_link(x, tuple(x.shape), shortcut, "shortcut")
    if end != shape:
        raise checks.WrongValue(f"the chain's result, {shape}, and the shortcut's must have one shape; got {end}")


def check_link(x: Tensor, shape: tuple[int, ...], link: ConvNorm, name: str) -> tuple[int, ...]:
    """The shape of what the link makes of a tensor like x of ``shape``; refuses what it cannot take."""
    if not isinstance(link, ConvNorm):
        raise checks.WrongType(f"{name} must be a ConvNorm; got {type(link).__name__}")
    try:
        return _shape_after(x.new_empty(1).expand(shape), link)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _shape_after(x: Tensor, link: ConvNorm) -> tuple[int, ...]:
    checks.check_conv_weight(x, link.conv_weight, link.groups)
    if autocast_dtype(x) is None:
        checks.check_same_dtype("conv_weight", link.conv_weight, x.dtype)
    if not isinstance(link.norm, BatchNorm):
        raise checks.WrongType(f"norm must be a BatchNorm; got {type(link.norm).__name__}")
    filters = link.conv_weight.shape[0]
    checks.check_batch_norm(x, *link.norm[:7], channels=filters)
    checks.check_process_group("process_group", link.norm.process_group)
    for setting, minimum in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = getattr(link, setting)
        if isinstance(value, int):
            raise checks.WrongType(f"{setting} must be two ints; got {value!r}")
        checks.check_pair(setting, value, minimum)
    height, width = link.settings.output_size(x.shape, link.conv_weight.shape)
    if min(height, width) < 1:
        raise checks.WrongValue(
            f"at least one pixel must be left; got {height} x {width} from {x.shape[2]} x {x.shape[3]}"
        )
    shape = (x.shape[0], filters, height, width)
    if link.norm.training and group_to_share(link.norm) is None and shape[0] * height * width == 1:
        raise checks.WrongValue(
            f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}"
        )
    return shape


def link_by_link(x: Tensor, chain: Sequence[ConvNorm], shortcut: ConvNorm | None) -> Tensor:
    """`residual_block` as level 0 runs it, of arguments that are known to fit: a step of autograd for each norm."""
    h = x
    for link in chain[:-1]:
        h = normalize(_conv(h, link), _sharing(link.norm), None, True)
    h, norm = _conv(h, chain[-1]), _sharing(chain[-1].norm)
    if shortcut is None:
        return normalize(h, norm, x, True)
    return normalize_dual(h, norm, _conv(x, shortcut), _sharing(shortcut.norm), True)


def _conv(x: Tensor, link: ConvNorm) -> Tensor:
    return F.conv2d(x, link.conv_weight, None, link.stride, link.padding, link.dilation, link.groups)


def _sharing(norm: BatchNorm) -> BatchNorm:
    return norm if norm.process_group is None else norm._replace(process_group=group_to_share(norm))


def run(route: BlockRoute, x: Tensor, chain: Sequence[ConvNorm], shortcut: ConvNorm | None) -> Tensor:
    """`residual_block` by this route, of `block_route` for the same arguments."""
    if not route.chain:
        return link_by_link(x, chain, shortcut)
    x = x if x.is_contiguous(memory_format=torch.channels_last) else dense(x)  # autograd sees it, for a second gradient
    parameters: list[Tensor | None] = []
    for link in chain if shortcut is None else [*chain, shortcut]:
        parameters += (link[0], link[1][0], link[1][1])
    if torch.is_grad_enabled() and (x.requires_grad or any([p is not None and p.requires_grad for p in parameters])):
        return _ResidualBlock.apply(x, route, chain, shortcut, *parameters)
    with torch.no_grad():
        return _forward(route, x, chain, shortcut, differentiable=False)[0]


def _forward(
    route: BlockRoute, x: Tensor, chain: Sequence[ConvNorm], shortcut: ConvNorm | None, differentiable: bool
) -> tuple[Tensor, Tensor, list[Done]]:
    """(the block's result, itself or a mask of one bit an element for its ReLU's backward, what each link left, the
    shortcut last)."""
    before, done = Raw(x, None, route.before.passes), list[Done]()
    for link, link_route in zip(chain, route.chain, strict=True):
        if done:
            before = done[-1].raw
        done.append(forward_link(before, link, link_route))
    last, end = done[-1], route.chain[-1].over_output
    if shortcut is None or route.shortcut is None:
        if differentiable and end.masks is not None:
            return (*end.masks.bn_apply_mask(last.y, last.norm, x), done)
        out = end.passes.bn_apply(last.y, last.norm, x, True)
        return out, out, done
    other = forward_link(Raw(x, None, route.before.passes), shortcut, route.shortcut)
    done.append(other)
    if differentiable and end.masks is not None:
        return (*end.masks.bn_apply_dual_mask(last.y, last.norm, other.y, other.norm), done)
    out = end.passes.bn_apply_dual(last.y, last.norm, other.y, other.norm, True)
    return out, out, done


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        route: BlockRoute,
        chain: Sequence[ConvNorm],
        shortcut: ConvNorm | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        out, passed, done = _forward(route, x, chain, shortcut, differentiable=True)
        kept, settings = list[Tensor | None](), list[tuple[Any, ...]]()
        for index, each in enumerate(done):
            recomputed = route.efficient and index == len(chain) - 1
            kept += each.kept(parameters[3 * index : 3 * index + 3], without_y=recomputed)
            settings.append((each.training, each.eps, each.process_group))
        ctx.save_for_backward(x, passed, *kept)
        ctx.route, ctx.settings = route, settings
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, passed, *kept = ctx.saved_tensors
        route: BlockRoute = ctx.route
        if route.heard is not None and hears_backward(grad_out):
            route = route.heard
        links = [*route.chain] if route.shortcut is None else [*route.chain, route.shortcut]
        done = list[Done]()
        for index, (link, settings) in enumerate(zip(links, ctx.settings, strict=True)):
            conv_weight, y, *vectors, share = kept[KEPT_OF_A_LINK * index : KEPT_OF_A_LINK * (index + 1)]
            done.append(Done(link, conv_weight, y, Norm(*vectors), share, *settings))
        need_x, _, _, _, *need = ctx.needs_input_grad
        shortcut = None if route.shortcut is None else done.pop()
        if torch.is_grad_enabled():  # create_graph=True
            grad_x, grads = differentiable_gradients(grad_out, x, done, shortcut, need_x, need)
        else:
            before = Raw(x, None, route.before.passes)
            grad_x, grads = block_gradients(grad_out, before, passed, done, shortcut, need_x, need)
        return (grad_x, None, None, None, *grads)
