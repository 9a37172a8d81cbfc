"""Ops called by themselves with what does not fit together: an error that says what, and no memory read or written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_resnet.ops import use_backend
from fused_resnet.ops.schemas import SCHEMAS
from tests.ops.step import NEEDS_NATIVE

ONE = [1, 1], [1, 1], [1, 1], 1
STILL = None, None, 0.1, 1e-5
WINDOW = [3, 3], [2, 2], [1, 1]


def bad_calls() -> dict[str, list[tuple[object, ...]]]:
    """Of each op, arguments of which one is missing, or of another size or rank."""
    x, m, w, k = torch.randn(2, 4, 4, 4), torch.zeros(4), torch.ones(4), torch.randn(4, 4, 3, 3)
    short, scalar, one, mask = m[:2], torch.tensor(0.0), x[:1], torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    coefficients = torch.zeros(4, 4)
    return {
        "bn_stats": [(None, *STILL), (x[0], *STILL), (x, short, w, 0.1, 1e-5), (x, m, scalar, 0.1, 1e-5)],
        "bn_apply": [
            (None, m, w, w, m, None, True),
            (x, m, None, w, m, None, True),
            (x, None, None, w, m, None, True),
            (x, m, w, w, m.to("meta"), None, True),
            (x, m, w, w, m.cfloat(), None, True),
            (x, m.int(), w, w, m, None, True),
            (x, short, w[:2], w, m, None, True),
            (x, m, w, short, None, None, True),
            (x, scalar, scalar, None, None, None, True),
            (x, m, w, None, None, one, True),
            (x[0], m, w, None, None, None, True),
        ],
        "bn_apply_dual": [
            (x, m, w, None, None, x, m, None, None, None, True),
            (x, m, w, None, None, x, None, None, None, None, True),
            (x, m, w, None, None, one, m, w, None, None, True),
        ],
        "bn_grad_stats": [
            (x, x, None, m, None, None, None, True),
            (None, x, None, m, w, None, None, True),
            (x, x, None, m, w.to("meta"), None, None, True),
            (one, x, None, m, w, None, None, True),
            (x, x, one, m, w, None, None, True),
        ],
        "bn_grad_apply": [
            (x, x, m, None, None, None, None, None, True),
            (x, x, m, w, None, None, short, short, True),
        ],
        "bn_apply_mask": [(x, m, None, None, None, None), (x, m, w, None, None, one)],
        "bn_apply_dual_mask": [
            (x, m, w, None, None, x, m, None, None, None),
            (x, m, w, None, None, one, m, w, None, None),
        ],
        "bn_stats_apply": [(x, short, w, 0.1, 1e-5, w, m, None, True, False), (x, *STILL, w, m, one, True, False)],
        "bn_grad_stats_mask": [(x, x, mask, m, w, True), (x, x, mask, m, None, True)],
        "bn_grad_apply_mask": [(x, x, mask, m, w, None, m, m, True)],
        "stem": [(None, k, w, m, None, None), (x, k[0], w, m, None, None), (x, k, short, short, None, None)],
        "avgpool": [(None,), (x[0],)],
        "conv_bn_act": [
            (x, k, short, short, None, *ONE, True),
            (x, k, w, m, one, *ONE, True),
            (x, k[0], w, m, None, *ONE, True),
            (x, k[:, :2], w, m, None, *ONE, True),
            (x, k, w, m, None, [1], [1, 1], [1, 1], 1, True),
            (x, k, w, m, None, [0, 1], [1, 1], [1, 1], 1, True),
            (x, k, w, m, None, [1, 1], [1, 1], [9, 9], 1, True),
        ],
        "conv_stats": [
            (x, k, m, None, None, None, *STILL, *ONE, True),
            (x, k, None, None, None, None, short, short, 0.1, 1e-5, *ONE, True),
            (x, k, None, None, None, None, *STILL, [1, 1, 1], [1, 1], [1, 1], 1, True),
        ],
        "bn_apply_pool": [(x, m, None, None, None, *WINDOW), (x, m, w, None, None, [3], [2, 2], [1, 1])],
        "bn_pool_grad_stats": [(x, mask, x, m, w, None, None, *WINDOW)],
        "bn_pool_grad_apply": [(x, mask, x, m, w, None, None, m, m, *WINDOW)],
        "bn_grad_coefficients": [
            (m, m, m, None, None, 3.0),
            (short, short, m, w, None, 3.0),
        ],
        "conv_grad_input": [
            (x, None, None, k, x, m, None, None, None, None, *ONE),
            (one, None, None, k, x, None, None, None, None, None, *ONE),
            (x, None, None, k, x, None, None, None, None, one, *ONE),
        ],
        "conv_grad_weight": [
            (x, None, None, x, m, None, None, None, k, *ONE),
            (x, None, m, x, None, None, None, None, k, *ONE),
            (x, one, coefficients, x, None, None, None, None, k, *ONE),
        ],
    }  # fmt: skip


@NEEDS_NATIVE
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("op", SCHEMAS)
def test_what_does_not_fit_is_refused(op: str, backend: str):
    for arguments in bad_calls()[op]:
        before = [argument.clone() for argument in arguments if isinstance(argument, Tensor)]
        with use_backend(backend), pytest.raises(RuntimeError, match=f"{op}: "):
            getattr(torch.ops.fused_resnet, op)(*arguments)
        after = [argument for argument in arguments if isinstance(argument, Tensor)]
        assert all(now.is_meta or torch.equal(now, then) for now, then in zip(after, before, strict=True))
