"""A pass of a norm by itself, on an activation of a network: ``bench/passes.py`` as a task."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fused_resnet.bench.norm_inputs import EPS, Norm
from fused_resnet.bench.passes import STATS_APPLY, NormPass
from fused_resnet.bench.result import TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.suite.op_base import COMPILE, EAGER, OpTask, counted, listed, on_backend, without_gradients
from fused_resnet.bench.suite.op_sites import NormSite
from fused_resnet.bench.suite.task import Results
from fused_resnet.ops import reference

TWO_OPS = {"cuda, two ops": "cuda", "triton, two ops": "triton"}
"""What ``STATS_APPLY`` does in one launch, as the two passes that it saves; by the backend."""

_ops = torch.ops.fused_resnet


class PassTask(OpTask):
    """One op of `passes.PASSES`, or ``STATS_APPLY``, on the activation of a site."""

    def __init__(
        self, norm_pass: NormPass, site: NormSite, batch_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        mode = TRAINING_STEP if norm_pass.op.startswith("bn_grad") else TRAINING_FORWARD
        super().__init__(f"{norm_pass.name} {site}", mode, batch_size, dtype, device)
        self.norm_pass, self.site = norm_pass, site

    def make_inputs(self) -> Norm:
        return Norm(self.site.shape(self.batch_size), self.dtype, self.device)

    def ways(self) -> dict[str, Callable[[Norm], Callable[[], Results]]]:
        found = {
            EAGER: lambda norm: without_gradients(functools.partial(self.norm_pass.eager, norm)),
            COMPILE: lambda norm: without_gradients(self.norm_pass.compiled(norm, self.compile_backend)),
        }
        if self.norm_pass is STATS_APPLY:
            for name in TWO_OPS:
                found[name] = functools.partial(self._two_ops, name)
        return found

    def why_not_way(self, name: str) -> list[str]:
        if name not in TWO_OPS or self.norm_pass is not STATS_APPLY:
            return super().why_not_way(name)
        norm = self.first
        first, second = ("bn_stats", (norm.x, None, None, 0.0, EPS)), self._second_op(name, norm, norm.statistics)
        return self.why_not_ops(TWO_OPS[name], [first, second])

    def ours(self, inputs: Norm) -> Callable[[], Results]:
        return self.norm_pass.call(inputs)

    def ops(self, inputs: Norm) -> list[tuple[str, tuple[Any, ...]]]:
        return [(self.norm_pass.op, self.norm_pass.arguments(inputs))]

    def exact(self) -> Results:
        arguments = [
            value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for value in self.norm_pass.arguments(self.first)
        ]
        return listed(getattr(reference, self.norm_pass.op)(*arguments))

    def why_results_are_wrong(self, results: Results) -> str | None:
        return self.norm_pass.why_wrong(results, self.first)

    def least_bytes(self) -> int:
        return self.norm_pass.moved(self.site.shape(self.batch_size), self.dtype)

    def moved(self, name: str) -> int | None:
        if name == EAGER:
            return counted(without_gradients(lambda: self.norm_pass.eager(self.first)))
        if name in TWO_OPS:  # x is read twice, and triton has no bits
            bits = self.norm_pass.masks if TWO_OPS[name] == "cuda" else 0
            return self.least_bytes() + self.first.x.nbytes - (self.norm_pass.masks - bits) * self._mask_bytes
        return super().moved(name)

    @property
    def _mask_bytes(self) -> int:
        rows, stride = reference.mask_shape(self.site.shape(self.batch_size))
        return rows * stride

    def _two_ops(self, name: str, norm: Norm) -> Callable[[], Results]:
        def run() -> Results:
            statistics = _ops.bn_stats(norm.x, None, None, 0.0, EPS)
            op, arguments = self._second_op(name, norm, statistics)
            results = listed(getattr(_ops, op)(*arguments))
            return [results[0], results[1] if len(results) > 1 else None, *statistics]

        return on_backend(TWO_OPS[name], run)

    @staticmethod
    def _second_op(name: str, norm: Norm, statistics: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        arguments = (norm.x, *statistics, norm.weight, norm.bias, norm.residual)
        return ("bn_apply_mask", arguments) if TWO_OPS[name] == "cuda" else ("bn_apply", (*arguments, True))
