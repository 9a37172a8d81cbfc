"""Our classes as what they replace: once torchvision is imported, they are subclasses of its own."""

from __future__ import annotations

import pkgutil
import sys
from typing import Any, ClassVar, Self

from torch import nn


class DropIn(nn.Module):
    """A module with a twin that inherits from torchvision's class as well, and is built in its place where torchvision
    is imported, so that ``isinstance`` holds for both. torchvision itself asks, to zero the last norms of blocks."""

    twin: ClassVar[str]
    """Where it lies, "module:class". To import that is to import torchvision."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if "twin" in cls.__dict__ and "torchvision.models.resnet" in sys.modules:
            cls = pkgutil.resolve_name(cls.twin)
        return super().__new__(cls)
