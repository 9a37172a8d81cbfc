"""What a block is made of, said once: a chain of sites, which training, freezing, the report and the ledger read."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fused_resnet.modules.plain import METHODS, has_own_methods


class Site(NamedTuple):
    """A convolution and what is fused after it, by the names that the modules have in the block."""

    conv: str
    norm: str
    act: str
    residual: str | None = None
    """The shortcut that is added before the activation: the name of a module, or of a None for the block's input."""
    pool: str | None = None
    """The max pooling after the activation."""


class Body(NamedTuple):
    """What follows the stem of a network, by the names of its modules: blocks in rows, the mean over all pixels and,
    flattened, the last layer."""

    stages: tuple[str, ...]
    average: str
    last: str


def sites_of(module: nn.Module) -> tuple[Site, ...]:
    """The chain of a module that runs the forward which its ``sites`` describe; none of any other module."""
    for cls in type(module).__mro__:
        if "sites" in cls.__dict__:
            runs = type(module).forward is cls.__dict__.get("forward") and has_own_methods(type(module))
            return cls.sites if runs and module.__dict__.keys().isdisjoint(METHODS) else ()  # type: ignore[attr-defined]
    return ()
