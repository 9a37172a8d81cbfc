"""``python -m fused_resnet info``: what is built, what is usable here, and why the rest is not."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench.machine import machine_facts
from fused_resnet.ops.plan import measured_plan
from fused_resnet.ops.route import context, reasons
from fused_resnet.version import __version__

PREFIX = "FUSED_RESNET_"
OTHER_VARIABLES = ("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_CACHE_DIR", "TRITON_INTERPRET")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def main(arguments: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else as_text(facts))
    return 0


def collect() -> dict[str, Any]:
    """Every fact, as plain values for JSON. Nothing is built, measured or written."""
    return {
        "fused_resnet": {"version": __version__, "path": str(Path(__file__).resolve().parent)},
        "machine": machine_facts("cuda" if torch.cuda.is_available() else "cpu"),
        "cuda_devices": _cuda_devices(),
        "backends": {name: reasons.unavailable(name) for name in reasons.MODULES},
        "requested_backend": context.requested_backend(),
        "measured_plan": measured_plan.describe(),
        "extension": _extension(),
        "triton_cache": _triton_cache(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(PREFIX) or name in OTHER_VARIABLES
        },
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts of ``collect`` for a person: one line each, under a heading each."""
    extension = dict(facts["extension"])
    built = "built" if extension.pop("built") else "not built"
    sections = {
        f"fused_resnet {facts['fused_resnet']['version']}": {"path": facts["fused_resnet"]["path"], **facts["machine"]},
        "CUDA devices": {
            str(index): ", ".join(f"{name} {value}" for name, value in device.items())
            for index, device in enumerate(facts["cuda_devices"])
        },
        f"backends (asked for: {facts['requested_backend']})": {
            name: "; ".join(["no", *reasons]) if reasons else "usable" for name, reasons in facts["backends"].items()
        },
        "measured plan (python -m fused_resnet tune)": facts["measured_plan"],
        f"extension fused_resnet._C: {built}": extension,
        "Triton": {"cache": facts["triton_cache"]},
        "environment": facts["environment"],
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        width = max(map(len, rows), default=0)
        lines += [f"  {name:<{width}}  {value}" for name, value in rows.items()] or ["  none"]
    return "\n".join(lines)


def _cuda_devices() -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return devices


def _extension() -> dict[str, Any]:
    try:
        extension = importlib.import_module("fused_resnet._C")
    except ImportError as error:
        advice = "there was no C++ compiler at build time, or FUSED_RESNET_BUILD=none; `pip install -v .` says which"
        return {"built": False, "reason": str(error), "likely": advice}
    return {"built": True, "path": extension.__file__, **extension.build_info()}


def _triton_cache() -> str | None:
    try:
        knobs = importlib.import_module("triton.knobs")
    except ImportError:
        return None
    return knobs.cache.dir
