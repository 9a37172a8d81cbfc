"""The first layers of a ResNet in inference (convolution, norm, ReLU, max pooling) as a task."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.bench.accuracy import Results, terms_of_products
from fused_resnet.bench.norm_inputs import EPS
from fused_resnet.bench.result import INFERENCE
from fused_resnet.bench.suite import op_base
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.ops import reference
from fused_resnet.ops.conv_bn_act import fold

CHANNELS_LAST, CONTIGUOUS, BYTES = "channels_last", "NCHW", "bytes"
LAYOUTS = (CHANNELS_LAST, CONTIGUOUS, BYTES)
"""Of the images: the last are of uint8, in channels_last, which all but the fused stem scale to the dtype first."""
DTYPES = (torch.float16, torch.bfloat16)
WEIGHT = (64, 3, 7, 7)
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, of values from 0 to 1
PIXEL_SCALE = [1 / (255 * std) for std in PIXEL_STD]
PIXEL_SHIFT = [-mean / std for mean, std in zip(PIXEL_MEAN, PIXEL_STD, strict=True)]


class StemInputs:
    """Images and the parameters of the first layers, random."""

    def __init__(self, batch: int, size: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, 3, size, size)
        self.bytes, self.dtype = layout == BYTES, dtype
        if self.bytes:
            self.x = torch.randint(0, 256, shape, device=device).to(torch.uint8)
        else:
            self.x = torch.randn(shape, device=device).to(dtype)
        memory_format = torch.contiguous_format if layout == CONTIGUOUS else torch.channels_last
        self.x = self.x.contiguous(memory_format=memory_format)
        self.weight = op_base.random_weight(WEIGHT, dtype, device)
        self.norm = op_base.random_norm(WEIGHT[0], device)
        self.scale, self.shift = fold(*self.norm, EPS)
        self.pixel_scale, self.pixel_shift = (
            torch.tensor(vector, device=device)[:, None, None] for vector in (PIXEL_SCALE, PIXEL_SHIFT)
        )
        folded = self.weight.float() * self.scale[:, None, None, None]
        self.folded_weight = folded.to(dtype).contiguous(memory_format=torch.channels_last)
        self.folded_bias = self.shift.to(dtype)

    def scaled(self) -> Tensor:
        return (self.x.float() * self.pixel_scale + self.pixel_shift).to(self.dtype) if self.bytes else self.x


class StemTask(OpTask):
    """``max_pool2d(relu(batch_norm(conv2d(images))))`` with constant statistics."""

    def __init__(
        self, size: int, batch_size: int, dtype: torch.dtype, device: torch.device | str, layout: str = CHANNELS_LAST
    ) -> None:
        super().__init__(f"stem 3x{size}x{size} {layout}", INFERENCE, batch_size, dtype, device)
        self.size, self.layout = size, layout
        self.exists = dtype in DTYPES
        self.compile_mode = "max-autotune-no-cudagraphs" if self.compile_backend == "inductor" else ""

    def make_inputs(self) -> StemInputs:
        return StemInputs(self.batch_size, self.size, self.layout, self.dtype, self.device)

    def ops(self, inputs: StemInputs) -> list[tuple[str, tuple[Any, ...]]]:
        pixels = (PIXEL_SCALE, PIXEL_SHIFT) if inputs.bytes else (None, None)
        return [("stem", (inputs.x, inputs.weight, inputs.scale, inputs.shift, *pixels))]

    def eager(self, inputs: StemInputs) -> Results:
        """The norm folded into the weight, as whoever freezes a network by hand has it."""
        z = F.conv2d(inputs.scaled(), inputs.folded_weight, inputs.folded_bias, stride=2, padding=3)
        return [pool(z.relu_())]

    def exact(self) -> Results:
        inputs = self.first
        weight, bias, mean, variance = inputs.norm
        vectors = fold(weight, bias, mean, variance, EPS, torch.float64)
        return [reference.stem(inputs.scaled().double(), inputs.weight.double(), *vectors, None, None)]

    def baseline(self) -> Results:
        """Convolution and norm one by one."""
        inputs = self.first
        weight, bias, mean, variance = inputs.norm
        z = F.conv2d(inputs.scaled(), inputs.weight, stride=2, padding=3)
        return [pool(F.batch_norm(z, mean, variance, weight, bias, eps=EPS).relu_())]

    def terms(self, index: int, exact: Tensor) -> int:
        return terms_of_products(self.dtype, self.first.weight[0].numel())

    def flop(self) -> int:
        """Additions and multiplications of the convolution, its padding included."""
        return 2 * self.batch_size * _half(self.size) ** 2 * torch.Size(WEIGHT).numel()


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)


def _half(size: int) -> int:
    return (size - 1) // 2 + 1
