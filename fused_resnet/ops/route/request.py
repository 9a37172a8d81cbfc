"""What a user can ask for: a backend, a level of fusion; and the value that every route is kept under."""

from __future__ import annotations

import os
from typing import NamedTuple

AUTO = "auto"
BACKENDS = ("cuda", "triton", "native", "separate", "reference")
HIGHEST_LEVEL = 3
BACKEND_VARIABLE = "FUSED_RESNET_BACKEND"
LEVEL_VARIABLE = "FUSED_RESNET_LEVEL"


class Request(NamedTuple):
    """Everything but tensors that a decision depends on."""

    backend: str = AUTO
    """A backend's name, or "auto"."""
    level: int | None = None
    """0 to 3, or None for the automatic choice."""
    masks: bool = False
    """Whether the ReLU that ends a block keeps a bit of each element, on a backend that would keep its output."""

    @property
    def is_open(self) -> bool:
        """True if nothing was asked for that only ops of ours can do."""
        return self.backend == AUTO and not self.masks


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this op on these tensors; the message lists every reason."""


def checked_backend(name: str, what: str = "backend") -> str:
    """The name itself.

    Raises:
        ValueError: no backend has it.
    """
    if name not in (AUTO, *BACKENDS):
        raise ValueError(f"{what} must be one of {', '.join([AUTO, *BACKENDS])}; got {name!r}")
    return name


def checked_level(level: int | None, name: str) -> int | None:
    """The level itself.

    Raises:
        TypeError, ValueError: it is not None, 0, 1, 2 or 3.
    """
    if level is not None and (isinstance(level, bool) or not isinstance(level, int)):
        raise TypeError(f"{name} must be an int or None; got {type(level).__name__}")
    if level is not None and not 0 <= level <= HIGHEST_LEVEL:
        raise ValueError(f"{name} must be None or 0 to {HIGHEST_LEVEL}; got {level}")
    return level


def from_environment() -> Request:
    """The request that a new process begins with."""
    backend = checked_backend(os.environ.get(BACKEND_VARIABLE) or AUTO, BACKEND_VARIABLE)
    text = os.environ.get(LEVEL_VARIABLE) or AUTO
    if text == AUTO:
        return Request(backend)
    if not text.isdecimal():
        raise ValueError(f"{LEVEL_VARIABLE} must be auto or 0 to {HIGHEST_LEVEL}; got {text!r}")
    return Request(backend, checked_level(int(text), LEVEL_VARIABLE))
