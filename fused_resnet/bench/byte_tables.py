"""``python -m fused_resnet bench bytes``: what a training step moves through memory, and keeps for its backward."""

from __future__ import annotations

import argparse

import torch

from fused_resnet.bench import options
from fused_resnet.bench.suite.subjects import builder_names
from fused_resnet.bench.training_ledger import EAGER, LEVELS, SAVED, column, training_ledger, training_saved_bytes

MEGABYTE = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, size_help = parser.add_argument, "pixels of an image's side (default: %(default)s)"
    add("--model", choices=builder_names(), default="resnet50", help="(default: %(default)s)")
    add("--batch-size", type=options.positive, default=256, help="images of a training step (default: %(default)s)")
    add("--dtype", choices=options.DTYPES, default="bfloat16", help="of activations (default: %(default)s)")
    add("--image-size", type=options.image_size, default=224, help=size_help)


def main(arguments: argparse.Namespace) -> int:
    """Prints the two tables; nothing is computed on the way, and no GPU is needed."""
    name, batch, size = arguments.model, arguments.batch_size, arguments.image_size
    settings = (batch, getattr(torch, arguments.dtype), size)
    ledgers = {column(level): training_ledger(name, level, *settings) for level in LEVELS}
    cells: dict[str, dict[str, float]] = {}
    for level, ledger in ledgers.items():
        for entry in ledger.by_pass():
            cells.setdefault(f"{entry.phase} {entry.kind}", {})[level] = entry.total / batch / MEGABYTE
    cells = {title: row for title, row in cells.items() if max(row.values()) >= 0.05}
    eager = ledgers[EAGER].bytes_per_image
    print(f"{name}, {arguments.dtype}, {size}x{size}, batch {batch}; MB (10^6 bytes) an image\n")
    print(f"Read and written by a training step\n{_line('', list(ledgers))}")
    for title, row in cells.items():
        print(_line(title, [f"{row[level]:.1f}" if level in row else "-" for level in ledgers]))
    print(_line("all", [f"{ledger.bytes_per_image / MEGABYTE:.1f}" for ledger in ledgers.values()]))
    print(_line("to eager", [f"{ledger.bytes_per_image / eager:.2f}x" for ledger in ledgers.values()]))
    print("\nSaved for backward")
    saved = {way: training_saved_bytes(name, level, *settings, memory) for way, (level, memory) in SAVED.items()}
    for way, value in saved.items():
        print(_line(way, [f"{value / batch / MEGABYTE:.1f}", f"{value / saved[EAGER]:.2f}x"]))
    print("\nCounted from the ops that ran, as if each were well-made kernels; nothing was measured.")
    return 0


def _line(title: str, cells: list[str]) -> str:
    return f"{title:26}" + "".join(f"{cell:>16}" for cell in cells)
