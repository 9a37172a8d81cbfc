"""``python -m fused_resnet bench bytes``: what a training step moves through memory, and keeps for its backward."""

from __future__ import annotations

import argparse

import torch

from fused_resnet.bench.contenders import builder_names
from fused_resnet.bench.ledger import Ledger
from fused_resnet.bench.training_ledger import EAGER, LEVELS, SAVED, training_ledger, training_saved_bytes

DTYPES = ("bfloat16", "float16", "float32")
SMALLEST_IMAGE = 32
MEGABYTE = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=builder_names(), default="resnet50", help="(default: %(default)s)")
    add("--batch-size", type=_positive, default=256, help="images of a training step (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of activations and convolutions (default: %(default)s)")
    add("--image-size", type=_image_size, default=224, help="pixels of an image's side (default: %(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Prints the two tables; nothing is computed on the way, and no GPU is needed."""
    dtype, image_size = getattr(torch, arguments.dtype), arguments.image_size
    model_name, batch_size = arguments.model, arguments.batch_size
    ledgers = {column(level): training_ledger(model_name, level, batch_size, dtype, image_size) for level in LEVELS}
    saved = {
        name: training_saved_bytes(model_name, level, batch_size, dtype, image_size, memory) / batch_size
        for name, (level, memory) in SAVED.items()
    }
    print(f"{model_name}, {arguments.dtype}, {image_size}x{image_size}, batch {batch_size}; MB (10^6 bytes) an image\n")
    print(f"Read and written by a training step\n{ledger_table(ledgers)}\n")
    print(f"Saved for backward\n{saved_table(saved)}\n")
    print("Counted from the ops that ran, as if each were well-made kernels; nothing was measured.")
    return 0


def column(level: int | str) -> str:
    """The name of a level in tables."""
    return level if isinstance(level, str) else f"level {level}"


def ledger_table(ledgers: dict[str, Ledger]) -> str:
    """A row for each phase and kind of pass, a column for each ledger, in megabytes an image; those of nothing left
    out."""
    cells: dict[str, dict[str, float]] = {}
    for name, ledger in ledgers.items():
        for entry in ledger.by_pass():
            cells.setdefault(f"{entry.phase} {entry.kind}", {})[name] = entry.total / ledger.images / MEGABYTE
    cells = {title: row for title, row in cells.items() if max(row.values()) >= 0.05}
    cells["all"] = {name: ledger.bytes_per_image / MEGABYTE for name, ledger in ledgers.items()}
    lines = [_line("", list(ledgers))]
    for title, row in cells.items():
        lines.append(_line(title, [f"{row[name]:.1f}" if name in row else "-" for name in ledgers]))
    eager = ledgers[EAGER].bytes_per_image
    return "\n".join(
        [*lines, _line("to eager", [f"{ledger.bytes_per_image / eager:.2f}x" for ledger in ledgers.values()])]
    )


def saved_table(saved: dict[str, float]) -> str:
    """A row for each contender: megabytes an image, and the ratio to eager's."""
    return "\n".join(
        _line(name, [f"{value / MEGABYTE:.1f}", f"{value / saved[EAGER]:.2f}x"]) for name, value in saved.items()
    )


def _line(title: str, cells: list[str]) -> str:
    return f"{title:26}" + "".join(f"{cell:>16}" for cell in cells)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def _image_size(text: str) -> int:
    number = int(text)
    if number < SMALLEST_IMAGE:
        raise argparse.ArgumentTypeError(
            f"must be at least {SMALLEST_IMAGE}, for the network divides it by 32; got {number}"
        )
    return number
