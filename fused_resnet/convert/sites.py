"""Where our modules fuse: for each forward that calls ``norm_act``, the children that it hands over.

The decision itself is not here: the reasons come from the functions that forward asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fused_resnet.models.cifar import CIFARResNet, PlainBlock
from fused_resnet.models.resnet import ResNet
from fused_resnet.modules.basic_block import BasicBlock
from fused_resnet.modules.bn_act import UNFUSED, BatchNormAct2d, why_not_fuse
from fused_resnet.modules.bottleneck import Bottleneck
from fused_resnet.modules.conv_bn_act import ConvBNAct2d
from fused_resnet.modules.shortcut import why_not_split


class Site(NamedTuple):
    """One pass over memory inside a module, or the norm that cannot be part of one."""

    norms: tuple[str, ...]
    """The norms in it, by their names in the module ("" is the module itself)."""
    conv: str | None
    """The convolution in front of the first of them."""
    tail: tuple[str, ...]
    """What follows them in the same pass: "add", and the name of the activation."""
    reasons: list[str]
    """Why it runs the ordinary way; empty if it is fused."""


class _Call(NamedTuple):
    conv: str
    norm: str
    act: str
    ends_block: bool = False


_CALLS: dict[Callable[..., Any], tuple[_Call, ...]] = {
    BasicBlock.forward: (_Call("conv1", "bn1", "relu"), _Call("conv2", "bn2", "relu", ends_block=True)),
    Bottleneck.forward: (
        _Call("conv1", "bn1", "relu"),
        _Call("conv2", "bn2", "relu"),
        _Call("conv3", "bn3", "relu", ends_block=True),
    ),
    ResNet.forward: (_Call("conv1", "bn1", "relu"),),
    CIFARResNet.forward: (_Call("conv1", "bn1", "relu"),),
    PlainBlock.forward: (_Call("conv1", "bn1", "relu"), _Call("conv2", "bn2", "relu")),
    ConvBNAct2d.forward: (_Call("conv", "bn", "act"),),
}


def is_known(module: nn.Module) -> bool:
    """True if calling this module runs a forward of ours."""
    forward = type(module).forward
    return "forward" not in module.__dict__ and (forward in _CALLS or forward is BatchNormAct2d.forward)


def fusion_sites(module: nn.Module) -> list[Site]:
    """The sites of this module's own forward, in the order of its children; none if its forward is not ours."""
    if not is_known(module):
        return []
    if isinstance(module, BatchNormAct2d):
        reasons = ["fused_resnet.unfuse was called on it"] if UNFUSED in module.__dict__ else []
        return [Site(("",), None, () if module.activation is None else (module.activation,), reasons)]
    sites = []
    for call in _CALLS[type(module).forward]:
        if call.ends_block:
            sites += _end_of_block(module, call)
        else:
            sites.append(_site(module, call.conv, (call.norm,), call.act))
    return sites


def _end_of_block(block: nn.Module, call: _Call) -> list[Site]:
    """The sites of ``norm_add_act``: with a projection, one for both norms; or two, where one of them is not plain."""
    downsample = block.downsample
    if not isinstance(downsample, nn.Sequential) or why_not_split(downsample):
        return [_site(block, call.conv, (call.norm,), call.act, add=True)]
    *_, conv2, norm2 = (f"downsample.{name}" for name in downsample._modules)
    both = _site(block, call.conv, (call.norm, norm2), call.act, add=True)
    if not both.reasons:
        return [both]
    return [_site(block, call.conv, (call.norm,), call.act, add=True), _site(block, conv2, (norm2,), None)]


def _site(module: nn.Module, conv: str, norms: tuple[str, ...], act_name: str | None, add: bool = False) -> Site:
    act = None if act_name is None else getattr(module, act_name)
    reasons = [reason for norm in norms for reason in why_not_fuse(module.get_submodule(norm), act)]
    tail = (*(["add"] if add else []), *([] if act is None else [str(act_name)]))
    return Site(norms, conv, tail, list(dict.fromkeys(reasons)))
