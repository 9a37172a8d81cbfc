"""One call of C++ in a module's place, for as long as nobody touches a part of the module."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.modules.plain import Snapshot
from fused_resnet.ops.backends.native.chain import NativeChain
from fused_resnet.ops.route.listeners import runs_unseen

MOST_CHAINS = 4

_generations = itertools.count()
_generation = 0


def weights_changed() -> None:
    """Somebody's frozen weights were made, moved or loaded: what was laid out for any of them may be stale."""
    global _generation
    _generation = next(_generations)


class Chains:
    """The chains of one module, one for each shape of x. It does not hold the module, which may hold it.

    Args:
        plan: called with the module and the first x of a shape; None where a part of it cannot be in a chain.
    """

    def __init__(self, plan: Callable[[Any, Tensor], NativeChain | None]) -> None:
        self._plan = plan
        self._snapshot: Snapshot | None = None
        self._generation = 0
        self._chains: dict[tuple[torch.Size, torch.dtype, int], tuple[NativeChain | None]] = {}

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """What the module's forward gives for x; None where its parts have to be called."""
        if not runs_unseen(x):
            return None
        if self._snapshot is None or self._generation != _generation or not self._snapshot.holds():
            self._generation = _generation
            self._snapshot = snapshot = Snapshot(module)
            self._chains.clear()
            if not snapshot.holds():  # hooks, which want every part to be called
                return None
        key = (x.shape, x.dtype, torch.get_num_threads())
        found = self._chains.get(key)  # once: another thread may be clearing them
        if found is None:
            if len(self._chains) >= MOST_CHAINS:
                self._chains.clear()
            found = self._chains[key] = (self._plan(module, x),)
        (chain,) = found
        return None if chain is None else chain(x)
