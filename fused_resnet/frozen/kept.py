"""What a module of a frozen model runs in the place of its forward, for as long as nobody changes anything inside it.

A forward of ours asks for it first, under the module's attribute `FROZEN`. It is made of the module's tensors as they
are, and made anew once one was written to, replaced or moved, or a part hooked, patched, replaced or set otherwise: a
call sees either the old weights or the new ones.
"""

import os
import threading
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fused_resnet.frozen.block import BlocksInARow, FoldedBlock, foldable_block, foldable_blocks, foldable_conv
from fused_resnet.frozen.fold import FoldedConv
from fused_resnet.frozen.network import FoldedNetwork, Pixels, foldable_network
from fused_resnet.modules.plain import (
    Snapshot,
    frozen_forward,
    has_global_hooks,
    has_memory,
    has_own_methods,
    is_patched,
)
from fused_resnet.modules.site import sites_of
from fused_resnet.ops.backends.native.conv import DoesNotFit
from fused_resnet.ops.layout import conv_memory_format
from fused_resnet.ops.route.context import is_transformed

Plan: TypeAlias = FoldedNetwork | BlocksInARow | FoldedBlock | FoldedConv


class _Lock:
    """Held while weights are loaded or folded. A child of ``fork`` has one of its own, which nobody holds."""

    def __init__(self) -> None:
        self.free()
        os.register_at_fork(after_in_child=self.free)

    def free(self) -> None:
        self.held = threading.RLock()


lock = _Lock()


@dataclass
class Settings:
    """Of a frozen model, one for all its parts."""

    dtype: torch.dtype
    """That its own parts compute in."""
    plain: torch.dtype
    """Of the model as it is."""
    pixels: Pixels | None = None


class Frozen:
    """Of one module. Copies and pickles take the settings along, and fold again.

    Args:
        settings: of the frozen model that the module is in.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: _Kept | None = None

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """What the module's forward gives for x, in x's dtype (for bytes: the frozen one) and in the memory format that
        the plain module gives; None where the forward has to run itself."""
        if must_run_itself(x) or x.dim() != 4 or x.numel() == 0:
            return None
        kept, dtype = self._kept, self._settings.dtype
        if kept is None or kept.dtype != dtype or not kept.snapshot.holds():
            kept = self._make(module)
        plan = kept.plan
        if plan is None or x.device != kept.device or x.shape[1] != kept.channels:
            return None
        has_bytes = x.dtype == torch.uint8
        if has_bytes and (self._settings.pixels is None or not isinstance(plan, FoldedNetwork)):
            return None
        if not has_bytes and not x.is_floating_point():
            return None
        try:
            out = plan(x if has_bytes else x.to(dtype))
        except DoesNotFit:  # PyTorch says it in its own words
            return None
        out = out if has_bytes else out.to(x.dtype)
        if out.dim() != 4 or kept.is_channels_last or conv_memory_format(x, x) is torch.channels_last:
            return out
        return out.contiguous()

    def _make(self, module: nn.Module) -> "_Kept":
        with lock.held:
            for _ in range(2):  # again, where somebody was writing meanwhile; if still, the next call finds it so
                kept = self._kept = _Kept(module, self._settings)
                if kept.snapshot.holds():
                    break
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {"_settings": self._settings, "_kept": None}


class _Kept:
    """A plan, and what it was made of."""

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self.dtype = settings.dtype
        self.snapshot = Snapshot(module, tensors=True)  # first: what is written from now on makes this stale
        self.plan = plan_of(module, settings)
        convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
        if not convs:
            self.plan = None
            return
        first = convs[0]
        self.device, self.channels = first.weight.device, first.weight.shape[1] * first.groups
        weights = (conv.weight for conv in convs)
        self.is_channels_last = any(conv_memory_format(each, each) is torch.channels_last for each in weights)


def plan_of(module: nn.Module, settings: Settings) -> Plan | None:
    """What can take the place of this module's forward; None where nothing can."""
    if has_global_hooks() or is_patched():
        return None
    plain, frozen = settings.plain, settings.dtype
    if isinstance(module, FrozenStage) and has_own_methods(FrozenStage):
        return foldable_blocks(module, plain, frozen)
    sites = sites_of(module)
    if not sites:
        return None
    if hasattr(module, "body"):
        return foldable_network(module, plain, frozen, settings.pixels)
    return foldable_block(module, plain, frozen) if len(sites) > 1 else foldable_conv(module, sites[0], frozen)


def must_run_itself(x: Tensor) -> bool:
    """True of what only the modules themselves can answer: gradients, traces, transforms, subclasses of Tensor."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) not in (Tensor, nn.Parameter):
        return True
    return torch._C._get_tracing_state() is not None or is_transformed() or x.is_neg() or not has_memory(x)


class FrozenStage(nn.Sequential):
    """Blocks in a row inside a frozen model: an ``nn.Sequential`` that may run them all at once."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # torch.jit.script compiles what follows this alone
            out = frozen_forward(self, x)
            return super().forward(x) if out is None else out
        for block in self:
            x = block(x)
        return x
