"""What the tests compile, kept between runs: a file lies under a hash of everything that it is made of.

The folder is $FUSED_RESNET_TEST_CACHE, or fused_resnet_tests in the user's cache home: outside the clone, so that a
new clone finds what another one compiled. Several processes may use it at a time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
CACHE_HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
FOLDER = Path(os.environ.get("FUSED_RESNET_TEST_CACHE") or CACHE_HOME / "fused_resnet_tests").resolve()
DAYS_UNREAD = 30


def key(texts: Iterable[str], files: Iterable[Path] = ()) -> str:
    """A hash of these texts and of the files' names and content; the same in every clone."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(_in_any_clone(text).encode() + b"\0")
    for name, path in sorted((_in_any_clone(str(path)), path) for path in files):
        digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _in_any_clone(text: str) -> str:
    return text.replace(str(FOLDER), "<cache>").replace(str(ROOT), "<root>")


def made(key: str, name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder ``name`` under this key; where it is not there yet, ``make(path)`` writes it."""
    path = FOLDER / "made" / key / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / "lock"):
        if not path.exists():
            unfinished = path.with_name(f"unfinished_{name}")
            make(unfinished)
            os.replace(unfinished, path)
    return path


def prune() -> None:
    """Removes what nobody has read for DAYS_UNREAD days."""
    long_ago = time.time() - DAYS_UNREAD * 24 * 3600
    for entry in FOLDER.glob("*/*"):
        files = [path.stat() for path in entry.rglob("*") if path.is_file()]
        if max((max(file.st_atime, file.st_mtime) for file in files), default=0.0) < long_ago:
            shutil.rmtree(entry, ignore_errors=True)
