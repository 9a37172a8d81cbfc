"""The three convolutions of a training step, each with the norms around it, as tasks.

In a block, a norm and a ReLU stand in front of a convolution and a norm behind it; one kernel of this package does what
of them can be done on the way (``ops/route/fusion_level.py``, level 3), where PyTorch runs passes beside the
convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.bench.norm_inputs import EPS, NEAR_ZERO, Norm
from fused_resnet.bench.passes import why_wrong
from fused_resnet.bench.result import TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.suite.op_base import (
    COMPILE,
    EAGER,
    SEPARATE,
    OpTask,
    counted,
    listed,
    on_backend,
    terms_of_products,
    without_gradients,
)
from fused_resnet.bench.suite.op_sites import ConvSite
from fused_resnet.bench.suite.task import Results
from fused_resnet.ops import reference
from fused_resnet.ops.reference.norm import normalize

FORWARD, GRAD_INPUT, GRAD_WEIGHT = "conv_stats", "conv_grad_input", "conv_grad_weight"
PRODUCTS = (FORWARD, GRAD_INPUT, GRAD_WEIGHT)
NO_MOMENTS = (None, None, 0.1, EPS)
"""No running statistics, so that a run leaves nothing behind."""

_ops = torch.ops.fused_resnet


class ConvTrainingInputs:
    """Tensors of one convolution in a block, channels_last: what is in front of it, and what comes back from behind.

    ``before`` is the raw input with the norm in front, whose ReLU's input is nowhere so near to 0 that rounding would
    decide which way it goes; ``behind`` is the output with the norm behind it, and in it the gradient that arrives.
    """

    def __init__(self, site: ConvSite, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        conv = site.conv
        self.settings, self.normed = conv.settings, site.normed
        self.before = Norm(conv.input_shape(batch_size), dtype, device)
        _, invstd, weight, _ = self.before.norm
        z = normalize(self.before.x, *self.before.norm)
        upwards = (2 * NEAR_ZERO / (invstd * weight))[:, None, None]
        self.before.x = torch.where(z.abs() < NEAR_ZERO, self.before.x + upwards, self.before.x).to(dtype)
        self.x = self.before.x = self.before.x.contiguous(memory_format=torch.channels_last)
        self.behind = Norm(conv.output_shape(batch_size), dtype, device)
        self.y, self.dz = self.behind.x, self.behind.grad_out
        taps = conv.weight_shape[1] * conv.weight_shape[2] * conv.weight_shape[3]
        weights = torch.randn(conv.weight_shape, device=device) * taps**-0.5
        self.weight = weights.to(dtype).contiguous(memory_format=torch.channels_last)
        mean, invstd, norm_weight, _ = self.behind.norm
        self.coefficients = reference.bn_grad_coefficients(
            *self.behind.sums, mean, invstd, norm_weight, self.behind.values
        )
        kept = self.before.activation_alone, self.before.running, self.behind.running, self.behind.sums_for_eager
        assert all(each is not None for each in kept)  # made here and not in a run: what eager has at hand

    @property
    def norm_before(self) -> tuple[Tensor | None, ...]:
        """mean, invstd, weight and bias; None each where no norm stands in front."""
        return self.before.norm if self.normed else (None,) * 4

    def arguments(self, product: str) -> tuple[Any, ...]:
        """Of the op of this name."""
        if product == FORWARD:
            return (self.x, self.weight, *self.norm_before, *NO_MOMENTS, *self.settings, True)
        gradient = (self.dz, self.y, self.coefficients)
        if product == GRAD_INPUT:
            return (*gradient, self.weight, self.x, *self.norm_before, None, *self.settings)
        return (*gradient, self.x, *self.norm_before, self.weight, *self.settings)


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

    def ways(self) -> dict[str, Callable[[ConvTrainingInputs], Callable[[], Results]]]:
        return {
            EAGER: lambda inputs: without_gradients(lambda: _EAGER[self.product](inputs)),
            COMPILE: self._compiled,
        }

    def why_not(self, backend: str) -> list[str]:
        return [] if backend == SEPARATE else super().why_not(backend)

    def prepare(self, name: str, make: Callable[[Any], Callable[[], Results]]) -> Any:
        if name != SEPARATE:
            return super().prepare(name, make)
        separate = _SEPARATE[self.product]
        return super().prepare(name, lambda inputs: on_backend("auto", without_gradients(lambda: separate(inputs))))

    def ours(self, inputs: ConvTrainingInputs) -> Callable[[], Results]:
        op, arguments = self.ops(inputs)[0]
        return without_gradients(lambda: listed(getattr(_ops, op)(*arguments)))

    def ops(self, inputs: ConvTrainingInputs) -> list[tuple[str, tuple[Any, ...]]]:
        return [(self.product, inputs.arguments(self.product))]

    def exact(self) -> Results:
        arguments = [
            value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in self.first.arguments(self.product)
        ]
        return listed(getattr(reference, self.product)(*arguments))

    def why_results_are_wrong(self, results: Results) -> str | None:
        inputs = self.first
        baseline = _EAGER[self.product](inputs)
        pixels = (inputs.before if self.product == GRAD_INPUT else inputs.behind).values
        weights = inputs.weight[0] if self.product == FORWARD else inputs.weight[:, 0]
        for index, (ours, theirs, exact) in enumerate(zip(results, baseline, self._exact, strict=True)):
            if ours is None or theirs is None or exact is None or exact.numel() == 0:
                continue
            terms = terms_of_products(self.dtype, weights.numel())
            if exact.dim() == 1 or self.product == GRAD_WEIGHT:
                terms *= pixels
            if wrong := why_wrong(ours, theirs, exact, terms, self._magnitude(index)):
                return f"result {index}: {wrong}"
        return None

    def _magnitude(self, index: int) -> float | None:
        """Of the numbers that are rounded, where they are not of the size of the result: y's mean is rounded with y,
        which also changes its deviation."""
        if self.product != FORWARD or index == 0:
            return None
        y, mean, invstd = self._exact
        assert y is not None and mean is not None and invstd is not None
        return (y.abs().max() if index == 1 else (invstd * (1 + mean.abs() * invstd)).max()).item()

    def least_bytes(self) -> int:
        """Vectors and partial sums are not counted."""
        conv, size = self.site.conv, self.dtype.itemsize
        x, y, weight = (
            size * torch.Size(shape).numel()
            for shape in (conv.input_shape(self.batch_size), conv.output_shape(self.batch_size), conv.weight_shape)
        )
        if self.product == FORWARD:
            return x + weight + y
        if self.product == GRAD_INPUT:  # behind a norm it reads x to know where the ReLU let pass
            return 2 * y + weight + (2 if self.site.normed else 1) * x
        return 2 * y + x + weight

    def moved(self, name: str) -> int | None:
        if name in (COMPILE, "reference"):  # the latter with copies of its own
            return None
        if name not in (EAGER, SEPARATE) and self.product == GRAD_WEIGHT:  # which the fused kernel writes in float32
            return self.least_bytes() + (4 - self.dtype.itemsize) * self.first.weight.numel()
        ways = {EAGER: _EAGER, SEPARATE: _SEPARATE}
        if name in ways:
            return counted(without_gradients(lambda: ways[name][self.product](self.first)))
        return super().moved(name)

    def flop(self) -> int:
        return self.site.conv.flop(self.batch_size)

    def _compiled(self, inputs: ConvTrainingInputs) -> Callable[[], Results]:
        if inputs is self.first:  # forget what was compiled before: after eight shapes PyTorch would run it in eager
            torch.compiler.reset()
        compiled = torch.compile(_EAGER[self.product], dynamic=False, backend=self.compile_backend)
        return without_gradients(lambda: compiled(inputs))


def _eager_forward(inputs: ConvTrainingInputs) -> Results:
    y = F.conv2d(_eager_activation(inputs), inputs.weight, None, *inputs.settings)
    if y.is_cuda:
        return [y, *torch.batch_norm_stats(y, EPS)]
    variance, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    return [y, mean, torch.rsqrt(variance + EPS)]


def _eager_activation(inputs: ConvTrainingInputs) -> Tensor:
    if not inputs.normed:
        return inputs.x
    norm = inputs.before
    return F.batch_norm(norm.x, *norm.running, norm.weight, norm.bias, False, 0.0, EPS).relu_()


def _eager_dy(inputs: ConvTrainingInputs) -> Tensor:
    """Through the norm behind; eager's backward makes its two sums on the way, which here are there already."""
    norm = inputs.behind
    if inputs.dz.is_cuda:
        settings = (*norm.statistics, norm.weight, *norm.sums_for_eager["sums"])
        return torch.batch_norm_backward_elemt(inputs.dz, inputs.y, *settings)
    backward, mask = torch.ops.aten.native_batch_norm_backward, [True, False, False]
    return backward(inputs.dz, inputs.y, norm.weight, *norm.running, *norm.statistics, True, EPS, mask)[0]


def _eager_grad_input(inputs: ConvTrainingInputs) -> Results:
    da = _convolution_backward(inputs, _eager_dy(inputs), inputs.x, 0)
    if not inputs.normed:
        return [da, None, None]
    norm = inputs.before
    grad = torch.ops.aten.threshold_backward(da, norm.activation_alone, 0)
    settings = (norm.weight, *norm.running, *norm.statistics, True, EPS, [False, True, True])
    _, sum_xhat, sum_plain = torch.ops.aten.native_batch_norm_backward(grad, inputs.x, *settings)
    return [grad, sum_plain, sum_xhat]


def _eager_grad_weight(inputs: ConvTrainingInputs) -> Results:
    """The gradient of y is made again, since the task begins with dz; eager has kept the activation."""
    activation = inputs.before.activation_alone if inputs.normed else inputs.x
    return [_convolution_backward(inputs, _eager_dy(inputs), activation, 1)]


def _separate_forward(inputs: ConvTrainingInputs) -> Results:
    y = F.conv2d(_separate_activation(inputs), inputs.weight, None, *inputs.settings)
    return [y, *_ops.bn_stats(y, *NO_MOMENTS)]


def _separate_activation(inputs: ConvTrainingInputs) -> Tensor:
    return _ops.bn_apply(inputs.x, *inputs.before.norm, None, True) if inputs.normed else inputs.x


def _separate_dy(inputs: ConvTrainingInputs) -> Tensor:
    norm = inputs.behind
    return _ops.bn_grad_apply(inputs.dz, inputs.y, *norm.norm, *norm.sums, False)


def _separate_grad_input(inputs: ConvTrainingInputs) -> Results:
    da = _convolution_backward(inputs, _separate_dy(inputs), inputs.x, 0)
    if not inputs.normed:
        return [da, None, None]
    norm = inputs.before.norm
    sums = _ops.bn_grad_stats(da, inputs.x, None, *norm, True)[:2]
    return [None, *sums]


def _separate_grad_weight(inputs: ConvTrainingInputs) -> Results:
    return [_convolution_backward(inputs, _separate_dy(inputs), _separate_activation(inputs), 1)]


def _convolution_backward(inputs: ConvTrainingInputs, dy: Tensor, x: Tensor, wanted: int) -> Tensor:
    stride, padding, dilation, groups = inputs.settings
    mask = [wanted == 0, wanted == 1, False]
    settings = (None, stride, padding, dilation, False, [0, 0], groups, mask)
    return torch.ops.aten.convolution_backward(dy, x, inputs.weight, *settings)[wanted]


_EAGER = {FORWARD: _eager_forward, GRAD_INPUT: _eager_grad_input, GRAD_WEIGHT: _eager_grad_weight}
_SEPARATE = {FORWARD: _separate_forward, GRAD_INPUT: _separate_grad_input, GRAD_WEIGHT: _separate_grad_weight}
