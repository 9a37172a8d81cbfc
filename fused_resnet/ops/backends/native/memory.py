"""Memory for large outputs, used again once nobody has it any more.

What malloc maps afresh costs more than a pass over it (csrc/cpu/buffers.h), so a large output's storage, which is
PyTorch's own in every respect, stays in a list here as well: one that only the list has is free. The C++ keeps the
kernels' own memory in the same way. Both together are never more than a limit, counting outputs that are in use.
"""

from __future__ import annotations

import math
import sys
from collections import deque

import torch
from torch import UntypedStorage

from fused_resnet.ops.backends.extension import extension

LARGE = 4 << 20  # bytes; of less, malloc itself keeps what is freed
LIMIT = 2 << 30
_limit = LIMIT
_storages: dict[int, deque[UntypedStorage]] = {}
"""By their bytes. A thread that looks at one takes it out, and Python's own lock is enough."""


def storage_of(nbytes: int) -> UntypedStorage:
    """One of a new output, perhaps used before."""
    same = _storages.get(nbytes)
    if same is not None and (storage := _free_one(same, nbytes)) is not None:
        same.append(storage)
        return storage
    keeps = _make_room(nbytes)
    try:
        storage = UntypedStorage(nbytes, device="cpu")
    except RuntimeError:  # there is no memory but what is kept
        empty_cache()
        storage = UntypedStorage(nbytes, device="cpu")
    if keeps:
        _storages.setdefault(nbytes, deque()).append(storage)
    return storage


def keep_at_most(nbytes: int) -> None:
    """Keeps no more memory than this from now on."""
    global _limit
    _limit = nbytes
    _make_room(0)


def kept_bytes() -> int:
    """That nobody uses."""
    total = extension.kept_bytes()
    for size, storages in list(_storages.items()):
        free = list(iter(lambda: _free_one(storages, size), None))  # noqa: B023  (called at once)
        total += size * len(free)
        storages.extend(free)
    return total


def empty_cache() -> None:
    """Gives back to the system what nobody uses."""
    _give_back(math.inf)
    extension.release_kept_buffers()


def _make_room(nbytes: int) -> bool:
    """Whether so much more can be kept. Outputs may take three quarters of the limit, the C++ has the rest."""
    most = _limit - _limit // 4 - nbytes
    held = _held()
    if held > most:
        _give_back(held - most)
        held = _held()
    fits = held <= most
    extension.limit_kept_buffers(max(_limit - held - (nbytes if fits else 0), 0))
    return fits


def _held() -> int:
    return sum(size * len(storages) for size, storages in list(_storages.items()))


def _give_back(nbytes: float) -> None:
    """So much of what is free, or all; sizes that were asked for first go first."""
    for size, storages in list(_storages.items()):
        while nbytes > 0 and _free_one(storages, size) is not None:
            nbytes -= size
        if not storages:
            _storages.pop(size, None)


def _free_one(storages: deque[UntypedStorage], nbytes: int) -> UntypedStorage | None:
    """One that nobody else has, taken out of the list: the last that was handed out, which a cache may still hold. What
    was resized, or moved to shared memory, leaves the list for good."""
    used, found = deque[UntypedStorage](), None
    while found is None:
        try:
            storage = storages.pop()
        except IndexError:
            break
        if storage.nbytes() != nbytes or not storage.resizable() or storage.is_shared():
            continue
        # The name here and getrefcount's argument. Not through a function of Python's: how many references a call
        # holds depends on who evaluates frames.
        if torch._C._storage_Use_Count(storage._cdata) == 1 and sys.getrefcount(storage) == 2:
            found = storage
        else:
            used.appendleft(storage)
    storages.extend(used)
    return found
