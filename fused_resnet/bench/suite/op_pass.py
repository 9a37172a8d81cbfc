"""A pass of a norm by itself, on an activation of a network: ``bench/passes.py`` as a task."""

from __future__ import annotations

from typing import Any

import torch

from fused_resnet.bench.norm_inputs import Norm
from fused_resnet.bench.passes import NormPass
from fused_resnet.bench.result import TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.sites import NormSite
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.bench.suite.task import Results


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

    def why_results_are_wrong(self, results: Results) -> str | None:
        return self.norm_pass.why_wrong(results, self.first)

    def least_bytes(self) -> int:
        return self.norm_pass.moved(self.site.shape(self.batch_size), self.dtype)
