"""The tiles that a Triton kernel could take for a call, found by letting it ask; and calls with one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fused_resnet.ops.plan.measured_plan import choose_tiles_by
from fused_resnet.ops.plan.plan_file import Key

Result = TypeVar("Result")


@dataclass(frozen=True)
class TileQuestion:
    """What a kernel asks in front of a launch."""

    kernel: str
    key: Key
    names: tuple[str, ...]
    """Of all tiles that are legal for this call."""
    usual: str
    """Of the one that the cost model takes."""

    @property
    def plan_key(self) -> Key:
        """Of ``measured_plan.TILES``."""
        return (self.kernel, *self.key)


def questions(call: Callable[[], object]) -> list[TileQuestion]:
    """Everything that Triton kernels ask during a call, each question once. The call must not fail."""
    found: dict[Key, TileQuestion] = {}

    def note(kernel: str, key: Key, candidates: Any, usual: Any) -> None:
        question = TileQuestion(kernel, key, tuple(map(str, candidates)), str(usual))
        found[question.plan_key] = question

    with_tiles(note, call)()
    return [*found.values()]


def choosing(tiles: Mapping[Key, str]) -> Callable[..., str | None]:
    """A chooser that gives the tiles of a plan: by kernel and key."""
    return lambda kernel, key, candidates, usual: tiles.get((kernel, *key))


def with_tiles(chooser: Callable[..., Any] | None, call: Callable[[], Result]) -> Callable[[], Result]:
    """The same call, in which Triton kernels ask ``chooser``. It stays the one who is asked, so that the next such call
    with the same chooser finds the answers remembered: what is timed is not the search for a tile. ``ask_nobody`` in
    the end."""

    def run() -> Result:
        choose_tiles_by(chooser)
        return call()

    return run


def ask_nobody() -> None:
    """The kernels' tiles are the cost models' again."""
    choose_tiles_by(None)
