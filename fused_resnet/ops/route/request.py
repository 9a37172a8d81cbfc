"""What a user asks for: a backend, a level of fusion; and the value that every route is kept under.

``current`` is replaced, never changed: a route decided under one request is found again under an equal one, and never
under another.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

AUTO = "auto"
BACKENDS = ("cuda", "triton", "native", "separate", "reference")
HIGHEST_LEVEL = 3
BACKEND_VARIABLE = "FUSED_RESNET_BACKEND"
LEVEL_VARIABLE = "FUSED_RESNET_LEVEL"


class Request(NamedTuple):
    """Everything but tensors that a decision depends on. One for the process, not for the thread: autograd runs
    backward in threads of its own."""

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


@contextlib.contextmanager
def asking(**wanted: str | int | bool | None) -> Iterator[None]:
    """Inside, these fields of the request are as given, for the whole process; the others stay."""
    global current
    before = {name: getattr(current, name) for name in wanted}
    current = current._replace(**wanted)  # type: ignore[arg-type]
    try:
        yield
    finally:
        current = current._replace(**before)


def requested_backend() -> str:
    """The backend asked for by ``use_backend``, else by the environment when this was imported, else "auto"."""
    return current.backend


def requested_fusion_level() -> int | None:
    """The level asked for by ``use_fusion_level``, else by the environment when this was imported, else None."""
    return current.level


def use_fusion_level(level: int | None) -> contextlib.AbstractContextManager[None]:
    """``with use_fusion_level(level):`` trains residual blocks at this level (None for the automatic choice).

    For the whole process, as ``use_backend``. A block keeps the level of its forward for its backward. Asked for by
    number, levels 1 to 3 run anywhere, through the reference where no kernel takes them: right, but slow. What no
    backend but the reference takes at all (float64, for one) stays at level 0 unless ``use_backend("reference")`` asks
    for that too.

    Raises:
        TypeError, ValueError: level is not None, 0, 1, 2 or 3.
    """
    return asking(level=checked_level(level, "level"))


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


current = from_environment()
