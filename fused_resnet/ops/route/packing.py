"""The arguments of an op as its function takes them, and one by one as its schema does: PyTorch's dispatcher knows
tensors, numbers and lists only.

A function has one argument for each run of names in its schema that are the fields, or the first fields, of a type in
``fused_resnet/arguments.py`` (a 2 at their end aside). A norm and sums are None where a schema's first two are not both
given.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fused_resnet.arguments import ConvSettings, Norm, PoolSettings
from fused_resnet.ops.schemas import SCHEMAS

Make = Callable[..., Any]


def _if_given(make: Make) -> Make:
    return lambda first, second, *more: None if first is None or second is None else make(first, second, *more)


def _tuple(*arguments: Any) -> tuple[Any, ...]:
    return arguments


_TYPES: dict[tuple[str, ...], Make] = {
    Norm._fields: _if_given(Norm),
    ("sum_dz", "sum_dz_xhat"): _if_given(_tuple),
    ("running_mean", "running_var", "momentum", "eps"): _tuple,
    ConvSettings._fields: ConvSettings.of,
    PoolSettings._fields: PoolSettings.of,
}


@functools.cache
def argument_names(op: str) -> tuple[str, ...]:
    """Those of the op's schema."""
    return tuple(argument.name for argument in getattr(torch.ops.fused_resnet, op).default._schema.arguments)


def packed(op: str, arguments: Sequence[Any]) -> list[Any]:
    """The arguments of the op's function, from those of its schema."""
    found, first = list[Any](), 0
    for size, make in _parts(op):
        part = arguments[first : first + size]
        found.append(part[0] if make is None else make(*part))
        first += size
    return found


def flat(op: str, arguments: Iterable[Any]) -> list[Any]:
    """The arguments of the op's schema, from those of its function."""
    return _flat(_parts(op), arguments)


Parts = tuple[tuple[int, Make | None], ...]
"""Of each argument of a function: how many of the schema's it is made of, and how; None of one that stays itself."""


def _flat(parts: Parts, arguments: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for (size, make), argument in zip(parts, arguments, strict=True):
        if make is None:
            found.append(argument)
        else:
            found += [None] * size if argument is None else argument[:size]
    return found


@functools.cache
def _parts(op: str) -> Parts:
    names, found = [name.rstrip("2") for name in argument_names(op)], list[tuple[int, Make | None]]()
    while names:
        sizes = {make: _shared(names, fields) for fields, make in _TYPES.items()}
        make = max(sizes, key=sizes.__getitem__)
        found.append((sizes[make], make) if sizes[make] > 1 else (1, None))
        del names[: found[-1][0]]
    return tuple(found)


def _shared(names: Sequence[str], fields: Sequence[str]) -> int:
    """How many both begin with."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(names, fields, strict=False))))


def _by_dispatcher(op: str) -> Callable[..., Any]:
    overloads, parts = getattr(torch.ops.fused_resnet, op), _parts(op)
    return lambda *arguments: overloads(*_flat(parts, arguments))


BY_DISPATCHER = {op: _by_dispatcher(op) for op in SCHEMAS}
"""The functions of all ops by way of PyTorch's dispatcher, which chooses a backend at every call."""
