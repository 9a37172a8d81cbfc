"""Where our modules fuse: for each forward that calls ``norm_act``, the children that it hands over.

The decision itself is not here: the reasons come from the functions that forward asks.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fused_resnet.modules.bn_act import BatchNormAct2d, why_not_fuse
from fused_resnet.modules.plain import UNFUSED
from fused_resnet.modules.shortcut import why_not_split
from fused_resnet.modules.site import Site, sites_of


class FusedPass(NamedTuple):
    """One pass over memory inside a module, or the norm that cannot be part of one."""

    norms: tuple[str, ...]
    """The norms in it, by their names in the module ("" is the module itself)."""
    conv: str | None
    """The convolution in front of the first of them."""
    tail: tuple[str, ...]
    """What follows them in the same pass: "add", and the name of the activation."""
    reasons: list[str]
    """Why it runs the ordinary way; empty if it is fused."""


def is_known(module: nn.Module) -> bool:
    """True if calling this module runs a forward of ours."""
    return bool(sites_of(module)) or _is_norm_act(module)


def _is_norm_act(module: nn.Module) -> bool:
    return type(module).forward is BatchNormAct2d.forward and "forward" not in module.__dict__


def fusion_sites(module: nn.Module) -> list[FusedPass]:
    """The sites of this module's own forward, in the order of its children; none if its forward is not ours."""
    if isinstance(module, BatchNormAct2d):
        if not _is_norm_act(module):
            return []
        reasons = ["fused_resnet.unfuse was called on it"] if UNFUSED in module.__dict__ else []
        return [FusedPass(("",), None, () if module.activation is None else (module.activation,), reasons)]
    sites: list[FusedPass] = []
    for site in sites_of(module):
        if site.residual is not None:
            sites += _end_of_block(module, site, site.residual)
        else:
            sites.append(_site(module, site.conv, (site.norm,), site.act))
    return sites


def _end_of_block(block: nn.Module, call: Site, shortcut: str) -> list[FusedPass]:
    """The sites of ``norm_add_act``: with a projection, one for both norms; or two, where one of them is not plain."""
    downsample = getattr(block, shortcut)
    if not isinstance(downsample, nn.Sequential) or why_not_split(downsample):
        return [_site(block, call.conv, (call.norm,), call.act, add=True)]
    *_, conv2, norm2 = (f"{shortcut}.{name}" for name in downsample._modules)
    both = _site(block, call.conv, (call.norm, norm2), call.act, add=True)
    if not both.reasons:
        return [both]
    return [_site(block, call.conv, (call.norm,), call.act, add=True), _site(block, conv2, (norm2,), None)]


def _site(module: nn.Module, conv: str, norms: tuple[str, ...], act_name: str | None, add: bool = False) -> FusedPass:
    act = None if act_name is None else getattr(module, act_name)
    reasons = [reason for norm in norms for reason in why_not_fuse(module.get_submodule(norm), act)]
    tail = (*(["add"] if add else []), *([] if act is None else [str(act_name)]))
    return FusedPass(norms, conv, tail, list(dict.fromkeys(reasons)))
