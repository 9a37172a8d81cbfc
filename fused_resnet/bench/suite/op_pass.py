"""A pass of a norm by itself, on an activation of a network: ``bench/passes.py`` as a task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.bench.accuracy import Results
from fused_resnet.bench.norm_inputs import Norm
from fused_resnet.bench.passes import NormPass
from fused_resnet.bench.result import TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.sites import NormSite
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.ops import reference

WRONG_BITS = 1e-5
"""The part of a mask's bits that rounding may turn over."""


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

    def ops(self, inputs: Norm) -> list[tuple[str, tuple[Any, ...]]]:
        return [(self.norm_pass.op, self.norm_pass.arguments(inputs))]

    def eager(self, inputs: Norm) -> Results:
        return self.norm_pass.eager(inputs)

    def judge(self, index: int, ours: Tensor, theirs: Tensor | None, right: Tensor) -> str | None:
        if right.dtype != torch.uint8:
            return super().judge(index, ours, theirs, right)
        turned = reference.unpack_mask(ours, self.first.x) != reference.unpack_mask(right, self.first.x)
        part = turned.double().mean().item()
        return None if part <= WRONG_BITS else f"{part:.3g} of the bits differ"

    def terms(self, index: int, exact: Tensor) -> int:
        return self.first.values if index in self.norm_pass.sums else 1

    def magnitude(self, index: int) -> float | None:
        return self.first.x.abs().max().item() if index == self.norm_pass.mean else None
