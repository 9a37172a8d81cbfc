"""Where a network has its norms and convolutions: its chains of sites (``modules/site.py``), and their shapes, found by
running it on tensors without memory."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.arguments import ConvSettings
from fused_resnet.modules.site import sites_of

RELU, RESIDUAL, PROJECTION = "relu", "residual", "projection"
ENDINGS = (RELU, RESIDUAL, PROJECTION)
PLAIN, ADDED, SHORTCUT = "", "with add", "no ReLU"


@dataclass(frozen=True)
class Convolution:
    """One shape of convolution, for one image."""

    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __str__(self) -> str:
        stride = f"/{self.stride[0]}" if max(self.stride) > 1 else ""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        image, kernel = f"{self.channels}x{self.height}x{self.width}", "x".join(map(str, self.kernel))
        return f"{image} {kernel}{stride} to {self.filters}{groups}"

    @property
    def settings(self) -> ConvSettings:
        return ConvSettings.of(self.stride, self.padding, self.dilation, self.groups)

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.height, self.width

    def output_shape(self, batch: int) -> tuple[int, int, int, int]:
        windows = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((size + 2 * pad - step * (k - 1) - 1) // stride + 1 for size, k, stride, pad, step in windows)
        return batch, self.filters, height, width

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.filters, self.channels // self.groups, *self.kernel

    def flop(self, batch: int) -> int:
        """Additions and multiplications of one of its three products, none of them with the padding."""
        _, _, height, width = self.output_shape(batch)
        return 2 * batch * height * width * torch.Size(self.weight_shape).numel()


@dataclass(frozen=True)
class NormSite:
    """One shape of activation after a norm. ``ending`` is what follows the norm: "relu"; "residual", the end of an
    identity block (add, ReLU); or "projection", the end of a projection block, where the shortcut has a norm of its
    own."""

    channels: int
    height: int
    width: int
    ending: str

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.height, self.width


@dataclass(frozen=True)
class ConvSite:
    """One shape of convolution, in one of its places. ``behind`` is of the inference convolution: "" for norm and ReLU;
    "with add" for norm, residual and ReLU, at the end of a block; "no ReLU" for a shortcut's. ``normed``: in training,
    the norm and ReLU of another convolution precede it. ``takes_gradient``: its input wants one; an image does not."""

    conv: Convolution
    behind: str
    normed: bool
    takes_gradient: bool

    def __str__(self) -> str:
        return f"{self.conv} {self.behind}".strip()


def convolutions(name: str, image_size: int = 224) -> Counter[Convolution]:
    """Those of one of this package's networks (a builder, such as "resnet50"), and how often it has each."""
    return Counter(link.conv for link in _links(name, image_size))


def conv_sites(name: str, image_size: int = 224) -> list[ConvSite]:
    """The convolutions, each shape in each of its places once."""
    behind = {RELU: PLAIN, RESIDUAL: ADDED, PROJECTION: ADDED, SHORTCUT: SHORTCUT}
    links = _links(name, image_size)
    return list(dict.fromkeys(ConvSite(conv, behind[ending], *place) for conv, ending, *place in links))


def norm_sites(name: str, image_size: int = 224) -> Counter[NormSite]:
    """The norms, and how often there is one of each shape and ending. A norm in a shortcut is part of the site at the
    end of its block."""
    links = [link for link in _links(name, image_size) if link.ending != SHORTCUT]
    return Counter(NormSite(*link.conv.output_shape(1)[1:], link.ending) for link in links)


class _Link(NamedTuple):
    """A convolution with the norm after it, and what follows that: one of `ENDINGS`, or `SHORTCUT`."""

    conv: Convolution
    ending: str
    normed: bool
    takes_gradient: bool


@functools.lru_cache(maxsize=8)
def _links(name: str, image_size: int) -> list[_Link]:
    shapes: dict[nn.Module, Convolution] = {}

    def note(conv: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        windows: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        shapes[conv] = Convolution(*inputs[0].shape[1:], conv.out_channels, *windows)  # type: ignore[call-arg]

    with torch.device("meta"), torch.no_grad():
        model = getattr(models, name)().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, image_size, image_size))
    found: list[_Link] = []
    for module in model.modules():
        chain = sites_of(module)
        is_block = any(site.residual is not None for site in chain)
        for place, site in enumerate(chain):
            shortcut = getattr(module, site.residual) if site.residual else None
            ending = RELU if site.residual is None else RESIDUAL if shortcut is None else PROJECTION
            found.append(_Link(shapes[getattr(module, site.conv)], ending, place > 0, is_block))
            beside = [shapes[conv] for conv in (shortcut.modules() if shortcut is not None else ()) if conv in shapes]
            found += [_Link(conv, SHORTCUT, False, True) for conv in beside]
    return found
