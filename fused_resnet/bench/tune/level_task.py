"""Forward and backward of one link of a residual block at a level, as a task: what of a training step depends on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import Norm
from fused_resnet.bench.accuracy import Results, terms_of_products
from fused_resnet.bench.norm_inputs import EPS
from fused_resnet.bench.result import TRAINING_STEP
from fused_resnet.bench.sites import ConvSite
from fused_resnet.bench.suite.op_base import Call, OpTask
from fused_resnet.bench.suite.op_conv_training import ConvTrainingInputs
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.ops import reference, use_backend
from fused_resnet.ops.batch_norm import BatchNorm
from fused_resnet.ops.conv_norm import ConvNorm, Done, Raw, Upstream, backward_link, forward_link
from fused_resnet.ops.reference.norm import normalize
from fused_resnet.ops.route.context import asking
from fused_resnet.ops.route.routes import DISPATCHED, LinkRoute, kept_pass_route, link_route

Ran = tuple[Done, Tensor | None, Upstream | None, tuple[Tensor, Tensor] | None]
Y, MEAN, INVSTD, GRAD_WEIGHT, GRAD_INPUT = range(5)
"""The places of the results; the two sums of the norm in front follow."""


class LevelTask(OpTask):
    """One convolution of a network with the norms around it, whose results are the same at every level, but for
    rounding. The baseline of the rule is PyTorch's own operations: level 0 of the reference."""

    def __init__(self, site: ConvSite, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        place = ", behind a norm" if site.normed else ""
        super().__init__(f"training level {site.conv}{place}", TRAINING_STEP, batch_size, dtype, device)
        self.site = site

    def make_inputs(self) -> LevelStep:
        inputs = ConvTrainingInputs(self.site, self.batch_size, self.dtype, self.device)
        return LevelStep(inputs, self.site.takes_gradient, self.dtype)

    def ops(self, inputs: LevelStep) -> list[tuple[str, tuple[Any, ...]]]:
        return []

    def eager(self, inputs: LevelStep) -> Results:
        with use_backend("reference"):
            return inputs.results(0)

    def exact(self) -> Results:
        return self.eager(LevelStep(self.first.inputs, self.site.takes_gradient, torch.float64))

    def prepare(self, name: str, make: Callable[[Any], Call]) -> Prepared:
        """At the level of this name."""
        return dataclasses.replace(super().prepare(name, make), results=lambda: self.first.results(int(name)))

    def terms(self, index: int, exact: Tensor) -> int:
        inputs = self.first.inputs
        terms = terms_of_products(self.dtype, inputs.weight[0].numel())
        return terms if index in (Y, GRAD_INPUT) else terms * inputs.behind.values

    def magnitude(self, index: int) -> float | None:
        """y's mean is rounded with y, which also changes its deviation."""
        y, mean, invstd, *_ = self._exact
        assert y is not None and mean is not None and invstd is not None
        if index == MEAN:
            return y.abs().max().item()
        return (invstd * (1 + mean.abs() * invstd)).max().item() if index == INVSTD else None


class LevelStep:
    """One convolution, the norm and ReLU in front of it if ``inputs.normed``, and the norm behind it; no running
    statistics, so that a run leaves nothing behind.

    Args:
        inputs: the tensors.
        takes_gradient: whether the input wants one.
        dtype: in which it is computed; float64 is exact.
    """

    def __init__(self, inputs: ConvTrainingInputs, takes_gradient: bool, dtype: torch.dtype) -> None:
        self.inputs, self._takes_gradient = inputs, takes_gradient
        self._dz = inputs.dz.to(dtype)
        before = inputs.before.norm_in(reference.statistics_dtype(self._dz)) if inputs.normed else None
        x = inputs.x.to(dtype)
        self._before = Raw(x, before, (kept_pass_route(x) or DISPATCHED).passes)
        norm = BatchNorm(self._wide(inputs.behind.weight), self._wide(inputs.behind.bias), None, None, True, 0.1, EPS)
        self._link = ConvNorm(inputs.weight.to(dtype), norm, *inputs.settings)
        self._routes: dict[int, LinkRoute] = {}

    def run(self, level: int) -> Ran:
        """What forward left, the gradient of the weight, that of the input on its way on, and the two sums over it of
        the norm in front."""
        with torch.no_grad():
            done = forward_link(self._before, self._link, self._route(level))
            upstream = Upstream(self._dz, True, self._sums)
            arguments = (done, self._before, True, self._takes_gradient, None)
            grad_weight, following = backward_link(upstream, self._sums, *arguments)
            if following is None or self._before.norm is None:
                return done, grad_weight, following, None
            if following.sums is not None:
                return done, grad_weight, following, following.sums
            x, grad = self._before.tensor, following.grad
            sums = self._before.passes.bn_grad_stats(grad, x, None, self._before.norm, not following.masked)
            return done, grad_weight, following, sums[:2]

    def results(self, level: int) -> list[Tensor | None]:
        """y, its mean and invstd, the gradients of weight and input, and the two sums; None for what there is not."""
        done, grad_weight, following, sums = self.run(level)
        grad = None if following is None else following.grad if following.masked else self._masked(following.grad)
        return [done.y, done.norm.mean, done.norm.invstd, grad_weight, grad, *(sums or (None, None))]

    @functools.cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """Of the gradient that comes from behind, with the output that the convolution has."""
        done = forward_link(self._before, self._link, self._route(0))
        y, dz = done.y.double(), self._dz.double()
        norm = Norm(done.norm.mean.double(), done.norm.invstd.double())
        first, second, _ = reference.bn_grad_stats(dz, y, None, norm, False)
        return self._wide(first), self._wide(second)

    def _route(self, level: int) -> LinkRoute:
        """Decided once, as a block's is: it is no part of what is timed."""
        if level not in self._routes:
            with asking(level=level):
                self._routes[level] = link_route(self._before.tensor, self._link.conv_weight, self._link.settings)
        return self._routes[level]

    def _masked(self, grad: Tensor) -> Tensor:
        if self._before.norm is None:
            return grad
        z = normalize(self.inputs.x.double(), self.inputs.before.norm_in(torch.float64))
        return torch.where(z > 0, grad, 0)

    def _wide(self, vector: Tensor) -> Tensor:
        return vector.to(reference.statistics_dtype(self._dz))
