"""An inference convolution with norm, residual and ReLU behind it, as a task."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.bench.norm_inputs import EPS
from fused_resnet.bench.passes import why_wrong
from fused_resnet.bench.result import INFERENCE
from fused_resnet.bench.suite.op_base import (
    COMPILE,
    EAGER,
    SEPARATE,
    NormVectors,
    OpTask,
    counted,
    random_norm,
    terms_of_products,
    without_gradients,
)
from fused_resnet.bench.suite.op_sites import ADDED, SHORTCUT, ConvSite
from fused_resnet.bench.suite.task import Results
from fused_resnet.ops.backends.onednn import pack_conv_weight, packed_conv_act, why_not_packed
from fused_resnet.ops.conv_bn_act import fold

FOLDED, NCHW = "eager, norm folded", "eager NCHW"
PACKED, CUDNN_FUSED = "packed oneDNN", "ATen's fused cuDNN ops"
FUSED_AT_MOST = (torch.float32, torch.float16, torch.bfloat16)

_ops = torch.ops.fused_resnet


class ConvInferenceInputs:
    """Image, weight, norm and residual, random, channels_last."""

    def __init__(self, site: ConvSite, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        def image(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, device=device) * scale
            return values.to(dtype).contiguous(memory_format=torch.channels_last)

        conv = site.conv
        taps = conv.weight_shape[1] * conv.weight_shape[2] * conv.weight_shape[3]
        self.x = image(*conv.input_shape(batch_size))
        self.weight = image(*conv.weight_shape, scale=taps**-0.5)
        self.norm = random_norm(conv.weight_shape[0], device)
        self.scale, self.shift = fold(*self.norm, EPS)
        self.residual = image(*conv.output_shape(batch_size)) if site.behind == ADDED else None
        self.relu = site.behind != SHORTCUT
        self.settings = conv.settings

    @functools.cached_property
    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the norm in them, in the dtype of x; folded in float64, rounded once."""
        scale, shift = fold(*self.norm, EPS, torch.float64)
        weight = (self.weight.double() * scale[:, None, None, None]).to(self.x.dtype)
        return weight.contiguous(memory_format=torch.channels_last), shift.to(self.x.dtype)


class ConvInferenceTask(OpTask):
    """``act(batch_norm(conv2d(x)) + residual)`` with constant statistics, on one shape of a network."""

    def __init__(self, site: ConvSite, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(f"conv_bn_act {site}", INFERENCE, batch_size, dtype, device)
        self.site = site

    def make_inputs(self) -> ConvInferenceInputs:
        return ConvInferenceInputs(self.site, self.batch_size, self.dtype, self.device)

    def ways(self) -> dict[str, Callable[[ConvInferenceInputs], Callable[[], Results]]]:
        return {
            EAGER: lambda inputs: _listing(eager, inputs),
            NCHW: _nchw,
            FOLDED: _folded,
            COMPILE: self._compiled,
            PACKED: _packed,
            CUDNN_FUSED: _cudnn_fused,
        }

    def why_not_way(self, name: str) -> list[str]:
        if name == PACKED:
            reasons = why_not_packed(torch.empty(0, dtype=self.dtype, device=self.device))
            if self.site.conv.sizes.groups > 1 and self.site.behind == ADDED and self.dtype != torch.float32:
                reasons.append("with groups and a residual it takes float32 only")
            return reasons
        if name == CUDNN_FUSED:
            reasons = [] if self.device.type == "cuda" else ["no CUDA device: it is an op of cuDNN"]
            if self.site.behind == SHORTCUT:
                reasons.append("it always has a ReLU")
            return reasons + ([] if self.dtype in FUSED_AT_MOST else [f"it does not compute in {self.dtype}"])
        return super().why_not_way(name)

    def ours(self, inputs: ConvInferenceInputs) -> Callable[[], Results]:
        arguments = self.ops(inputs)[0][1]
        return without_gradients(lambda: [_ops.conv_bn_act(*arguments)])

    def ops(self, inputs: ConvInferenceInputs) -> list[tuple[str, tuple[Any, ...]]]:
        vectors = (inputs.scale, inputs.shift, inputs.residual)
        return [("conv_bn_act", (inputs.x, inputs.weight, *vectors, *inputs.settings, inputs.relu))]

    def exact(self) -> Results:
        inputs = self.first
        residual = None if inputs.residual is None else inputs.residual.double()
        weight, bias, mean, variance = (vector.double() for vector in inputs.norm)
        norm = (weight, bias, mean, variance)
        return [eager(inputs.x.double(), inputs.weight.double(), norm, residual, inputs.settings, inputs.relu)]

    def why_results_are_wrong(self, results: Results) -> str | None:
        (ours,), (exact,), (theirs,) = results, self._exact, _listing(eager, self.first)()
        assert ours is not None and exact is not None
        return why_wrong(ours, theirs, exact, terms_of_products(self.dtype, math.prod(self.site.conv.weight_shape[1:])))

    def least_bytes(self) -> int:
        conv, size = self.site.conv, self.dtype.itemsize
        out = size * math.prod(conv.output_shape(self.batch_size))
        image, weight = math.prod(conv.input_shape(self.batch_size)), math.prod(conv.weight_shape)
        return size * (image + weight) + (2 if self.site.behind == ADDED else 1) * out

    def moved(self, name: str) -> int | None:
        if name in (EAGER, NCHW, FOLDED):
            return counted(self.ways()[name if name == FOLDED else EAGER](self.first))
        out = self.dtype.itemsize * math.prod(self.site.conv.output_shape(self.batch_size))
        if name in (SEPARATE, "reference"):  # the convolution's own result, written and read
            return self.least_bytes() + 2 * out
        if name == PACKED and self.site.behind == ADDED and self.site.conv.sizes.groups > 1:
            return self.least_bytes() + 4 * out  # an add and a ReLU in place
        return super().moved(name)

    def flop(self) -> int:
        return self.site.conv.flop(self.batch_size)

    def _compiled(self, inputs: ConvInferenceInputs) -> Callable[[], Results]:
        if inputs is self.first:  # forget what was compiled before: after eight shapes PyTorch would run it in eager
            torch.compiler.reset()
        return _listing(torch.compile(eager, dynamic=False, backend=self.compile_backend), inputs)


def eager(
    x: Tensor,
    weight: Tensor,
    norm: NormVectors,
    residual: Tensor | None,
    settings: tuple[list[int], list[int], list[int], int],
    relu: bool,
) -> Tensor:
    """As a network in eager PyTorch runs it."""
    scale, bias, mean, variance = norm
    out = F.batch_norm(F.conv2d(x, weight, None, *settings), mean, variance, scale, bias, False, 0.0, EPS)
    out = out if residual is None else out.add_(residual)
    return out.relu_() if relu else out


def _listing(function: Callable[..., Tensor], inputs: ConvInferenceInputs) -> Callable[[], Results]:
    arguments = (inputs.x, inputs.weight, inputs.norm, inputs.residual, inputs.settings, inputs.relu)
    return without_gradients(lambda: [function(*arguments)])


def _nchw(inputs: ConvInferenceInputs) -> Callable[[], Results]:
    x, weight = inputs.x.contiguous(), inputs.weight.contiguous()
    residual = None if inputs.residual is None else inputs.residual.contiguous()
    return without_gradients(lambda: [eager(x, weight, inputs.norm, residual, inputs.settings, inputs.relu)])


def _folded(inputs: ConvInferenceInputs) -> Callable[[], Results]:
    def run() -> Results:
        weight, bias = inputs.folded
        out = F.conv2d(inputs.x, weight, bias, *inputs.settings)
        out = out if inputs.residual is None else out.add_(inputs.residual)
        return [out.relu_() if inputs.relu else out]

    return without_gradients(run)


def _packed(inputs: ConvInferenceInputs) -> Callable[[], Results]:
    weight, bias = inputs.folded
    packed = pack_conv_weight(weight, list(inputs.x.shape), *inputs.settings)
    arguments = (inputs.x, packed, bias, inputs.residual, *inputs.settings, inputs.relu)
    return without_gradients(lambda: [packed_conv_act(*arguments)])


def _cudnn_fused(inputs: ConvInferenceInputs) -> Callable[[], Results]:
    weight, bias = inputs.folded
    if inputs.residual is None:
        return without_gradients(lambda: [torch.cudnn_convolution_relu(inputs.x, weight, bias, *inputs.settings)])
    arguments = (inputs.x, weight, inputs.residual, 1.0, bias, *inputs.settings)
    return without_gradients(lambda: [torch.cudnn_convolution_add_relu(*arguments)])
