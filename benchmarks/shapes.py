"""The BatchNorm sites of ResNet-50 at 224x224: what the bn_act benchmarks run on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One shape of activation between a convolution and the next layer.

    Attributes:
        channels, size: of the (N, channels, size, size) activation.
        ending: what follows the norm: "relu"; "residual", the end of an identity block (add, ReLU); or "projection",
            the end of a projection block, where the shortcut has a norm of its own.
        count: how many such sites the network has.
    """

    name: str
    channels: int
    size: int
    ending: str
    count: int

    def __str__(self) -> str:
        return f"{self.name}-{self.channels}x{self.size}x{self.size}"

    def elements(self, batch_size: int) -> int:
        return batch_size * self.channels * self.size**2


def _stage(index: int, width: int, size: int, blocks: int) -> list[Site]:
    first = [Site(f"layer{index}.0.bn1", width, 2 * size, "relu", 1)] if index > 1 else []
    inner = 2 * blocks - len(first)
    return [
        *first,
        Site(f"layer{index}.bn", width, size, "relu", inner),
        Site(f"layer{index}.projection", 4 * width, size, "projection", 1),
        Site(f"layer{index}.residual", 4 * width, size, "residual", blocks - 1),
    ]


RESNET50_SITES = [
    Site("stem", 64, 112, "relu", 1),
    *_stage(1, 64, 56, 3),
    *_stage(2, 128, 28, 4),
    *_stage(3, 256, 14, 6),
    *_stage(4, 512, 7, 3),
]
