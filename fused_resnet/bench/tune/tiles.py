"""The tiles that Triton's kernels could take for a call, and calls in which they take another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fused_resnet.ops.plan import measured_plan
from fused_resnet.ops.plan.plan_file import Key

Result = TypeVar("Result")


@dataclass(frozen=True)
class TileQuestion:
    """What a kernel asks before a launch: the names of all tiles that are legal for this call, and of the usual one,
    which the cost model takes. ``plan_key`` is of ``measured_plan.TILES``: the kernel's name, then its key."""

    plan_key: Key
    names: tuple[str, ...]
    usual: str


def tile_questions(call: Callable[[], object]) -> list[TileQuestion]:
    """Everything that Triton kernels ask during a call, each question once. The call must not fail."""
    found: dict[Key, TileQuestion] = {}

    def note(kernel: str, key: Key, candidates: Any, usual: Any) -> None:
        question = TileQuestion((kernel, *key), tuple(map(str, candidates)), str(usual))
        found[question.plan_key] = question

    with_tiles(note, call)()
    return [*found.values()]


def choosing(tiles: Mapping[Key, str]) -> Callable[..., str | None]:
    """A chooser that gives the tiles of a plan: by kernel and key."""
    return lambda kernel, key, candidates, usual: tiles.get((kernel, *key))


def with_tiles(chooser: Callable[..., Any] | None, call: Callable[[], Result]) -> Callable[[], Result]:
    """The same call, in which Triton kernels ask ``chooser``. It stays the one who is asked, so that the next such call
    with the same chooser finds the answers remembered: what is timed is not the search for a tile. In the end
    ``choose_tiles_by(None)`` makes the kernels' tiles the cost models' again."""

    def run() -> Result:
        measured_plan.choose_tiles_by(chooser)
        return call()

    return run
