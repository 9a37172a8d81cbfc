"""Bytes of a training step of every ResNet: eager and each level of fusion, counted from the ops that run.

    python -m benchmarks.step_bytes [--write] [--models resnet18 ...]

Read and written by forward, loss and backward, in bfloat16 at batch 256, and saved for backward, in float32 at batch 1;
both at 224x224 and of one image. Nothing is computed or measured: a minute on any machine. With --write also into
benchmarks/results/step_bytes_224px.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench.ledger import BACKWARD, FORWARD
from fused_resnet.bench.machine import machine_facts
from fused_resnet.bench.suite.subjects import builder_names
from fused_resnet.bench.training_ledger import EAGER, LEVELS, SAVED, DryStep, column

IMAGE_SIZE = 224
STEP_DTYPE, STEP_BATCH = torch.bfloat16, 256
SAVED_DTYPE, SAVED_BATCH = torch.float32, 1
RESULT = Path(__file__).parent / "results" / f"step_bytes_{IMAGE_SIZE}px.json"


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    models = {}
    print(heading())
    for name in arguments.models:
        models[name] = {"step": step_bytes(name), "saved": saved(name)}
        print(line(name, models[name]), flush=True)
    if arguments.write:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(condition() | {"models": models}, indent=1) + "\n")
        print(f"wrote {arguments.output}")


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=builder_names(), nargs="+", default=builder_names(), metavar="MODEL")
    parser.add_argument("--write", action="store_true", help="write the result file")
    parser.add_argument("--output", type=Path, default=RESULT, help="which (default: benchmarks/results/...)")
    return parser.parse_args(words)


def step_bytes(model_name: str) -> dict[str, dict[str, float]]:
    """Bytes an image of each level's step, of its forward and backward, and the ratio to eager's."""
    found = {}
    for level in LEVELS:
        ledger = DryStep(model_name, level, STEP_BATCH, STEP_DTYPE, IMAGE_SIZE).ledger()
        phases = {
            phase: sum(entry.total for entry in ledger.entries if entry.phase == phase) / ledger.images
            for phase in (FORWARD, BACKWARD)
        }
        found[column(level)] = {"bytes_per_image": ledger.bytes_per_image, **phases}
    return with_ratios(found)


def saved(model_name: str) -> dict[str, dict[str, float]]:
    """Bytes an image that each way keeps for backward, and the ratio to eager's."""
    found = {}
    for name, (level, memory) in SAVED.items():
        total = DryStep(model_name, level, SAVED_BATCH, SAVED_DTYPE, IMAGE_SIZE, memory).saved_bytes()
        found[name] = {"bytes_per_image": total / SAVED_BATCH}
    return with_ratios(found)


def with_ratios(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    eager = found[EAGER]["bytes_per_image"]
    return {name: {**entry, "ratio_to_eager": entry["bytes_per_image"] / eager} for name, entry in found.items()}


def condition() -> dict[str, Any]:
    return {
        "machine": machine_facts("cpu"),
        "image_size": IMAGE_SIZE,
        "step": {"dtype": str(STEP_DTYPE).removeprefix("torch."), "batch_size": STEP_BATCH},
        "saved": {"dtype": str(SAVED_DTYPE).removeprefix("torch."), "batch_size": SAVED_BATCH},
    }


def heading() -> str:
    """What the columns of `line` are."""
    names = [*map(column, LEVELS), *SAVED]
    groups = (
        f"{'MB (10^6 bytes) an image':20}"
        + "step".rjust(15 * len(LEVELS))
        + "saved for backward".rjust(15 * len(SAVED))
    )
    return groups + "\n" + " " * 20 + "".join(f"{name.split(', ')[-1].removeprefix('memory '):>15}" for name in names)


def line(model_name: str, found: dict[str, Any]) -> str:
    """Every number of one model, with its ratio to eager's."""
    entries = [*found["step"].values(), *found["saved"].values()]
    cells = (f"{entry['bytes_per_image'] / 1e6:.1f} ({entry['ratio_to_eager']:.2f}x)" for entry in entries)
    return f"{model_name:20}" + "".join(f"{cell:>15}" for cell in cells)


if __name__ == "__main__":
    main()
