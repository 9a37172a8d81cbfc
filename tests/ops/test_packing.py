"""The arguments of every op, one by one as its schema has them and packed as its function takes them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings, Norm, PoolSettings
from fused_resnet.ops import reference
from fused_resnet.ops.route.packing import flat, packed
from fused_resnet.ops.schemas import SCHEMAS
from tests.ops.test_compile import OTHER_FORMS, op_arguments

X, RESIDUAL = torch.randn(2, 5, 6, 7), torch.randn(2, 5, 6, 7)
KINDS = {"norm": Norm, "norm2": Norm, "sums": tuple, "running": tuple}


@pytest.mark.parametrize("op", SCHEMAS)
def test_what_is_packed_unpacks_to_the_same(op: str):
    names = list(inspect.signature(getattr(reference, op)).parameters)
    whole = op_arguments(X, RESIDUAL)[op]
    for arguments in (whole, OTHER_FORMS[op](whole)):
        found = packed(op, arguments)
        assert len(found) == len(names)
        for name, argument in zip(names, found, strict=True):
            kind = KINDS.get(name, (ConvSettings, PoolSettings) if name == "settings" else object)
            assert argument is None or isinstance(argument, kind), name
        again = flat(op, found)
        assert len(again) == len(arguments) and all(map(same, again, arguments))


def same(first: Any, second: Any) -> bool:
    """The same tensor, or equal; what the dispatcher has as a list may be a tuple."""
    if isinstance(second, list) and isinstance(first, tuple):
        return list(first) == second
    return first is second if isinstance(second, Tensor) else first == second


def test_a_norm_or_sums_of_which_one_vector_is_missing_are_not_there():
    vector = torch.ones(5)
    assert packed("bn_grad_apply", (X, X, vector, vector, None, None, vector, None, True))[3] is None
    weight, settings = torch.randn(8, 5, 1, 1), ConvSettings()
    arguments = packed("conv_stats", (X, weight, None, None, vector, vector, None, None, 0.1, 1e-5, *settings, True))
    assert arguments[2:] == [None, (None, None, 0.1, 1e-5), settings, True]
    assert flat("conv_stats", arguments)[2:6] == [None] * 4
