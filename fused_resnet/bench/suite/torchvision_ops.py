"""An importable torchvision, also where its own library was built for another torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch


@functools.cache
def missing_torchvision_ops() -> torch.library.Library | None:
    """Defines the two C++ ops that torchvision's Python code refers to, if torchvision's own library cannot be loaded.

    That is so where its wheel was built for CUDA and torch was not. The ops have no code: what calls them fails, and
    the classification models call neither. They last as long as the process.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    for path in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(path)
            return None
        except OSError:
            continue
    if hasattr(torch.ops.torchvision, "nms"):  # whoever came first has defined them
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return library


def import_or_none(name: str) -> ModuleType | None:
    """``torchvision.models`` or ``timm``, which imports it; None where it is missing or does not fit this torch."""
    missing_torchvision_ops()
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision built for another torch
        return None
