"""What ``torch.utils.flop_counter`` counts for our convolutions: by its own formulas, as for PyTorch's.

They are registered when somebody imports the counter, and not before: that takes as long as importing this package.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from fused_resnet.ops.reference.stem import CONVOLUTION

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def register(counter: ModuleType) -> None:
    """Gives the counter a formula for each of our ops that convolves."""
    ops, backward = torch.ops.fused_resnet, counter.flop_registry[torch.ops.aten.convolution_backward].__wrapped__

    @counter.register_flop_formula(ops.conv_bn_act)
    def _(x: Shape, conv_weight: Shape, *others: Any, out_shape: Shape) -> int:
        return counter.conv_flop_count(x, conv_weight, out_shape)

    @counter.register_flop_formula(ops.stem)
    def _(x: Shape, conv_weight: Shape, *others: Any, out_shape: Shape) -> int:
        unpooled = (*out_shape[:2], *CONVOLUTION.output_size(x, conv_weight))
        return counter.conv_flop_count(x, conv_weight, unpooled)

    @counter.register_flop_formula(ops.conv_stats)
    def _(x: Shape, conv_weight: Shape, *others: Any, out_shape: Sequence[Shape]) -> int:
        return counter.conv_flop_count(x, conv_weight, out_shape[0])

    def gradients(dz: Shape, x: Shape, conv_weight: Shape, of_input: bool) -> int:
        moves = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # which the formula does not look at
        return backward(dz, x, conv_weight, *moves, [of_input, not of_input, False], out_shape=(x, conv_weight, None))

    @counter.register_flop_formula(ops.conv_grad_input)
    def _(dz: Shape, y: Any, coefficients: Any, conv_weight: Shape, x: Shape, *others: Any, out_shape: Any) -> int:
        return gradients(dz, x, conv_weight, True)

    @counter.register_flop_formula(ops.conv_grad_weight)
    def _(dz: Shape, y: Any, coefficients: Any, x: Shape, *others: Any, out_shape: Shape) -> int:
        return gradients(dz, x, out_shape, False)


class _OnImport(importlib.abc.MetaPathFinder):
    """Has the counter found as ever, and `register` run once it is imported."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_once_imported() -> None:
    """Now, if the counter is imported already."""
    if (counter := sys.modules.get(COUNTER)) is not None:
        register(counter)
    else:
        sys.meta_path.insert(0, _OnImport())
