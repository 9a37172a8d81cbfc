"""Types of options, the choice of a device and the check for packages that `bench`, `tune` and `demo` share."""

from __future__ import annotations

import argparse
import importlib.util
import math

import torch

DTYPES = ("float32", "bfloat16", "float16")
SMALLEST_IMAGE = 32


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def image_size(text: str) -> int:
    number = positive(text)
    if number < SMALLEST_IMAGE:
        least = f"at least {SMALLEST_IMAGE}, since networks divide it by 32"
        raise argparse.ArgumentTypeError(f"must be {least}; got {number}")
    return number


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be seconds, 0 or more; got {text!r}")
    return number


def find_device(name: str | None) -> torch.device:
    """The named device, by default a GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device must name a device such as cpu or cuda:1; got {name!r}") from error
    is_there = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
    if not is_there:
        raise ValueError(f"--device must be cpu or a GPU that PyTorch finds here; got {name!r}")
    return device


def missing_packages(extra: str, packages: dict[str, str]) -> str | None:
    """What to install, in words, of modules and the packages that have them; None if all are there."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    how = f"pip install 'fused_resnet[{extra}]' (or pip install {' '.join(missing)})"
    return f"needs {', '.join(missing)}: {how}" if missing else None


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
