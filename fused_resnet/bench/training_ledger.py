"""What a training step of a ResNet moves, and what its forward keeps for backward: eager and every level of fusion;
``python -m fused_resnet bench bytes`` prints it.

Nothing is computed (``bench/dry_run.py``), so that it takes seconds on any machine, at any batch size.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet
from fused_resnet.bench import options
from fused_resnet.bench.dry_run import DryRun
from fused_resnet.bench.ledger import Ledger, ledger, saved_bytes
from fused_resnet.bench.suite.subjects import build, builder_names
from fused_resnet.ops.route.context import asking
from fused_resnet.training.loop import autocast

EAGER = "eager"
MASKS = "level 3, masks"
LEVELS: tuple[int | str, ...] = (EAGER, 0, 1, 2, 3, MASKS)
"""The ways of a `DryStep`. MASKS is level 3 where CUDA C++ runs the passes: the end of a block keeps one bit of
each element for its ReLU's backward."""
SAVED: dict[str, tuple[int | str, str]] = {
    EAGER: (EAGER, "default"),
    "level 0": (0, "default"),
    "level 3": (3, "default"),
    MASKS: (MASKS, "default"),
    "level 3, memory efficient": (3, "efficient"),
}
"""Whose saved bytes are told: the level and the ``memory`` of ``fused_resnet.fuse``."""
MEGABYTE = 1e6


def column(level: int | str) -> str:
    """The name of a level in tables."""
    return level if isinstance(level, str) else f"level {level}"


@dataclass(frozen=True)
class DryStep:
    """A training step (forward, cross entropy, backward) of one of this package's networks, of which only the shapes
    are computed.

    The network and its images are channels_last. The reference is asked for as the backend, and the level by
    ``use_fusion_level``, so that the ops that run are those of the level wherever this is. A convolution with groups
    falls to level 0 there too; which of the others the kernels would refuse on a given GPU is not asked.

    Args:
        model_name: a builder, such as "resnet50"; ValueError if there is none of this name.
        level: of `LEVELS`: "eager" for plain PyTorch (the network after ``unfuse``), or a level of fusion.
        dtype: of activations and convolutions; parameters are float32, and another dtype is autocast's.
        memory: "default" or "efficient", as ``fused_resnet.fuse`` takes it.
    """

    model_name: str
    level: int | str
    batch_size: int = 1
    dtype: torch.dtype = torch.float32
    image_size: int = 224
    memory: str = "default"

    def ledger(self) -> Ledger:
        """What it reads and writes."""
        with self._running() as (_, forward):
            return ledger(lambda: forward().backward(), self.batch_size)

    def saved_bytes(self) -> int:
        """What forward and loss keep for backward; under autocast the weights' copies in its dtype are among them."""
        with self._running() as (model, forward):
            return saved_bytes(model, forward)

    @contextlib.contextmanager
    def _running(self) -> Iterator[tuple[nn.Module, Callable[[], Tensor]]]:
        """The network, and a function that gives its loss on a batch."""
        if self.level not in LEVELS:
            raise ValueError(f"level must be 'eager', 0, 1, 2, 3 or {MASKS!r}; got {self.level!r}")
        level = {EAGER: None, MASKS: 3}[self.level] if isinstance(self.level, str) else self.level
        with DryRun(), fused_resnet.use_backend("reference"), asking(level=level, masks=self.level == MASKS):
            model = build(self.model_name)
            if self.level == EAGER:
                fused_resnet.unfuse(model)
            elif self.memory != "default":
                fused_resnet.fuse(model, memory=self.memory)
            model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
            images = torch.empty(self.batch_size, 3, self.image_size, self.image_size)
            images = images.contiguous(memory_format=torch.channels_last)
            labels = torch.empty(self.batch_size, dtype=torch.int64)

            def forward() -> Tensor:
                with autocast(images, None if self.dtype == torch.float32 else self.dtype):
                    return F.cross_entropy(model(images), labels)

            yield model, forward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, size_help = parser.add_argument, "pixels of an image's side (default: %(default)s)"
    add("--model", choices=builder_names(), default="resnet50", help="(default: %(default)s)")
    add("--batch-size", type=options.positive, default=256, help="images of a training step (default: %(default)s)")
    add("--dtype", choices=options.DTYPES, default="bfloat16", help="of activations (default: %(default)s)")
    add("--image-size", type=options.image_size, default=224, help=size_help)


def main(arguments: argparse.Namespace) -> int:
    """Prints two tables; nothing is computed on the way, and no GPU is needed."""

    def line(title: str, cells: list[str]) -> None:
        print(f"{title:26}" + "".join(f"{cell:>16}" for cell in cells))

    name, batch, size = arguments.model, arguments.batch_size, arguments.image_size
    settings = (batch, getattr(torch, arguments.dtype), size)
    ledgers = {column(level): DryStep(name, level, *settings).ledger() for level in LEVELS}
    cells: dict[str, dict[str, float]] = {}
    for level, one in ledgers.items():
        for entry in one.entries:
            cells.setdefault(f"{entry.phase} {entry.kind}", {})[level] = entry.total / batch / MEGABYTE
    eager = ledgers[EAGER].bytes_per_image
    print(f"{name}, {arguments.dtype}, {size}x{size}, batch {batch}; MB (10^6 bytes) an image\n")
    print("Read and written by a training step")
    line("", list(ledgers))
    for title, row in cells.items():
        if max(row.values()) >= 0.05:
            line(title, [f"{row[level]:.1f}" if level in row else "-" for level in ledgers])
    line("all", [f"{one.bytes_per_image / MEGABYTE:.1f}" for one in ledgers.values()])
    line("to eager", [f"{one.bytes_per_image / eager:.2f}x" for one in ledgers.values()])
    print("\nSaved for backward")
    saved = {way: DryStep(name, level, *settings, memory).saved_bytes() for way, (level, memory) in SAVED.items()}
    for way, value in saved.items():
        line(way, [f"{value / batch / MEGABYTE:.1f}", f"{value / saved[EAGER]:.2f}x"])
    print("\nCounted from the ops that ran, as if each were well-made kernels; nothing was measured.")
    return 0
