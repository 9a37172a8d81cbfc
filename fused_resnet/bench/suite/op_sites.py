"""Where a network has its norms and convolutions, found by running it on tensors without memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.bench.convolutions import Convolution, convolutions

RELU, RESIDUAL, PROJECTION = "relu", "residual", "projection"
ENDINGS = (RELU, RESIDUAL, PROJECTION)
PLAIN, ADDED, SHORTCUT = "", "with add", "no ReLU"


@dataclass(frozen=True)
class NormSite:
    """One shape of activation between a convolution and the next layer.

    Attributes:
        name: of the first norm that is so.
        channels, height, width: of the activation of one image.
        ending: what follows the norm: "relu"; "residual", the end of an identity block (add, ReLU); or "projection",
            the end of a projection block, where the shortcut has a norm of its own.
        count: how many such sites the network has.
    """

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
    """One shape of convolution, in one of its places.

    Attributes:
        conv: its shape.
        behind: of the inference convolution: "" for norm and ReLU; "with add" for norm, residual and ReLU, at the end
            of a block; "no ReLU" for a shortcut's.
        normed: whether, in training, the norm and ReLU of a convolution before it stand in front of it, as inside a
            block.
        takes_gradient: whether its input wants one; an image does not.
    """

    conv: Convolution
    behind: str
    normed: bool
    takes_gradient: bool

    def __str__(self) -> str:
        return f"{self.conv} {self.behind}".strip()


def norm_sites(name: str, image_size: int = 224) -> list[NormSite]:
    """Those of one of this package's networks, each shape and ending once, in the order in which they first run.

    A norm in a shortcut is part of the site at the end of its block.

    Args:
        name: a builder of this package, such as "resnet50".
        image_size: height and width of its input.
    """
    found: Counter[tuple[int, int, int, str]] = Counter()
    names: dict[tuple[int, int, int, str], str] = {}
    for call in _calls(name, image_size, nn.BatchNorm2d):
        if call.in_shortcut:
            continue
        last = PROJECTION if getattr(call.block, "downsample", None) is not None else RESIDUAL
        _, channels, height, width = call.output_shape
        key = (channels, height, width, last if call.ends_block else RELU)
        found[key] += 1
        names.setdefault(key, call.name)
    return [NormSite(names[key], *key, count) for key, count in found.items()]


def conv_sites(name: str, image_size: int = 224) -> list[ConvSite]:
    """The convolutions of one of this package's networks, each shape in each of its places once; arguments as above."""
    shapes = convolutions(name, image_size)
    found: dict[ConvSite, None] = {}
    for call in _calls(name, image_size, nn.Conv2d):
        (conv,) = (conv for conv in shapes if _is_of_shape(call, conv))
        behind = SHORTCUT if call.in_shortcut else ADDED if call.ends_block else PLAIN
        inside = call.block is not None and not call.in_shortcut and not call.begins_block
        found[ConvSite(conv, behind, normed=inside, takes_gradient=call.block is not None)] = None
    return [*found]


@dataclass(frozen=True)
class _Call:
    """A module that ran. ``block`` is the residual block that it is in, None for the stem."""

    name: str
    module: nn.Module
    block: nn.Module | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def in_shortcut(self) -> bool:
        return ".downsample." in self.name

    @property
    def begins_block(self) -> bool:
        return self.block is not None and self._own_name in self.block.links[0]  # type: ignore[index]

    @property
    def ends_block(self) -> bool:
        return self.block is not None and self._own_name in self.block.links[-1]  # type: ignore[index]

    @property
    def _own_name(self) -> str:
        return self.name.rpartition(".")[2]


def _calls(name: str, image_size: int, kind: type[nn.Module]) -> list[_Call]:
    found: list[_Call] = []
    with torch.device("meta"), torch.no_grad():
        model = getattr(models, name)().eval()
        blocks = {path: module for path, module in model.named_modules() if hasattr(module, "links")}

        def watch(path: str, module: nn.Module) -> None:
            block = blocks.get(path.partition(".downsample.")[0] if ".downsample." in path else path.rpartition(".")[0])

            def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                found.append(_Call(path, module, block, tuple(inputs[0].shape), tuple(output.shape)))

            module.register_forward_hook(note)

        for path, module in model.named_modules():
            if isinstance(module, kind):
                watch(path, module)
        model(torch.empty(1, 3, image_size, image_size))
    return found


def _is_of_shape(call: _Call, conv: Convolution) -> bool:
    module = call.module
    assert isinstance(module, nn.Conv2d)
    settings = ([*module.stride], [*module.padding], [*module.dilation], module.groups)
    return (call.input_shape, tuple(module.weight.shape), settings) == (
        conv.input_shape(1),
        conv.weight_shape,
        conv.settings,
    )
