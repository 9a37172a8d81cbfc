"""benchmarks/compile_kernels.py on the reference: its list of calls, and the pool that makes them."""

from __future__ import annotations

import torch

from benchmarks import compile_kernels


def test_kernels_are_listed_and_made_in_a_pool(capsys):
    calls = compile_kernels.calls_of("resnet18", 2, torch.float32, 32)
    ops = {op for op, _ in calls}
    assert {"conv_stats", "conv_grad_input", "conv_grad_weight", "conv_bn_act", "bn_apply_pool", "bn_stats"} <= ops
    twice = compile_kernels.grouped([*calls, *compile_kernels.calls_of("resnet18", 4, torch.float32, 32)])
    assert len(twice) < 2 * len(calls)
    assert all(len({op for op, _ in group}) == 1 for group in twice)
    planted = ("bn_apply", (("tensor", (2, 3), (3, 1), torch.float32), *[None] * 5, True))
    assert compile_kernels.compile_all([[calls[0]], [planted]], "reference", "cpu", jobs=1) == 1
    said = capsys.readouterr().out
    assert "failed: bn_apply" in said and "1 calls made, 0 not for reference, 1 failed" in said
    assert compile_kernels.make(calls, "native", "cpu")[1] > 0  # it has not all of them, and says so
