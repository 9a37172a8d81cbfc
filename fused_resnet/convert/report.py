"""``fusion_report``: every norm of a model, whether it is fused, and if not, why not."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fused_resnet.convert.fuse import torchvision_classes
from fused_resnet.convert.sites import fusion_sites, is_known
from fused_resnet.models.resnet import ResNet
from fused_resnet.modules.basic_block import BasicBlock
from fused_resnet.modules.bottleneck import Bottleneck
from fused_resnet.modules.conv_bn_act import why_not_constant
from fused_resnet.modules.plain import FROZEN, class_name, is_intercepted, pair, settings_of
from fused_resnet.modules.shortcut import why_not_split
from fused_resnet.modules.site import sites_of
from fused_resnet.modules.stem import why_not_whole_stem, window
from fused_resnet.modules.whole_block import why_not_whole
from fused_resnet.ops.layout import is_channels_last
from fused_resnet.ops.route.choose import why_not
from fused_resnet.ops.route.context import requested_backend
from fused_resnet.ops.route.fusion_level import training_level_asked_for
from fused_resnet.ops.route.reasons import unavailable
from fused_resnet.ops.route.request import AUTO
from fused_resnet.ops.route.routes import link_route
from fused_resnet.ops.stem import why_not_pooled

LINE_LENGTH = 120


@dataclass(frozen=True)
class FusionSite:
    """One pass over memory, or the norm that runs by itself."""

    name: str
    """The full names of its norms and what is fused behind them: "layer1.0.bn2 + add + relu"."""
    norms: tuple[str, ...]
    """The full names of its norms, as in ``model.named_modules()``."""
    reasons: tuple[str, ...]
    """Why it runs the ordinary way; empty if it is fused."""
    level_reasons: tuple[str, ...] = ()
    """Why training keeps the convolution in front of it a pass of its own; empty if not."""
    level: int | None = None
    """How far training fuses it with that convolution, 0 to 3; None if it runs the ordinary way, or is folded."""
    folded: bool = False
    """Whether it is part of the convolution's weight, in a frozen model."""

    @property
    def fused(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class FusionReport:
    """The sites of a model in its own order; ``str(report)`` is a table of them."""

    sites: tuple[FusionSite, ...]

    def __str__(self) -> str:
        fused = sum(site.fused for site in self.sites)
        whole, folded = sum(bool(site.level) for site in self.sites), sum(site.folded for site in self.sites)
        how = f"{folded} of them folded" if folded else f"{whole} of them with their convolution in training"
        lines = [f"{fused} of {len(self.sites)} sites fused, {how}"]
        width = max((len(site.name) for site in self.sites), default=0)
        for site in self.sites:
            way = "folded" if site.folded else f"level {site.level}" if site.fused else "ordinary"
            start = f"  {site.name:<{width}}  {way:<8}"
            reasons = "; ".join(site.reasons or site.level_reasons)
            wrapped = textwrap.wrap(reasons, max(LINE_LENGTH - len(start) - 2, 40)) or [""]
            lines.append(f"{start}  {wrapped[0]}".rstrip())
            lines += [" " * (len(start) + 2) + line for line in wrapped[1:]]
        return "\n".join(lines)


def fusion_report(model: nn.Module) -> FusionReport:
    """Says of every norm in ``model`` whether it runs fused, at which level it trains and, where not, every reason.

    Each norm (BatchNorm of any kind, GroupNorm) is in one site. A reason is what ``forward`` would find: hooks, another
    kind of norm or activation, ``unfuse``, a block that is not known; or what a backend refuses, as far as the
    parameters tell (device, dtype, memory format). The input's memory format and autocast are not known here.

    Args:
        model: any module. It is not changed and not run.

    Raises:
        TypeError: model is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    memory_format = _memory_format(model)
    named = dict(model.named_modules())
    sites: list[FusionSite] = []
    covered: set[nn.Module] = set()
    for path, module in named.items():
        frozen = FROZEN in module.__dict__
        for norm_name, reasons in _folds(module) if frozen else ():
            if (norm := module.get_submodule(norm_name)) not in covered:
                covered.add(norm)
                name = _join(path, norm_name)
                sites.append(FusionSite(name, (name,), tuple(reasons), folded=not reasons))
        for site in () if frozen else fusion_sites(module):
            norms = [module.get_submodule(norm) for norm in site.norms]
            if not covered.issuperset(norms) and type(norms[0]) is not nn.Identity:
                covered.update(norms)
                reasons = site.reasons
                if not reasons:
                    conv = None if site.conv is None else module.get_submodule(site.conv)
                    reasons = _why_no_backend(norms[0], conv, memory_format)
                names = tuple(_join(path, norm) for norm in site.norms)
                first = names[0] or type(module).__name__
                name = " + ".join((first, *site.norms[1:], *site.tail))
                level_reasons = () if reasons else tuple(_why_level_0(module, site.conv, memory_format))
                level = None if reasons else 0
                if not reasons and not level_reasons and site.conv is not None:
                    level = training_level_asked_for(_weight(module, site.conv))
                sites.append(FusionSite(name, names, tuple(reasons), level_reasons, level))
        if _is_norm(module) and module not in covered:
            covered.add(module)
            sites.append(FusionSite(path or type(module).__name__, (path,), (_why_unknown(named, path),)))
    return FusionReport(tuple(sites))


def _folds(module: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """The norms of a frozen module, by name, and the reasons why it does not fold them: none of a chain, or all."""
    sites = sites_of(module)
    chain = [(getattr(module, site.conv), getattr(module, site.norm), getattr(module, site.act)) for site in sites]
    reasons = [reason for conv, norm, act in chain for reason in why_not_constant(conv, norm, act)]
    for site in sites:
        yield site.norm, list(dict.fromkeys(reasons))
    shortcut = next((site.residual for site in sites if site.residual is not None), None)
    downsample = None if shortcut is None else getattr(module, shortcut)
    if type(downsample) is nn.Sequential and len(downsample) == 2 and _is_norm(downsample[1]):
        watched = ["its shortcut has hooks, or a forward of its own"] if is_intercepted(downsample) else []
        why_not = why_not_constant(downsample[0], downsample[1], None)
        yield f"{shortcut}.{[*downsample._modules][1]}", reasons + watched + why_not


def _why_unknown(named: dict[str, nn.Module], path: str) -> str:
    """Why no forward of ours hands this norm over, by the nearest module around it that is not a Sequential."""
    if not path:
        return f"{class_name(named[path])} is not in a block"
    child, parent = path, path.rpartition(".")[0]
    while type(named[parent]) is nn.Sequential and parent:
        child, parent = parent, parent.rpartition(".")[0]
    block = named[parent]
    if FROZEN in block.__dict__:
        return "it is in a shortcut that is more than a convolution and a norm"
    if is_known(block) and child.rpartition(".")[2] == "downsample":
        return "; ".join(why_not_split(named[child])) or "it is not the last norm of downsample"
    if "forward" in block.__dict__:
        return f"the forward of its {class_name(block)} was replaced"
    if type(block) in torchvision_classes():
        return "fused_resnet.fuse was not called, or before this block was there"
    return f"its block, {class_name(block)}, is not one that fuse knows"


def _why_no_backend(norm: nn.Module, conv: nn.Module | None, memory_format: torch.memory_format) -> list[str]:
    """What the fused backends say to an activation such as this convolution would give; [] if one takes it."""
    like = next((t for m in (conv, norm) if m is not None for t in (*m.parameters(), *m.buffers())), None)
    if like is None:
        return []
    channels = cast(int, norm.num_features)
    x = torch.empty((2, channels, 2, 2), dtype=like.dtype, device=like.device, memory_format=memory_format)
    vector = torch.empty(channels, dtype=torch.float32, device=like.device)
    arguments = (x, vector, vector, None, None, None, True)
    requested = requested_backend()
    reasons = {}
    for backend in ("triton", "native") if requested == AUTO else (requested,):
        reasons[backend] = unavailable(backend) or why_not(backend, "bn_apply", *arguments)
        if backend == "reference":
            reasons[backend] = ["the reference, which fuses nothing, was asked for"]
        if not reasons[backend]:
            return []
    backend = requested if requested != AUTO else "triton" if like.is_cuda else "native"
    return [f"{backend}: {reason}" for reason in reasons[backend]]


def _why_level_0(module: nn.Module, conv_name: str | None, memory_format: torch.memory_format) -> list[str]:
    """Why training does not fuse this convolution with the norms around it; [] if it does."""
    if isinstance(module, ResNet):
        reasons = why_not_whole_stem(module.conv1, module.bn1, module.relu, module.maxpool)
    elif isinstance(module, (BasicBlock, Bottleneck)) and conv_name is not None:
        reasons = why_not_whole(module)
    else:
        reasons = ["its convolution is neither in a residual block nor in a stem"]
    if reasons or conv_name is None:
        return reasons
    if isinstance(module, (BasicBlock, Bottleneck)) and conv_name != module.sites[0].conv:
        first = _why_level_0(module, module.sites[0].conv, memory_format)
        if first:  # a block is run whole if its first convolution is fused
            return first
    conv = cast(nn.Conv2d, module.get_submodule(conv_name))
    size = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(pair(conv.dilation), conv.kernel_size, strict=True)]
    shape = (2, conv.in_channels, *size)
    x = torch.empty(shape, dtype=conv.weight.dtype, device=conv.weight.device, memory_format=memory_format)
    if isinstance(module, ResNet) and (reasons := why_not_pooled(x, conv.weight, window(module.maxpool))):
        return reasons
    return list(link_route(x, conv.weight.detach(), settings_of(conv)).why_level_0)


def _weight(module: nn.Module, conv_name: str) -> Tensor:
    return cast(nn.Conv2d, module.get_submodule(conv_name)).weight.detach()


def _memory_format(model: nn.Module) -> torch.memory_format:
    """channels_last if a convolution's weight clearly lies so: its output does then, and those of all after it."""
    weights = (p for p in model.parameters() if isinstance(p, Tensor) and p.dim() == 4)
    if any(is_channels_last(weight) and not weight.is_contiguous() for weight in weights):
        return torch.channels_last
    return torch.contiguous_format


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)) or "BatchNorm" in type(module).__name__


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
