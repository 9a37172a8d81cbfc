"""Tiles chosen from outside, by who has measured, in place of those that a cost model finds cheapest.

The functions that choose a tile ask here before they go by their model, once for each shape: what they answer is
remembered until somebody else chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Tile = TypeVar("Tile")
Chooser = Callable[[str, tuple[Any, ...], Sequence[Any], Any], str | None]
"""From a kernel's name, everything that its tile may depend on (ints and floats), the candidates and the model's own
choice: the ``str`` of the candidate to take, or None for the model's."""

_chooser: Chooser | None = None
_remembering: list[Callable[[], None]] = []


def choose_by(chooser: Chooser | None) -> None:
    """Asks ``chooser`` from now on (None: nobody), in the whole process. It is asked once for each shape."""
    global _chooser
    if chooser is _chooser:
        return
    _chooser = chooser
    for forget in _remembering:
        forget()


def asked() -> Chooser | None:
    """Who is asked now."""
    return _chooser


def remembered(function: Callable[..., Tile]) -> Any:
    """``functools.cache``, for a function that goes by ``chosen``: emptied when somebody else chooses."""
    kept = functools.cache(function)
    _remembering.append(kept.cache_clear)
    return kept


def chosen(kernel: str, key: tuple[Any, ...], candidates: Sequence[Tile], usual: Tile) -> Tile:
    """The candidate that is chosen from outside, else the ``usual`` one; never a tile that is not among them."""
    if _chooser is None:
        return usual
    name = _chooser(kernel, key, candidates, usual)
    return next((tile for tile in candidates if str(tile) == name), usual)
