"""Whether modules are as they were: asked at every call, in microseconds, before C++ takes their place."""

from __future__ import annotations

import itertools

from torch import nn

from fused_resnet.modules.bn_act import has_global_hooks

_generation = itertools.count()
_changes = 0


def weights_changed() -> None:
    """Somebody's frozen weights were made, moved or loaded: what was laid out for any of them may be stale."""
    global _changes
    _changes = next(_generation)


class Untouched:
    """What to look at to know that all that is inside a module still does what it did when this was made, with the
    weights it had: nobody hooked, compiled, replaced or reloaded a part. Weights written in place are not seen; nor is
    what was done to the module itself, which whoever does not call it has to ask (`is_intercepted`)."""

    def __init__(self, module: nn.Module) -> None:
        self._changes = _changes
        everything = list(module.modules())
        self._children = [(inner._modules, tuple(inner._modules.values())) for inner in everything if inner._modules]
        modules = everything[1:]  # without the module's own __dict__, in which this may lie
        self._hooks = [
            hooks
            for inner in modules
            for hooks in (
                inner._forward_hooks,
                inner._forward_pre_hooks,
                inner._backward_hooks,
                inner._backward_pre_hooks,
            )
        ]
        self._attributes = [inner.__dict__ for inner in modules]

    def holds(self) -> bool:
        return (
            self._changes == _changes
            and not any(self._hooks)
            and not has_global_hooks()
            and all(tuple(children.values()) == before for children, before in self._children)
            and not any("forward" in own or own.get("_compiled_call_impl") for own in self._attributes)
        )
