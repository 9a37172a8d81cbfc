"""One call of C++ in a module's place, for as long as nobody touches a part of the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.modules.untouched import Untouched
from fused_resnet.ops.backend import runs_unseen
from fused_resnet.ops.native_chain import NativeChain

MOST_CHAINS = 4


class Chains:
    """The chains of one module, one for each shape of x.

    Args:
        module: what they stand for.
        plan: called with the module and the first x of a shape; None where a part of it cannot be in a chain.
    """

    def __init__(self, module: nn.Module, plan: Callable[[Any, Tensor], NativeChain | None]) -> None:
        self._module, self._plan = module, plan
        self._untouched: Untouched | None = None
        self._chains: dict[tuple[torch.Size, torch.dtype, int], NativeChain | None] = {}

    def __call__(self, x: Tensor) -> Tensor | None:
        """What the module gives for x; None where it has to be called as it is."""
        if not runs_unseen(x):
            return None
        if self._untouched is None or not self._untouched.holds():
            self._untouched = Untouched(self._module)
            self._chains.clear()
            if not self._untouched.holds():  # hooks, which want every module to be called
                return None
        key = (x.shape, x.dtype, torch.get_num_threads())
        if key not in self._chains:
            if len(self._chains) >= MOST_CHAINS:
                self._chains.clear()
            self._chains[key] = self._plan(self._module, x)
        chain = self._chains[key]
        return None if chain is None else chain(x)
