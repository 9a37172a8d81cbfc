"""Forward and backward of one link of a residual block at a level: what of a training step depends on the level."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fused_resnet.arguments import Norm
from fused_resnet.bench.norm_inputs import EPS
from fused_resnet.bench.suite.op_conv_training import ConvTrainingInputs
from fused_resnet.ops import reference
from fused_resnet.ops.batch_norm import BatchNorm
from fused_resnet.ops.conv_norm import ConvNorm, Done, Raw, Upstream, backward_link, forward_link
from fused_resnet.ops.reference.norm import normalize
from fused_resnet.ops.route.request import asking
from fused_resnet.ops.route.routes import DISPATCHED, LinkRoute, kept_pass_route, link_route

Ran = tuple[Done, Tensor | None, Upstream | None, tuple[Tensor, Tensor] | None]


class LevelStep:
    """One convolution, the norm and ReLU in front of it if ``inputs.normed``, and the norm behind it; no running
    statistics, so that a run leaves nothing behind.

    Args:
        inputs: the tensors.
        takes_gradient: whether the input wants one.
        dtype: in which it is computed; float64 is exact.
    """

    def __init__(self, inputs: ConvTrainingInputs, takes_gradient: bool, dtype: torch.dtype) -> None:
        self._inputs, self._takes_gradient = inputs, takes_gradient
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

    def results(self, level: int) -> dict[str, Tensor]:
        """The same for every level, but for rounding: by name, what the step computes."""
        done, grad_weight, following, sums = self.run(level)
        assert grad_weight is not None
        found = {"y": done.y, "mean": done.norm.mean, "invstd": done.norm.invstd, "grad_weight": grad_weight}
        if following is not None:
            found["grad_input"] = following.grad if following.masked else self._masked(following.grad)
        if sums is not None:
            found |= {"sum_dz": sums[0], "sum_dz_xhat": sums[1]}
        return found

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
        z = normalize(self._inputs.x.double(), self._inputs.before.norm_in(torch.float64))
        return torch.where(z > 0, grad, 0)

    def _wide(self, vector: Tensor) -> Tensor:
        return vector.to(reference.statistics_dtype(self._dz))
