"""The training of one norm, with what follows it up to the ReLU, as a task: forward and backward by autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.bench.accuracy import Results
from fused_resnet.bench.ledger import saved_bytes
from fused_resnet.bench.norm_inputs import EPS, NEAR_ZERO, Norm
from fused_resnet.bench.result import TRAINING_STEP
from fused_resnet.bench.sites import PROJECTION, RELU, RESIDUAL, NormSite
from fused_resnet.bench.suite.op_base import COMPILE, EAGER, Call, OpTask, counted
from fused_resnet.ops import BatchNorm, bn_act, bn_act_dual, use_backend

MOMENTUM = 0.1
ACTIVATIONS = {
    RELU: 1 + 2 + 2 + 3,
    RESIDUAL: 1 + 3 + 4 + 3,
    PROJECTION: (1 + 1) + 3 + (4 + 3) + (2 + 3),
}
"""Read and written by the passes of a step (statistics, apply, sums, gradient: ``ops/reference/norm.py``) where the
output is kept for backward, by what follows the norm; of a projection each norm's."""
Forward = Callable[[str, list[Tensor], list[list[Tensor]]], Tensor]


class NormStepInputs:
    """What ``bn_act`` or ``bn_act_dual`` takes in training, requiring gradients where it can."""

    def __init__(self, ending: str, norm: Norm) -> None:
        self.ending, self.norm = ending, norm
        tensors = [norm.x, norm.weight, norm.bias]
        tensors += [norm.residual] if ending == RESIDUAL else []
        tensors += [norm.second.x, norm.second.weight, norm.second.bias] if ending == PROJECTION else []
        self.leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        zeros = torch.zeros_like(norm.bias)
        self.running = [[zeros.clone(), torch.ones_like(zeros)] for _ in range(2)]

    @functools.cached_property
    def grad_out(self) -> Tensor:
        """Random, and 0 where the ReLU's input is nearly 0: rounding alone would decide which way it goes."""
        z = plain(self.ending, [leaf.detach().double() for leaf in self.leaves], self.running_in_float64, relu=False)
        return torch.randn_like(self.norm.x).masked_fill_(z.abs() < NEAR_ZERO, 0)

    @property
    def running_in_float64(self) -> list[list[Tensor]]:
        return [[vector.double() for vector in pair] for pair in self.running]


class NormStepTask(OpTask):
    """``bn_act`` (``bn_act_dual`` at the end of a block with a projection) forward and backward.

    Results are the output and the gradients of x, weight, bias and, where there is one, the shortcut's x, or its x,
    weight and bias.
    """

    def __init__(self, site: NormSite, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(f"bn_act step {site.ending} {site}", TRAINING_STEP, batch_size, dtype, device)
        self.site = site

    def make_inputs(self) -> NormStepInputs:
        inputs = NormStepInputs(self.site.ending, Norm(self.site.shape(self.batch_size), self.dtype, self.device))
        assert inputs.grad_out.dtype == self.dtype  # made here, of the seed
        return inputs

    def ways(self) -> dict[str, Callable[[Any], Call]]:
        return super().ways() | {EAGER: lambda inputs: lambda: self.eager(inputs)}

    def eager(self, inputs: NormStepInputs) -> Results:
        return _step(inputs, plain)

    def compiled(self, inputs: NormStepInputs) -> Call:
        forward = torch.compile(plain, dynamic=False, backend=self.compile_backend)
        return lambda: _step(inputs, forward)

    def ours(self, inputs: NormStepInputs) -> Call:
        return lambda: _step(inputs, fused)

    def ops(self, inputs: NormStepInputs) -> list[tuple[str, tuple[Any, ...]]]:
        """The first and the last: what takes these takes those between."""
        norm = inputs.norm
        return [
            ("bn_stats", (norm.x, None, None, 0.0, EPS)),
            ("bn_grad_apply", (norm.x, norm.x, norm.bias, norm.weight, None, None, None, None, True)),
        ]

    def exact(self) -> Results:
        inputs = self.first
        leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
        with torch.enable_grad():
            out = plain(inputs.ending, leaves, inputs.running_in_float64)
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out.double())]

    def terms(self, index: int, exact: Tensor) -> int:
        return self.first.norm.values if exact.dim() == 1 else 1

    def least_bytes(self) -> int:
        """Of the passes of a whole step; nobody can do without their order. Vectors are not counted."""
        values = torch.Size(self.site.shape(self.batch_size)).numel()
        return ACTIVATIONS[self.site.ending] * values * self.dtype.itemsize

    def moved(self, name: str) -> int | None:
        if name == COMPILE:
            return None
        inputs, forward = self.first, plain if name == EAGER else fused
        with use_backend("auto" if name == EAGER else name):
            return counted(lambda: _step(inputs, forward))

    def saved(self, name: str) -> int | None:
        if name == COMPILE:
            return None
        inputs = self.first
        owned = nn.Module()  # what lives anyway
        vectors = [leaf.detach() for leaf in inputs.leaves if leaf.dim() == 1]
        for index, vector in enumerate([*vectors, *inputs.running[0], *inputs.running[1]]):
            owned.register_buffer(f"vector{index}", vector)
        forward: Forward = plain if name == EAGER else fused
        with use_backend("auto" if name == EAGER else name):
            return saved_bytes(owned, lambda: forward(inputs.ending, inputs.leaves, inputs.running))


def plain(ending: str, leaves: list[Tensor], running: list[list[Tensor]], relu: bool = True) -> Tensor:
    """As a network in eager PyTorch runs it."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor, vectors: list[Tensor]) -> Tensor:
        return F.batch_norm(x, vectors[0], vectors[1], weight, bias, True, MOMENTUM, EPS)

    z = norm(leaves[0], leaves[1], leaves[2], running[0])
    if ending == RESIDUAL:
        z = z.add_(leaves[3])
    if ending == PROJECTION:
        z = z.add_(norm(leaves[3], leaves[4], leaves[5], running[1]))
    return z.relu_() if relu else z


def fused(ending: str, leaves: list[Tensor], running: list[list[Tensor]]) -> Tensor:
    x, weight, bias, *others = leaves
    if ending == PROJECTION:
        x2, weight2, bias2 = others
        first = BatchNorm(weight, bias, running[0][0], running[0][1], True, MOMENTUM, EPS)
        second = BatchNorm(weight2, bias2, running[1][0], running[1][1], True, MOMENTUM, EPS)
        return bn_act_dual(x, first, x2, second)
    residual = others[0] if others else None
    mean, variance = running[0]
    return bn_act(x, weight, bias, mean, variance, residual, training=True, momentum=MOMENTUM, eps=EPS)


def _step(inputs: NormStepInputs, forward: Forward) -> Results:
    with torch.enable_grad():
        out = forward(inputs.ending, inputs.leaves, inputs.running)
    return [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad_out)]
