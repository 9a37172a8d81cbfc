"""Facts that a result file must carry to be believed later: which machine, which versions, which commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fused_resnet.ops.plan.plan_file import cpu_model

PEERS = (
    *("fused_resnet", "torchvision", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "openvino"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
"""Distributions whose code may be measured beside this package's; and its own."""
REPOSITORY_FILE = Path(__file__).resolve()


def machine_facts(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Plain values for JSON.

    ``commit`` is the checkout this package runs from, with "-dirty" if tracked files are modified, and None when it
    runs from an installation. ``packages`` are the installed peers and their versions. ``load_average`` is of the last
    minute, in processes: a busy machine measures badly.
    """
    device = torch.device(device)
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "packages": {name: version for name in PEERS if (version := _version(name))},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the CPU's."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The CPU's model name, and the best instruction set that PyTorch uses on it."""
    return f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str | None:
    """The commit of the git checkout that tracks this file, "-dirty" appended if it is modified; None if none does."""
    if _git("ls-files", "--error-unmatch", REPOSITORY_FILE.name) is None:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    settings: dict[str, Any] = {"cwd": REPOSITORY_FILE.parent, "capture_output": True, "text": True, "timeout": 20}
    try:
        done = subprocess.run(["git", *arguments], **settings)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
