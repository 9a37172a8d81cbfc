"""Where a network has its norms and convolutions, found by running it on tensors without memory."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.arguments import ConvSettings
from fused_resnet.bench.suite.subjects import is_residual_block

RELU, RESIDUAL, PROJECTION = "relu", "residual", "projection"
ENDINGS = (RELU, RESIDUAL, PROJECTION)
PLAIN, ADDED, SHORTCUT = "", "with add", "no ReLU"


class Sizes(NamedTuple):
    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Convolution:
    """One shape of convolution, for one image, and how often the network has it."""

    sizes: Sizes
    out_height: int
    out_width: int
    count: int

    def __str__(self) -> str:
        s = self.sizes
        stride = f"/{s.stride[0]}" if max(s.stride) > 1 else ""
        groups = f" in {s.groups} groups" if s.groups > 1 else ""
        return f"{s.channels}x{s.height}x{s.width} {'x'.join(map(str, s.kernel))}{stride} to {s.filters}{groups}"

    @property
    def settings(self) -> ConvSettings:
        return ConvSettings.of(self.sizes.stride, self.sizes.padding, self.sizes.dilation, self.sizes.groups)

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.sizes.channels, self.sizes.height, self.sizes.width

    def output_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.sizes.filters, self.out_height, self.out_width

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.sizes.filters, self.sizes.channels // self.sizes.groups, *self.sizes.kernel

    def flop(self, batch: int) -> int:
        """Additions and multiplications of one of its three products, none of them with the padding."""
        return 2 * batch * self.out_height * self.out_width * torch.Size(self.weight_shape).numel()


@dataclass(frozen=True)
class NormSite:
    """One shape of activation after a norm, named after the first norm that is so. ``ending`` is what follows the norm:
    "relu"; "residual", the end of an identity block (add, ReLU); or "projection", the end of a projection block, where
    the shortcut has a norm of its own."""

    name: str
    channels: int
    height: int
    width: int
    ending: str
    count: int

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


def convolutions(name: str, image_size: int = 224) -> list[Convolution]:
    """Those of one of this package's networks (a builder, such as "resnet50"), each shape once, in the order in which
    they first run."""
    counts = Counter(call.conv for call in _calls(name, image_size) if call.conv is not None)
    return [Convolution(*key, count) for key, count in counts.items()]


def conv_sites(name: str, image_size: int = 224) -> list[ConvSite]:
    """The convolutions, each shape in each of its places once."""
    shapes = {(conv.sizes, conv.out_height, conv.out_width): conv for conv in convolutions(name, image_size)}
    found: dict[ConvSite, None] = {}
    for call in _calls(name, image_size):
        if call.conv is not None:
            behind = SHORTCUT if call.in_shortcut else ADDED if call.ends_block else PLAIN
            inside = call.block is not None and not call.in_shortcut and call.own_name != "conv1"
            found[ConvSite(shapes[call.conv], behind, inside, call.block is not None)] = None
    return [*found]


def norm_sites(name: str, image_size: int = 224) -> list[NormSite]:
    """The norms, each shape and ending once. A norm in a shortcut is part of the site at the end of its block."""
    found: dict[tuple[int, int, int, str], list[str]] = {}
    for call in _calls(name, image_size):
        if call.conv is None and not call.in_shortcut:
            last = PROJECTION if getattr(call.block, "downsample", None) is not None else RESIDUAL
            found.setdefault((*call.output_shape, last if call.ends_block else RELU), []).append(call.name)
    return [NormSite(names[0], *key, len(names)) for key, names in found.items()]


class _Call(NamedTuple):
    """A norm or convolution that ran; ``conv`` is the latter's sizes and output, ``block`` the residual block that
    it is in, None for the stem."""

    name: str
    block: Any
    conv: tuple[Sizes, int, int] | None
    output_shape: tuple[int, int, int]

    @property
    def in_shortcut(self) -> bool:
        return ".downsample." in self.name

    @property
    def own_name(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def ends_block(self) -> bool:
        return self.block is not None and self.own_name[-1:] == ("3" if hasattr(self.block, "conv3") else "2")


@functools.lru_cache(maxsize=8)
def _calls(name: str, image_size: int) -> list[_Call]:
    found: list[_Call] = []
    with torch.device("meta"), torch.no_grad():
        model = getattr(models, name)().eval()
        modules = dict(model.named_modules())
        paths = {module: path for path, module in modules.items()}

        def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            path, (_, channels, height, width) = paths[module], output.shape
            parent = modules[path.partition(".downsample.")[0] if ".downsample." in path else path.rpartition(".")[0]]
            block = parent if is_residual_block(parent) else None
            conv = None
            if isinstance(module, nn.Conv2d):
                windows: Any = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
                conv = Sizes(*inputs[0].shape[1:], channels, *windows), height, width  # type: ignore[call-arg]
            found.append(_Call(path, block, conv, (channels, height, width)))

        for module in paths:
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, image_size, image_size))
    return found
