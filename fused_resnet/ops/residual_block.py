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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops import checks
from fused_resnet.ops.bn_act import BatchNorm, bn_act, bn_act_dual, wants_gradient
from fused_resnet.ops.conv_norm import (
    KEPT_OF_A_LINK,
    ConvNorm,
    Done,
    Raw,
    forward_link,
    keep,
    level_of,
    like_x,
    restored,
    without_tensors,
)
from fused_resnet.ops.layout import conv_output_size, dense
from fused_resnet.ops.residual_block_grad import block_gradients, differentiable_gradients
from fused_resnet.ops.route.backend import has_fused_backend, keeps_masks, passes_for
from fused_resnet.ops.route.fusion_level import training_level
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
    x = x.to(autocast_dtype(x) or x.dtype)
    _check_links(x, chain, shortcut)
    if not gains(x, chain[0].conv_weight, *chain[0].sizes, memory):
        return _link_by_link(x, chain, shortcut)
    x = dense(x)  # here, where autograd sees it: a second derivative goes on through what is saved
    links = [*chain, *([] if shortcut is None else [shortcut])]
    parameters = [tensor for link in links for tensor in (link.conv_weight, link.norm.weight, link.norm.bias)]
    if wants_gradient(x, *parameters):
        return _ResidualBlock.apply(x, _Block(tuple(chain), shortcut, memory == "efficient"), *parameters)
    with torch.no_grad():
        return _forward(x, chain, shortcut)[0]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x in front of a convolution; None where it leaves x alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def gains(
    x: Tensor,
    conv_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    memory: str,
) -> bool:
    """True if a block on x is better run whole: its first convolution is fused with its norm, or memory is saved.

    The other links have the dtype, device and memory format of the first, and so its reasons; a convolution with groups
    of its own falls to level 0 alone. torch.compile gets the links one by one: its own partitioner decides there what
    is kept.
    """
    if torch.compiler.is_compiling() or not has_fused_backend(x):
        return False
    if memory == "efficient" and torch.is_grad_enabled():
        return True
    return training_level(x, like_x(conv_weight, x), stride, padding, dilation, groups) > 0


def check_memory(memory: str) -> None:
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be 'default' or 'efficient'; got {memory!r}")


def _check_links(x: Tensor, chain: Sequence[ConvNorm], shortcut: ConvNorm | None) -> None:
    """Every refusal before anything is computed or moved."""
    if not chain:
        raise ValueError("chain must hold at least one ConvNorm; got none")
    shape = tuple(x.shape)
    for index, link in enumerate(chain):
        shape = check_link(x, shape, link, f"chain[{index}]")
    end = tuple(x.shape) if shortcut is None else check_link(x, tuple(x.shape), shortcut, "shortcut")
    if end != shape:
        raise ValueError(f"the chain's result, {shape}, and the shortcut's must have one shape; got {end}")


def check_link(x: Tensor, shape: tuple[int, ...], link: ConvNorm, name: str) -> tuple[int, ...]:
    """The shape of what the link makes of a tensor like x of ``shape``; refuses what it cannot take."""
    if not isinstance(link, ConvNorm):
        raise TypeError(f"{name} must be a ConvNorm; got {type(link).__name__}")
    try:
        return _shape_behind(x.new_empty(1).expand(shape), link)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _shape_behind(x: Tensor, link: ConvNorm) -> tuple[int, ...]:
    checks.check_conv_weight(x, link.conv_weight, link.groups)
    if autocast_dtype(x) is None:
        checks.check_same_dtype("conv_weight", link.conv_weight, x.dtype)
    if not isinstance(link.norm, BatchNorm):
        raise TypeError(f"norm must be a BatchNorm; got {type(link.norm).__name__}")
    filters, _, *kernel = link.conv_weight.shape
    checks.check_batch_norm(x, *link.norm[:7], channels=filters)
    checks.check_process_group("process_group", link.norm.process_group)
    for setting, minimum in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = getattr(link, setting)
        if isinstance(value, int):
            raise TypeError(f"{setting} must be two ints; got {value!r}")
        checks.check_pair(setting, value, minimum)
    settings = zip(x.shape[2:], kernel, link.stride, link.padding, link.dilation, strict=True)
    height, width = (conv_output_size(*each) for each in settings)
    if min(height, width) < 1:
        raise ValueError(f"at least one pixel must be left; got {height} x {width} from {x.shape[2]} x {x.shape[3]}")
    shape = (x.shape[0], filters, height, width)
    if link.norm.training and group_to_share(link.norm) is None and shape[0] * height * width == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")
    return shape


def _link_by_link(x: Tensor, chain: Sequence[ConvNorm], shortcut: ConvNorm | None) -> Tensor:
    """``residual_block`` as level 0 runs it: a step of autograd for each norm."""
    h = x
    for link in chain[:-1]:
        h = _bn_act(F.conv2d(h, link.conv_weight, None, *link.sizes), link, None)
    last = chain[-1]
    h = F.conv2d(h, last.conv_weight, None, *last.sizes)
    if shortcut is None:
        return _bn_act(h, last, x)
    return bn_act_dual(h, last.norm, F.conv2d(x, shortcut.conv_weight, None, *shortcut.sizes), shortcut.norm)


def _bn_act(y: Tensor, link: ConvNorm, residual: Tensor | None) -> Tensor:
    vectors, (training, momentum, eps, group) = link.norm[:4], link.norm[4:]
    return bn_act(y, *vectors, residual, training=training, momentum=momentum, eps=eps, process_group=group)


def _forward(
    x: Tensor, chain: Sequence[ConvNorm], shortcut: ConvNorm | None, differentiable: bool = False
) -> tuple[Tensor, Tensor, list[Done], Done | None]:
    """(the block's result, itself or a mask of one bit an element for its ReLU's backward, what each link of the chain
    left, what the shortcut left)."""
    before, links = Raw(x), []
    for link in chain:
        links.append(forward_link(before, link, level_of(before.tensor, link)))
        before = Raw(links[-1].y, links[-1].vectors)
    last, projection, added = links[-1], None, (x,)
    passes = passes_for(last.y)
    if shortcut is not None:
        projection = forward_link(Raw(x), shortcut, level_of(x, shortcut))
        added = (projection.y, *projection.vectors)  # type: ignore[assignment]
    apply, apply_mask = (
        (passes.bn_apply, passes.bn_apply_mask)
        if projection is None
        else (passes.bn_apply_dual, passes.bn_apply_dual_mask)
    )
    if differentiable and keeps_masks(last.y):
        return (*apply_mask(last.y, *last.vectors, *added), links, projection)
    out = apply(last.y, *last.vectors, *added, True)
    return out, out, links, projection


class _Block(NamedTuple):
    chain: tuple[ConvNorm, ...]
    shortcut: ConvNorm | None
    efficient: bool


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: _Block, *parameters: Tensor | None) -> Tensor:
        out, passed, links, projection = _forward(x, block.chain, block.shortcut, differentiable=True)
        links += [] if projection is None else [projection]
        kept: list[Tensor | None] = []
        for index, done in enumerate(links):
            recomputed = block.efficient and index == len(block.chain) - 1
            kept += keep(done, parameters[3 * index : 3 * index + 3], without_y=recomputed)
        ctx.save_for_backward(x, passed, *kept)
        ctx.links = [(without_tensors(done.link), done.level) for done in links]
        ctx.has_shortcut = projection is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, passed, *kept = ctx.saved_tensors
        links = [
            restored(link, level, kept[KEPT_OF_A_LINK * index : KEPT_OF_A_LINK * (index + 1)])
            for index, (link, level) in enumerate(ctx.links)
        ]
        need_x, _, *need = ctx.needs_input_grad
        shortcut = links.pop() if ctx.has_shortcut else None
        if torch.is_grad_enabled():  # create_graph=True
            grad_x, grads = differentiable_gradients(grad_out, x, links, shortcut, need_x, need)
        else:
            grad_x, grads = block_gradients(grad_out, x, passed, links, shortcut, need_x, need)
        return (grad_x, None, *grads)
