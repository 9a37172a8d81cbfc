"""The first layers of a ResNet in inference (convolution, norm, ReLU, max pooling) as a task."""

from __future__ import annotations

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
    OpTask,
    counted,
    on_backend,
    random_norm,
    terms_of_products,
    without_gradients,
)
from fused_resnet.bench.suite.task import Results
from fused_resnet.ops import reference
from fused_resnet.ops.conv_bn_act import fold

CHANNELS_LAST, CONTIGUOUS, BYTES = "channels_last", "NCHW", "bytes"
LAYOUTS = (CHANNELS_LAST, CONTIGUOUS, BYTES)
"""Of the images: the last are of uint8, in channels_last, which all but the fused stem scale to the dtype first."""
CONVOLUTION_AND_POOL = {"cuda, then pooling": "cuda", "triton, then pooling": "triton"}
"""``conv_bn_act`` of a backend with PyTorch's pooling behind it."""
DTYPES = (torch.float16, torch.bfloat16)
FILTERS = 64
SETTINGS = ([2, 2], [3, 3], [1, 1], 1)
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, of values from 0 to 1
PIXEL_SCALE = [1 / (255 * std) for std in PIXEL_STD]
PIXEL_SHIFT = [-mean / std for mean, std in zip(PIXEL_MEAN, PIXEL_STD, strict=True)]

_ops = torch.ops.fused_resnet


class StemInputs:
    """Images and the parameters of the first layers, random."""

    def __init__(self, batch: int, size: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, 3, size, size)
        memory_format = torch.contiguous_format if layout == CONTIGUOUS else torch.channels_last
        self.bytes, self.dtype = layout == BYTES, dtype
        x = (
            torch.randint(0, 256, shape, device=device).to(torch.uint8)
            if self.bytes
            else torch.randn(shape, device=device)
        )
        self.x = x.to(torch.uint8 if self.bytes else dtype).contiguous(memory_format=memory_format)
        weight = torch.randn(FILTERS, 3, 7, 7, device=device) * (3 * 7 * 7) ** -0.5
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.norm = random_norm(FILTERS, device)
        self.scale, self.shift = fold(*self.norm, EPS)
        self.pixel_scale, self.pixel_shift = (
            torch.tensor(vector, device=device)[:, None, None] for vector in (PIXEL_SCALE, PIXEL_SHIFT)
        )
        folded = self.weight.float() * self.scale[:, None, None, None]
        self.folded_weight = folded.to(dtype).contiguous(memory_format=torch.channels_last)
        self.folded_bias = self.shift.to(dtype)

    def scaled(self) -> Tensor:
        return (self.x.float() * self.pixel_scale + self.pixel_shift).to(self.dtype) if self.bytes else self.x

    def eager(self) -> Tensor:
        """The norm folded into the weight, as whoever freezes a network by hand has it."""
        return pool(F.conv2d(self.scaled(), self.folded_weight, self.folded_bias, stride=2, padding=3).relu_())


class StemTask(OpTask):
    """``max_pool2d(relu(batch_norm(conv2d(images))))`` with constant statistics."""

    def __init__(
        self, size: int, batch_size: int, dtype: torch.dtype, device: torch.device | str, layout: str = CHANNELS_LAST
    ) -> None:
        super().__init__(f"stem 3x{size}x{size} {layout}", INFERENCE, batch_size, dtype, device)
        self.size, self.layout = size, layout
        self.exists = dtype in DTYPES

    def make_inputs(self) -> StemInputs:
        return StemInputs(self.batch_size, self.size, self.layout, self.dtype, self.device)

    def ways(self) -> dict[str, Callable[[StemInputs], Callable[[], Results]]]:
        found: dict[str, Callable[[StemInputs], Callable[[], Results]]] = {
            EAGER: lambda inputs: without_gradients(lambda: [inputs.eager()]),
            COMPILE: self._compiled,
        }
        return found | {name: _then_pooling(backend) for name, backend in CONVOLUTION_AND_POOL.items()}

    def why_not_way(self, name: str) -> list[str]:
        if name not in CONVOLUTION_AND_POOL:
            return super().why_not_way(name)
        return self.why_not_ops(CONVOLUTION_AND_POOL[name], [("conv_bn_act", _convolution(self.first))])

    def ours(self, inputs: StemInputs) -> Callable[[], Results]:
        arguments = self.ops(inputs)[0][1]
        return without_gradients(lambda: [_ops.stem(*arguments)])

    def ops(self, inputs: StemInputs) -> list[tuple[str, tuple[Any, ...]]]:
        pixels = (PIXEL_SCALE, PIXEL_SHIFT) if inputs.bytes else (None, None)
        return [("stem", (inputs.x, inputs.weight, inputs.scale, inputs.shift, *pixels))]

    def exact(self) -> Results:
        inputs = self.first
        weight, bias, mean, variance = inputs.norm
        vectors = fold(weight, bias, mean, variance, EPS, torch.float64)
        return [reference.stem(inputs.scaled().double(), inputs.weight.double(), *vectors, None, None)]

    def why_results_are_wrong(self, results: Results) -> str | None:
        """PyTorch's own error is that of convolution and norm one by one."""
        inputs, (ours,), (exact,) = self.first, results, self._exact
        weight, bias, mean, variance = inputs.norm
        z = F.conv2d(inputs.scaled(), inputs.weight, stride=2, padding=3)
        z = F.batch_norm(z, mean, variance, weight, bias, eps=EPS)
        assert ours is not None and exact is not None
        return why_wrong(ours, pool(z.relu_()), exact, terms_of_products(self.dtype, inputs.weight[0].numel()))

    def least_bytes(self) -> int:
        """Images, weight, result; vectors are not counted."""
        images = self.batch_size * 3 * self.size**2 * (1 if self.layout == BYTES else self.dtype.itemsize)
        out = self.batch_size * FILTERS * _half(_half(self.size)) ** 2
        return images + self.dtype.itemsize * (FILTERS * 3 * 7 * 7 + out)

    def moved(self, name: str) -> int | None:
        if name == EAGER:  # the pooling's indices included
            return counted(without_gradients(self.first.eager))
        if name in CONVOLUTION_AND_POOL:
            return None
        return super().moved(name)

    def flop(self) -> int:
        """Additions and multiplications of the convolution, its padding included."""
        return 2 * self.batch_size * FILTERS * _half(self.size) ** 2 * 3 * 7 * 7

    def _compiled(self, inputs: StemInputs) -> Callable[[], Results]:
        if inputs is self.first:  # forget what was compiled before: after eight shapes PyTorch would run it in eager
            torch.compiler.reset()
        if self.compile_backend == "eager":
            compiled = torch.compile(StemInputs.eager, dynamic=False, backend="eager")
        else:
            compiled = torch.compile(StemInputs.eager, dynamic=False, mode="max-autotune-no-cudagraphs")
        return without_gradients(lambda: [compiled(inputs)])


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)


def _then_pooling(backend: str) -> Callable[[StemInputs], Callable[[], Results]]:
    def run_on(inputs: StemInputs) -> Results:
        return [pool(_ops.conv_bn_act(*_convolution(inputs)))]

    return lambda inputs: on_backend(backend, without_gradients(lambda: run_on(inputs)))


def _convolution(inputs: StemInputs) -> tuple[Any, ...]:
    x = inputs.scaled().contiguous(memory_format=torch.channels_last)
    return (x, inputs.weight, inputs.scale, inputs.shift, None, *SETTINGS, True)


def _half(size: int) -> int:
    return (size - 1) // 2 + 1
