"""The three convolutions of a training step, each with the norms around it, as tasks.

In a block, a norm and a ReLU precede a convolution and a norm follows it; one kernel of this package does what of them
can be done on the way (``ops/route/fusion_level.py``, level 3), where PyTorch runs passes beside the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.bench.accuracy import Results, terms_of_products
from fused_resnet.bench.norm_inputs import EPS, NEAR_ZERO, Norm
from fused_resnet.bench.passes import eager_norm, eager_statistics, eager_sums, eager_through_norm
from fused_resnet.bench.result import TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.sites import ConvSite
from fused_resnet.bench.suite import op_base
from fused_resnet.bench.suite.op_base import SEPARATE, Call, OpTask, on_backend, without_gradients
from fused_resnet.ops import reference
from fused_resnet.ops.reference.norm import normalize

FORWARD, GRAD_INPUT, GRAD_WEIGHT = "conv_stats", "conv_grad_input", "conv_grad_weight"
PRODUCTS = (FORWARD, GRAD_INPUT, GRAD_WEIGHT)
NO_MOMENTS = (None, None, 0.1, EPS)
"""No running statistics, so that a run leaves nothing behind."""

_ops = torch.ops.fused_resnet


class ConvTrainingInputs:
    """Tensors of one convolution in a block, channels_last: what comes before it, and what comes back from behind.

    ``before`` is the raw input with the norm before it, whose ReLU's input is nowhere so near to 0 that rounding would
    decide which way it goes; ``behind`` is the output with the norm after it, and in it the gradient that arrives.
    """

    def __init__(self, site: ConvSite, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        conv = site.conv
        self.settings, self.normed = conv.settings, site.normed
        self.before = Norm(conv.input_shape(batch_size), dtype, device)
        z = normalize(self.before.x, self.before.norm)
        upwards = (2 * NEAR_ZERO / (self.before.norm.invstd * self.before.weight))[:, None, None]
        self.before.x = torch.where(z.abs() < NEAR_ZERO, self.before.x + upwards, self.before.x).to(dtype)
        self.x = self.before.x = self.before.x.contiguous(memory_format=torch.channels_last)
        self.behind = Norm(conv.output_shape(batch_size), dtype, device)
        self.y, self.dz = self.behind.x, self.behind.grad_out
        self.weight = op_base.random_weight(conv.weight_shape, dtype, device)
        self.coefficients = reference.bn_grad_coefficients(self.behind.sums, self.behind.norm, self.behind.values)
        kept = self.before.activation_alone, self.before.running, self.behind.running, self.behind.sums_for_eager
        assert all(each is not None for each in kept)  # made here and not in a run: what eager has at hand

    @property
    def norm_before(self) -> tuple[Tensor | None, ...]:
        """mean, invstd, weight and bias; None each where no norm precedes it."""
        return self.before.norm if self.normed else (None,) * 4

    def arguments(self, product: str) -> tuple[Any, ...]:
        """Of the op of this name."""
        if product == FORWARD:
            return (self.x, self.weight, *self.norm_before, *NO_MOMENTS, *self.settings, True)
        gradient = (self.dz, self.y, self.coefficients)
        if product == GRAD_INPUT:
            return (*gradient, self.weight, self.x, *self.norm_before, None, *self.settings)
        return (*gradient, self.x, *self.norm_before, self.weight, *self.settings)

    def backward(self, dy: Tensor, x: Tensor, wanted: int) -> Tensor:
        """PyTorch's gradient of the input (0) or of the weight (1)."""
        stride, padding, dilation, groups = self.settings
        settings = (None, stride, padding, dilation, False, [0, 0], groups, [wanted == 0, wanted == 1, False])
        return torch.ops.aten.convolution_backward(dy, x, self.weight, *settings)[wanted]


class ConvTrainingTask(OpTask):
    """``conv_stats``, ``conv_grad_input`` or ``conv_grad_weight`` on one shape of a network; the results are theirs."""

    def __init__(
        self, site: ConvSite, product: str, batch_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        place = ", behind a norm" if site.normed else ""
        mode = TRAINING_FORWARD if product == FORWARD else TRAINING_STEP
        super().__init__(f"{product} {site.conv}{place}", mode, batch_size, dtype, device)
        self.site, self.product = site, product
        self.exists = product != GRAD_INPUT or site.takes_gradient

    def make_inputs(self) -> ConvTrainingInputs:
        return ConvTrainingInputs(self.site, self.batch_size, self.dtype, self.device)

    def ops(self, inputs: ConvTrainingInputs) -> list[tuple[str, tuple[Any, ...]]]:
        return [(self.product, inputs.arguments(self.product))]

    def eager(self, inputs: ConvTrainingInputs) -> Results:
        return _EAGER[self.product](inputs)

    def ways(self) -> dict[str, Callable[[Any], Call]]:
        separate = _SEPARATE[self.product]
        made = lambda inputs: on_backend("auto", without_gradients(lambda: separate(inputs)))  # noqa: E731
        return super().ways() | {SEPARATE: made}

    def why_not(self, name: str) -> list[str]:
        return [] if name == SEPARATE else super().why_not(name)

    def terms(self, index: int, exact: Tensor) -> int:
        weight = self.first.weight
        terms = terms_of_products(self.dtype, (weight[0] if self.product == FORWARD else weight[:, 0]).numel())
        pixels = (self.first.before if self.product == GRAD_INPUT else self.first.behind).values
        return terms * pixels if exact.dim() == 1 or self.product == GRAD_WEIGHT else terms

    def magnitude(self, index: int) -> float | None:
        """y's mean is rounded with y, which also changes its deviation."""
        if self.product != FORWARD or index == 0:
            return None
        y, mean, invstd = self._exact
        assert y is not None and mean is not None and invstd is not None
        return (y.abs().max() if index == 1 else (invstd * (1 + mean.abs() * invstd)).max()).item()

    def moved(self, name: str) -> int | None:
        if name == "reference":  # with copies of its own
            return None
        if name == SEPARATE:
            return op_base.counted(without_gradients(lambda: _SEPARATE[self.product](self.first)))
        return super().moved(name)

    def flop(self) -> int:
        return self.site.conv.flop(self.batch_size)


def _eager_forward(inputs: ConvTrainingInputs) -> Results:
    activation = eager_norm(inputs.before).relu_() if inputs.normed else inputs.x
    y = F.conv2d(activation, inputs.weight, None, *inputs.settings)
    return [y, *eager_statistics(y)]


def _eager_dy(inputs: ConvTrainingInputs) -> Tensor:
    """Through the norm after it; eager's backward makes its two sums on the way, which here are there already."""
    return eager_through_norm(inputs.behind, inputs.dz, "sums")


def _eager_grad_input(inputs: ConvTrainingInputs) -> Results:
    da = inputs.backward(_eager_dy(inputs), inputs.x, 0)
    if not inputs.normed:
        return [da, None, None]
    grad = torch.ops.aten.threshold_backward(da, inputs.before.activation_alone, 0)
    return [grad, *eager_sums(inputs.before, grad)]


def _eager_grad_weight(inputs: ConvTrainingInputs) -> Results:
    """The gradient of y is made again, since the task begins with dz; eager has kept the activation."""
    activation = inputs.before.activation_alone if inputs.normed else inputs.x
    return [inputs.backward(_eager_dy(inputs), activation, 1)]


def _separate_activation(inputs: ConvTrainingInputs) -> Tensor:
    return _ops.bn_apply(inputs.x, *inputs.before.norm, None, True) if inputs.normed else inputs.x


def _separate_forward(inputs: ConvTrainingInputs) -> Results:
    y = F.conv2d(_separate_activation(inputs), inputs.weight, None, *inputs.settings)
    return [y, *_ops.bn_stats(y, *NO_MOMENTS)]


def _separate_dy(inputs: ConvTrainingInputs) -> Tensor:
    return _ops.bn_grad_apply(inputs.dz, inputs.y, *inputs.behind.norm, *inputs.behind.sums, False)


def _separate_grad_input(inputs: ConvTrainingInputs) -> Results:
    da = inputs.backward(_separate_dy(inputs), inputs.x, 0)
    if not inputs.normed:
        return [da, None, None]
    return [None, *_ops.bn_grad_stats(da, inputs.x, None, *inputs.before.norm, True)[:2]]


def _separate_grad_weight(inputs: ConvTrainingInputs) -> Results:
    return [inputs.backward(_separate_dy(inputs), _separate_activation(inputs), 1)]


_EAGER = {FORWARD: _eager_forward, GRAD_INPUT: _eager_grad_input, GRAD_WEIGHT: _eager_grad_weight}
_SEPARATE = {FORWARD: _separate_forward, GRAD_INPUT: _separate_grad_input, GRAD_WEIGHT: _separate_grad_weight}
