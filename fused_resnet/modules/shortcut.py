"""The end of a residual block, ``relu(F(x) + x)``: the last norm, the shortcut, the add and the ReLU in one pass."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fused_resnet.modules.bn_act import add, is_image, norm_act, norm_act_dual, why_not_fuse
from fused_resnet.modules.plain import has_global_hooks, is_intercepted


def norm_add_act(norm: nn.Module, act: nn.Module, out: Tensor, downsample: nn.Module | None, x: Tensor) -> Tensor:
    """``act(norm(out) + shortcut(x))``, where the shortcut is ``downsample``, or x itself if that is None.

    Args:
        norm: the last norm of F.
        act: the block's activation.
        out: (N, C, H, W), the last convolution of F.
        downsample: brings x to out's shape. One that ends in a norm has it fused into the same pass as ``norm``.
        x: the block's input.
    """
    if downsample is None:
        return norm_act(norm, act, out, residual=x)
    ordinary = not is_image(out) or bool(why_not_fuse(norm, act))
    if ordinary:
        out = norm(out)  # before the shortcut, as in torchvision: hooks and fx see the order
    if why_not_split(downsample):
        residual = downsample(x)
    else:
        *projection, norm2 = cast(nn.Sequential, downsample)
        for module in projection:
            x = module(x)
        if not ordinary:
            return norm_act_dual(norm, act, out, norm2, x)
        residual = norm_act(norm2, None, x)
    return act(add(out, residual)) if ordinary else norm_act(norm, act, out, residual)


def why_not_split(downsample: nn.Module) -> list[str]:
    """The reasons why ``downsample`` must be called whole; an empty list means its last norm can be fused."""
    if type(downsample) is not nn.Sequential or len(downsample) < 2:
        return ["downsample is not a torch.nn.Sequential that ends in a norm"]
    if is_intercepted(downsample) or has_global_hooks():
        return ["downsample has hooks, or a forward of its own"]
    return []
