"""An inference convolution with norm, residual and ReLU after it, as a task."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.bench.accuracy import Results, terms_of_products
from fused_resnet.bench.norm_inputs import EPS
from fused_resnet.bench.result import INFERENCE
from fused_resnet.bench.sites import ADDED, SHORTCUT, ConvSite
from fused_resnet.bench.suite import op_base
from fused_resnet.bench.suite.op_base import EAGER, SEPARATE, Call, OpTask, counted, without_gradients
from fused_resnet.ops.backends.onednn import pack_conv_weight, packed_conv_act, why_not_packed
from fused_resnet.ops.conv_bn_act import fold

FOLDED, NCHW, PACKED = "eager, norm folded", "eager NCHW", "packed oneDNN"


class ConvInferenceInputs:
    """Image, weight, norm and residual, random, channels_last."""

    def __init__(self, site: ConvSite, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        conv = site.conv
        self.x = op_base.random_image(conv.input_shape(batch_size), dtype, device)
        self.weight = op_base.random_weight(conv.weight_shape, dtype, device)
        self.norm = op_base.random_norm(conv.weight_shape[0], device)
        self.scale, self.shift = fold(*self.norm, EPS)
        is_added = site.behind == ADDED
        self.residual = op_base.random_image(conv.output_shape(batch_size), dtype, device) if is_added else None
        self.relu = site.behind != SHORTCUT
        self.settings = conv.settings

    @functools.cached_property
    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the norm in them, in the dtype of x; folded in float64, rounded once."""
        scale, shift = fold(*self.norm, EPS, torch.float64)
        weight = (self.weight.double() * scale[:, None, None, None]).to(self.x.dtype)
        return weight.contiguous(memory_format=torch.channels_last), shift.to(self.x.dtype)

    def finish(self, out: Tensor, residual: Tensor | None) -> Results:
        out = out if residual is None else out.add_(residual)
        return [out.relu_() if self.relu else out]

    def eager(self, x: Tensor, weight: Tensor, residual: Tensor | None) -> Results:
        norm = (vector.double() if x.dtype == torch.float64 else vector for vector in self.norm)
        scale, bias, mean, variance = norm
        out = F.batch_norm(F.conv2d(x, weight, None, *self.settings), mean, variance, scale, bias, False, 0.0, EPS)
        return self.finish(out, residual)


class ConvInferenceTask(OpTask):
    """``act(batch_norm(conv2d(x)) + residual)`` with constant statistics, on one shape of a network."""

    def __init__(self, site: ConvSite, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(f"conv_bn_act {site}", INFERENCE, batch_size, dtype, device)
        self.site = site

    def make_inputs(self) -> ConvInferenceInputs:
        return ConvInferenceInputs(self.site, self.batch_size, self.dtype, self.device)

    def ops(self, inputs: ConvInferenceInputs) -> list[tuple[str, tuple[Any, ...]]]:
        vectors = (inputs.scale, inputs.shift, inputs.residual)
        return [("conv_bn_act", (inputs.x, inputs.weight, *vectors, *inputs.settings, inputs.relu))]

    def eager(self, inputs: ConvInferenceInputs) -> Results:
        return inputs.eager(inputs.x, inputs.weight, inputs.residual)

    def exact(self) -> Results:
        inputs = self.first
        residual = None if inputs.residual is None else inputs.residual.double()
        return inputs.eager(inputs.x.double(), inputs.weight.double(), residual)

    def ways(self) -> dict[str, Callable[[Any], Call]]:
        return super().ways() | {NCHW: _nchw, FOLDED: _folded, PACKED: _packed}

    def why_not(self, name: str) -> list[str]:
        if name != PACKED:
            return super().why_not(name)
        reasons = why_not_packed(torch.empty(0, dtype=self.dtype, device=self.device))
        if self._grouped_add and self.dtype != torch.float32:
            reasons.append("with groups and a residual it takes float32 only")
        return reasons

    def terms(self, index: int, exact: Tensor) -> int:
        return terms_of_products(self.dtype, math.prod(self.site.conv.weight_shape[1:]))

    def moved(self, name: str) -> int | None:
        if name == FOLDED:
            return counted(_folded(self.first))
        if name in (SEPARATE, "reference"):  # the convolution's own result, written and read
            return self.least_bytes() + 2 * self._out_bytes
        if name == PACKED and self._grouped_add:
            return self.least_bytes() + 4 * self._out_bytes  # an add and a ReLU in place
        return super().moved(EAGER if name == NCHW else name)

    def flop(self) -> int:
        return self.site.conv.flop(self.batch_size)

    @property
    def _out_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.site.conv.output_shape(self.batch_size))

    @property
    def _grouped_add(self) -> bool:
        return self.site.conv.groups > 1 and self.site.behind == ADDED


def _nchw(inputs: ConvInferenceInputs) -> Call:
    x, weight = inputs.x.contiguous(), inputs.weight.contiguous()
    residual = None if inputs.residual is None else inputs.residual.contiguous()
    return without_gradients(lambda: inputs.eager(x, weight, residual))


def _folded(inputs: ConvInferenceInputs) -> Call:
    weight, bias = inputs.folded
    convolve = functools.partial(F.conv2d, inputs.x, weight, bias, *inputs.settings)
    return without_gradients(lambda: inputs.finish(convolve(), inputs.residual))


def _packed(inputs: ConvInferenceInputs) -> Call:
    weight, bias = inputs.folded
    packed = pack_conv_weight(weight, list(inputs.x.shape), inputs.settings)
    arguments = (inputs.x, packed, bias, inputs.residual, inputs.settings, inputs.relu)
    return without_gradients(lambda: [packed_conv_act(*arguments)])
