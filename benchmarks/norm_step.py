"""The training of one norm, with what follows it up to the ReLU, as a task: forward and backward by autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
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


class Tail(nn.Module):
    """Norm and ReLU in plain PyTorch; before the ReLU a residual is added, or a shortcut's image after a norm of its
    own."""

    def __init__(self, *norms: nn.Module) -> None:
        super().__init__()
        self.norm, self.second = norms if len(norms) > 1 else (*norms, nn.Identity())

    def forward(self, x: Tensor, other: Tensor | None = None, relu: bool = True) -> Tensor:
        z = self.norm(x) if other is None else self.norm(x).add_(self.second(other))
        return z.relu_() if relu else z

    def fused(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The same by this package."""
        norms = [
            BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, True, MOMENTUM, EPS)
            for norm in self.children()
            if isinstance(norm, nn.BatchNorm2d)
        ]
        if len(norms) == 2:
            assert other is not None
            return bn_act_dual(x, norms[0], other, norms[1])
        weight, bias, mean, variance, *_ = norms[0]
        return bn_act(x, weight, bias, mean, variance, other, training=True, momentum=MOMENTUM, eps=EPS)


class NormStepInputs:
    """What ``bn_act`` or ``bn_act_dual`` takes in training, requiring gradients where it can: images and a `Tail`."""

    def __init__(self, ending: str, norm: Norm) -> None:
        norms = [norm, norm.second] if ending == PROJECTION else [norm]
        self.tail = Tail(*map(_module_of, norms)).train()
        self.values = norm.values
        images = [norm.x, *([norm.residual] if ending == RESIDUAL else [norm.second.x] if ending == PROJECTION else [])]
        self.images = [image.clone().requires_grad_() for image in images]
        with torch.no_grad():
            z = copy.deepcopy(self.tail).double()(*(image.double() for image in self.images), relu=False)
        self.grad_out = torch.randn_like(norm.x).masked_fill_(z.abs() < NEAR_ZERO, 0)
        """Random, and 0 where the ReLU's input is nearly 0: rounding alone would decide which way it goes."""

    def step(self, forward: Callable[..., Tensor]) -> Results:
        """The output, and the gradients of images and parameters."""
        with torch.enable_grad():
            out = forward(*self.images)
        return [out.detach(), *torch.autograd.grad(out, [*self.images, *self.tail.parameters()], self.grad_out)]


class NormStepTask(OpTask):
    """``bn_act`` (``bn_act_dual`` at the end of a block with a projection) forward and backward.

    Results are the output and the gradients of the images (x, and what is added to it) and of the norms' parameters.
    """

    def __init__(self, site: NormSite, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(f"bn_act step {site.ending} {site}", TRAINING_STEP, batch_size, dtype, device)
        self.site = site

    def make_inputs(self) -> NormStepInputs:
        return NormStepInputs(self.site.ending, Norm(self.site.shape(self.batch_size), self.dtype, self.device))

    def ways(self) -> dict[str, Callable[[Any], Call]]:
        return super().ways() | {EAGER: lambda inputs: lambda: self.eager(inputs)}

    def eager(self, inputs: NormStepInputs) -> Results:
        return inputs.step(inputs.tail)

    def compiled(self, inputs: NormStepInputs) -> Call:
        forward = torch.compile(inputs.tail, dynamic=False, backend=self.compile_backend)
        return lambda: inputs.step(forward)

    def ours(self, inputs: NormStepInputs) -> Call:
        return lambda: inputs.step(inputs.tail.fused)

    def ops(self, inputs: NormStepInputs) -> list[tuple[str, tuple[Any, ...]]]:
        """The first and the last: what takes these takes those between."""
        x, norm = inputs.images[0].detach(), inputs.tail.norm
        return [
            ("bn_stats", (x, None, None, 0.0, EPS)),
            ("bn_grad_apply", (x, x, norm.bias, norm.weight, None, None, None, None, True)),
        ]

    def exact(self) -> Results:
        twin = copy.copy(self.first)
        twin.tail, twin.grad_out = copy.deepcopy(twin.tail).double(), twin.grad_out.double()
        twin.images = [image.detach().double().requires_grad_() for image in twin.images]
        return twin.step(twin.tail)

    def terms(self, index: int, exact: Tensor) -> int:
        return self.first.values if exact.dim() == 1 else 1

    def least_bytes(self) -> int:
        """Of the passes of a whole step; nobody can do without their order. Vectors are not counted."""
        values = torch.Size(self.site.shape(self.batch_size)).numel()
        return ACTIVATIONS[self.site.ending] * values * self.dtype.itemsize

    def moved(self, name: str) -> int | None:
        return self._asked(name, lambda inputs, forward: counted(lambda: inputs.step(forward)))

    def saved(self, name: str) -> int | None:
        return self._asked(name, lambda inputs, forward: saved_bytes(inputs.tail, lambda: forward(*inputs.images)))

    def _asked(self, name: str, ask: Callable[[NormStepInputs, Callable[..., Tensor]], int | None]) -> int | None:
        """Of a contender's forward; None of compiled code."""
        if name == COMPILE:
            return None
        inputs = self.first
        with use_backend("auto" if name == EAGER else name):
            return ask(inputs, inputs.tail if name == EAGER else inputs.tail.fused)


def _module_of(norm: Norm) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(norm.shape[1], EPS, MOMENTUM, device=norm.device)
    with torch.no_grad():
        module.weight.copy_(norm.weight)
        module.bias.copy_(norm.bias)
    return module
