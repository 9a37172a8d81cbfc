"""The file of a measured plan: what it holds, where it lies, how it is written by several processes at once.

A plan is of one condition: a device, and the versions of everything that has a part in how fast an op is there. Each
condition has a file of its own, named after it, so that no process reads what does not concern it::

    {"schema": 1, "condition": {"device": ..., "torch": ..., ...},
     "decisions": [{"op": "bn_apply", "key": [...], "winner": "reference", "heuristic": "native", "seconds": {...}}]}

Two folders are looked in: the user's, FUSED_RESNET_CACHE_DIR or else one in the user's cache, and the package's own
``fused_resnet/plans``, which what the user measured overrules.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fused_resnet.version import __version__

ENVIRONMENT_VARIABLE = "FUSED_RESNET_CACHE_DIR"
SCHEMA = 1
SHIPPED_FOLDER = Path(__file__).resolve().parents[2] / "plans"

Key = tuple[Any, ...]
"""Ints, floats, strings and tuples of them."""


@dataclass(frozen=True)
class Decision:
    """What was measured of one op at one shape."""

    winner: str
    heuristic: str | None = None
    """What would be chosen without the plan; None where whoever measured did not say."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The median of each candidate."""

    @property
    def changes_something(self) -> bool:
        return self.winner != self.heuristic


Decisions = dict[tuple[str, Key], Decision]
"""By op and key."""


class NotAPlan(ValueError):
    """A file is damaged, or is not a plan of the condition that it was read for; the message names it."""


def condition_of(device: torch.device) -> dict[str, Any] | None:
    """What a plan of this device depends on, as plain values for JSON; None for devices that nothing is measured on.

    A CPU has one condition for each number of threads, that of ``torch.get_num_threads()`` now.
    """
    versions: dict[str, Any] = {"fused_resnet": __version__, "torch": torch.__version__}
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"device": f"{cpu_model()} ({capability})", **versions, "threads": torch.get_num_threads()}
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,  # a part of a GPU has the name of the whole
        **versions,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "driver": driver // 1000,  # the newest CUDA that it knows
    }


def cpu_model() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def file_name(condition: dict[str, Any]) -> str:
    """Such as ``nvidia-h100-80gb-hbm3-1a2b3c4d5e6f.json``."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(condition["device"]).lower()).strip("-")[:60]
    text = json.dumps([SCHEMA, condition], sort_keys=True)
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def user_folder() -> Path:
    """Where the user's own plans lie; not made until one is written."""
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser() / "plans"
    import platformdirs

    return platformdirs.user_cache_path("fused_resnet", appauthor=False, opinion=False) / "plans"


def folders() -> list[Path]:
    """Those in which there is a plan, what overrules last. A user's folder that may not be looked into, or whose name
    makes no sense, has none: a warning says so, and nothing else stops."""
    found = [SHIPPED_FOLDER] if next(SHIPPED_FOLDER.glob("*.json"), None) else []
    try:
        folder = user_folder()
        return [*found, folder] if folder.is_dir() and next(folder.glob("*.json"), None) else found
    except (OSError, RuntimeError, ValueError) as error:  # ~nobody-of-this-name is a RuntimeError
        warnings.warn(f"measured plans are not looked for: {error}", RuntimeWarning, stacklevel=2)
        return found


def read(path: Path, condition: dict[str, Any]) -> Decisions:
    """The decisions of a file; of one that is not there, none.

    Raises:
        NotAPlan: it is not what ``merge`` writes, or is of another condition.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise NotAPlan(f"{path} cannot be read: {error.strerror}") from None
    try:
        found = json.loads(text)
        if found["schema"] != SCHEMA:
            raise NotAPlan(f"{path} must be a plan of schema {SCHEMA}; got schema {found['schema']!r}")
        if found["condition"] != condition:
            raise NotAPlan(f"{path} is a plan of {found['condition']}; here it would take one of {condition}")
        return dict(_decision(entry) for entry in found["decisions"])
    except NotAPlan:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotAPlan(f"{path} is not a plan: {type(error).__name__}: {error}") from None


def read_or_warn(path: Path, condition: dict[str, Any]) -> Decisions:
    """The decisions of a file; none, and a warning that names it, if it is damaged or foreign."""
    try:
        return read(path, condition)
    except NotAPlan as error:
        warnings.warn(f"a measured plan is ignored: {error}", RuntimeWarning, stacklevel=2)
        return {}


def merge(path: Path, condition: dict[str, Any], decisions: Decisions) -> None:
    """Adds the decisions to the file, in place of those of the same op and key; makes file and folder where missing.

    Whoever reads it meanwhile finds the old file or the new one, and of two processes that write at once neither loses
    anything where the file system has locks. What is damaged or foreign is written anew.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    import filelock

    with contextlib.ExitStack() as alone:
        with contextlib.suppress(OSError, NotImplementedError):  # some network file systems have no locks
            alone.enter_context(filelock.FileLock(path.with_name(f".{path.name}.lock")))
        try:
            known = read(path, condition)
        except NotAPlan:
            known = {}
        _write(path, condition, {**known, **decisions})


def check_writable(path: Path) -> None:
    """Makes the folder of the file, and nothing else.

    Raises:
        OSError: no file can be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def check_key(key: Sequence[Any]) -> Key:
    """The key as tuples.

    Raises:
        TypeError: it is not made of ints, floats, strings and tuples or lists of them.
    """
    if not isinstance(key, tuple | list):
        raise TypeError(f"key must be a tuple; got {type(key).__name__}")
    for part in key:
        if not isinstance(part, int | float | str | tuple | list):
            raise TypeError(f"key must be made of ints, floats, strings and tuples of them; got {part!r}")
    return tuple(check_key(part) if isinstance(part, tuple | list) else part for part in key)


def _decision(entry: dict[str, Any]) -> tuple[tuple[str, Key], Decision]:
    op, winner, heuristic = entry["op"], entry["winner"], entry.get("heuristic")
    if not (isinstance(op, str) and isinstance(winner, str) and isinstance(heuristic, str | None)):
        raise ValueError(f"op, winner and heuristic must be strings; got {op!r}, {winner!r}, {heuristic!r}")
    seconds = {str(name): float(value) for name, value in entry.get("seconds", {}).items()}
    return (op, check_key(entry["key"])), Decision(winner, heuristic, seconds)


def _write(path: Path, condition: dict[str, Any], decisions: Decisions) -> None:
    entries = [
        {"op": op, "key": key, "winner": d.winner, "heuristic": d.heuristic, "seconds": d.seconds}
        for (op, key), d in decisions.items()
    ]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    text = f'{{"schema": {SCHEMA}, "condition": {json.dumps(condition)},\n"decisions": [\n{lines}\n]}}\n'
    number, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "w") as file:
            file.write(text)
        Path(unfinished).replace(path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _triton_version() -> str | None:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None
