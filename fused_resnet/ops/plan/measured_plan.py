"""What was measured on this machine: which backend, tile or level was fastest for an op at a shape.

``python -m fused_resnet tune`` measures; ``ops/route/preference.py``, ``ops/route/fusion_level.py`` and the Triton
kernels ask here before they go by what is written. The plan of a device is read once, at the first question about it
(``ops/plan/plan_file.py`` says from where). As long as no file is found, ``speaks`` is False, and that is all that
anybody looks at.

A decision is found by the op and a key of ints and strings (``ops/plan/plan_key.py`` makes those of the ops). A plan
advises and never forces: a backend that was asked for by name runs, and a winner that cannot run is passed over.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops.plan import plan_file
from fused_resnet.ops.plan.plan_file import Decision, Decisions, Key
from fused_resnet.ops.plan.plan_key import CHOSEN_OPS, key_of, level_key

LEVEL = "training_level"
"""In the place of the op, of the level at which a convolution trains; the winner is "0" to "3"."""
METHOD = "frozen_conv_method"
"""In the place of the op, of how a frozen network's convolution runs on the CPU; the winner is one of
``NativeConv.candidates``."""
TILES = "tiles"
"""In the place of the op, of the tile of a Triton kernel; the key begins with the kernel's name."""

speaks = True
"""False once it is known that no plan has anything to say in this process, and inside ``ignoring_measured_plan``."""

forget_answers: list[Callable[[], None]] = []
"""Called whenever answers may change: by whoever keeps what follows from them."""

_CPU = torch.device("cpu")


class _Known:
    """The plan of one device in this process."""

    def __init__(self, decisions: Decisions) -> None:
        self.decisions: Decisions = {}
        self.winners: dict[tuple[str, Key], str] = {}
        """Of the decisions that change something."""
        self.other_passes: set[tuple[Key, str]] = set()
        """The shapes of passes, and who was fastest there."""
        for (op, key), decision in decisions.items():
            self.add(op, key, decision)

    def add(self, op: str, key: Key, decision: Decision) -> None:
        self.decisions[op, key] = decision
        if not decision.changes_something:
            self.winners.pop((op, key), None)
            return
        self.winners[op, key] = decision.winner
        if op.startswith("bn_"):
            self.other_passes.add((key[0], decision.winner))


_known: dict[torch.device, _Known] = {}
_silent: set[torch.device] = set()
_ignored = 0
_tiles_given = False
_lock = threading.RLock()


def winner(op: str, key: Key, device: torch.device | str = _CPU) -> str | None:
    """What was measured to be fastest for ``op`` at this key on this device; None where no plan knows better than what
    is written, and under torch.compile, whose graphs must not depend on a file.

    Args:
        op: any name; of what ``tune`` measures, an op of ``ops/schemas.py``, `LEVEL` or `TILES`.
        key: a tuple of ints, strings and tuples of them.
    """
    if not speaks or torch.compiler.is_compiling():
        return None
    known = _plan_of(device)
    return None if known is None else known.winners.get((op, key))


def backend_for(op: str, args: tuple[Any, ...]) -> str | None:
    """The name of the backend that was fastest for ``op`` on arguments like these, or None."""
    if op not in CHOSEN_OPS:
        return None
    x = args[0]
    known = _plan_of(x.device)
    if known is None or not known.winners:
        return None
    return known.winners.get((op, key_of(op, args)))


def level_for(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> int | None:
    """The level at which this convolution was fastest in training, or None. Tensors as of ``training_level``."""
    found = winner(LEVEL, level_key(x, conv_weight, settings), x.device)
    return int(found) if found in ("0", "1", "2", "3") else None


def other_backend_for_passes(x: Tensor, usual: str) -> bool:
    """True if some pass over an x of this shape was measured to be faster on another backend than the ``usual`` one."""
    known = _plan_of(x.device) if speaks else None
    if known is None or not known.other_passes:
        return False
    return any(shape == x.shape and name != usual for shape, name in known.other_passes)


def record(
    op: str,
    key: Key,
    winner: str,
    seconds: dict[str, float],
    *,
    heuristic: str | None = None,
    device: torch.device | str = _CPU,
    path: Path | None = None,
) -> None:
    """Keeps a decision, in the user's plan and for the rest of this process; or in another file, and nothing else.

    Args:
        op, key: as in ``winner``.
        winner: the fastest candidate.
        seconds: the median of each candidate.
        heuristic: what would run without a plan; a winner that is no other is kept as measured and changes nothing.
        path: another file than the user's.

    Raises:
        TypeError: the key is not made of ints, floats, strings and tuples of them.
        ValueError: nothing is measured on such a device.
        OSError: the file cannot be written.
    """
    key, device = plan_file.check_key(key), _with_index(torch.device(device))
    decision = Decision(winner, heuristic, {name: float(value) for name, value in seconds.items()})
    plan_file.merge(path or plan_path(device), _condition(device), {(op, key): decision})
    if path is None:
        with _lock:
            known = _load(device) or _Known({})
            known.add(op, key, decision)
            _known[device] = known
            _silent.discard(device)
            _answers_changed()


def decisions(device: torch.device | str = _CPU, path: Path | None = None) -> Decisions:
    """Everything that is known of this device, by op and key, read anew: of the user's and the package's own plans, or
    of another file.

    Raises:
        NotAPlan: the file that ``path`` names is none, or is of another condition.
    """
    device = torch.device(device)
    if path is not None:
        return plan_file.read(path, _condition(device))
    return _read(_condition(device))


def plan_path(device: torch.device | str = _CPU) -> Path:
    """Where the user's plan of this device lies, or would lie.

    Raises:
        ValueError: nothing is measured on such a device.
    """
    return plan_file.user_folder() / plan_file.file_name(_condition(torch.device(device)))


def describe(device: torch.device | str | None = None) -> dict[str, Any]:
    """For people: "path" of the user's plan, "entries", how many of them say something else than what is written
    ("differ"), and whether it is "active" (asked, and not ignored). Of the first GPU where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = _with_index(torch.device(device))
    known = _load(device)
    return {
        "path": str(plan_path(device)),
        "entries": 0 if known is None else len(known.decisions),
        "differ": 0 if known is None else len(known.winners),
        "active": bool(known and known.winners) and not _ignored,
    }


@contextlib.contextmanager
def ignoring_measured_plan() -> Iterator[None]:
    """Inside, everything is chosen as it is written, as if nothing had been measured; for the whole process.

    Modules remember who ran for them: what has run outside goes on as it was.
    """
    global _ignored
    with _lock:
        _ignored += 1
        _answers_changed()
    try:
        yield
    finally:
        with _lock:
            _ignored -= 1
            _answers_changed()


def choose_tiles_by(chooser: Callable[..., str | None] | None) -> None:
    """Triton's kernels ask this function for their tiles (``kernels/chosen_tiles.py``), or nobody; until the plan
    changes."""
    _chosen_tiles().choose_by(chooser)


def reload() -> None:
    """Forgets what was read: the next question reads the files again (after another process has measured, or another
    number of threads was set)."""
    with _lock:
        _known.clear()
        _silent.clear()
        _answers_changed()


def _plan_of(device: torch.device | str) -> _Known | None:
    if isinstance(device, str):
        device = torch.device(device)
    known = _known.get(device)
    return known if known is not None or device in _silent else _load(device)


def _load(asked: torch.device) -> _Known | None:
    """Reads the plan of a device, the first time that it is asked for."""
    with _lock:
        device = _with_index(asked)
        if device not in _known and device not in _silent:
            condition = plan_file.condition_of(device) if _anything_there() else None
            found = {} if condition is None else _read(condition)
            if condition is not None and found:
                _known[device] = _Known(found)
            else:
                _silent.add(device)
            _answers_changed()
        known = _known.get(device)
        if known is None:
            _silent.add(asked)
        else:
            _known[asked] = known
        return known


def _answers_changed() -> None:
    global speaks
    for forget in forget_answers:
        forget()
    speaks = not _ignored and (any(known.winners for known in _known.values()) or not _nobody_is_left_to_ask())
    _give_tiles_to_kernels()


def _nobody_is_left_to_ask() -> bool:
    """True if every device's plan was read, or is known not to be there."""
    if not (_silent or _known):
        return False
    if not _anything_there():
        return True
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return all(
        device in _silent or device in _known for device in (_CPU, *(torch.device("cuda", i) for i in range(gpus)))
    )


def _anything_there() -> bool:
    """True if there is a file in either folder: else nobody asks a device for its name."""
    return bool(plan_file.folders())


def _read(condition: dict[str, Any]) -> Decisions:
    name = plan_file.file_name(condition)
    found: Decisions = {}
    for folder in plan_file.folders():
        found |= plan_file.read_or_warn(folder / name, condition)
    return found


@functools.cache
def _chosen_tiles() -> ModuleType:
    return importlib.import_module("fused_resnet.kernels.chosen_tiles")


def _give_tiles_to_kernels() -> None:
    """Triton kernels import nothing from above: where a plan has tiles, they are handed a function to ask."""
    global _tiles_given
    tiles: dict[Key, str] = {}
    if not _ignored:
        for known in _known.values():
            tiles |= {key: name for (op, key), name in known.winners.items() if op == TILES}
    if tiles or _tiles_given:
        choose_tiles_by((lambda kernel, key, candidates, usual: tiles.get((kernel, *key))) if tiles else None)
        _tiles_given = bool(tiles)


def _condition(device: torch.device) -> dict[str, Any]:
    condition = plan_file.condition_of(device)
    if condition is None:
        raise ValueError(f"device must be a CPU or a GPU that is here; got {str(device)!r}")
    return condition


def _with_index(device: torch.device) -> torch.device:
    """As tensors name it."""
    if device.type == "cpu":
        return _CPU
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
