"""The first layers of a ResNet in inference (convolution, norm, ReLU, max pooling) as a task."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.bench.accuracy import Results, terms_of_products
from fused_resnet.bench.norm_inputs import EPS
from fused_resnet.bench.result import INFERENCE
from fused_resnet.bench.sites import PLAIN, Convolution, ConvSite
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.bench.suite.op_conv_inference import ConvInferenceInputs
from fused_resnet.ops import reference
from fused_resnet.ops.conv_bn_act import fold

CHANNELS_LAST, CONTIGUOUS, BYTES = "channels_last", "NCHW", "bytes"
LAYOUTS = (CHANNELS_LAST, CONTIGUOUS, BYTES)
"""Of the images: the last are of uint8, in channels_last, which all but the fused stem scale to the dtype first."""
DTYPES = (torch.float16, torch.bfloat16)
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, of values from 0 to 1
PIXEL_SCALE = [1 / (255 * std) for std in PIXEL_STD]
PIXEL_SHIFT = [-mean / std for mean, std in zip(PIXEL_MEAN, PIXEL_STD, strict=True)]


class StemInputs(ConvInferenceInputs):
    """Images in a layout, and the parameters of the first layers, random."""

    def __init__(
        self, conv: Convolution, batch_size: int, dtype: torch.dtype, device: torch.device, layout: str
    ) -> None:
        super().__init__(ConvSite(conv, PLAIN, normed=False, takes_gradient=False), batch_size, dtype, device)
        self.bytes, self.dtype = layout == BYTES, dtype
        images = torch.randint(0, 256, self.x.shape, device=device).to(torch.uint8) if self.bytes else self.x
        memory_format = torch.contiguous_format if layout == CONTIGUOUS else torch.channels_last
        self.kept = self.folded  # made here, in the dtype
        self.x = images.contiguous(memory_format=memory_format)
        pixels = (torch.tensor(vector, device=device)[:, None, None] for vector in (PIXEL_SCALE, PIXEL_SHIFT))
        self.pixel_scale, self.pixel_shift = pixels

    def scaled(self) -> Tensor:
        return (self.x.float() * self.pixel_scale + self.pixel_shift).to(self.dtype) if self.bytes else self.x


class StemTask(OpTask):
    """``max_pool2d(relu(batch_norm(conv2d(images))))`` with constant statistics."""

    def __init__(
        self, size: int, batch_size: int, dtype: torch.dtype, device: torch.device | str, layout: str = CHANNELS_LAST
    ) -> None:
        super().__init__(f"stem 3x{size}x{size} {layout}", INFERENCE, batch_size, dtype, device)
        self.conv, self.layout = Convolution(3, size, size, 64, (7, 7), (2, 2), (3, 3), (1, 1), 1), layout
        self.exists = dtype in DTYPES
        self.compile_mode = "max-autotune-no-cudagraphs" if self.compile_backend == "inductor" else ""

    def make_inputs(self) -> StemInputs:
        return StemInputs(self.conv, self.batch_size, self.dtype, self.device, self.layout)

    def ops(self, inputs: StemInputs) -> list[tuple[str, tuple[Any, ...]]]:
        pixels = (PIXEL_SCALE, PIXEL_SHIFT) if inputs.bytes else (None, None)
        return [("stem", (inputs.x, inputs.weight, inputs.scale, inputs.shift, *pixels))]

    def eager(self, inputs: StemInputs) -> Results:
        """The norm folded into the weight, as whoever freezes a network by hand has it."""
        weight, bias = inputs.kept
        return [pool(F.conv2d(inputs.scaled(), weight, bias, *inputs.settings).relu_())]

    def exact(self) -> Results:
        inputs = self.first
        weight, bias, mean, variance = inputs.norm
        vectors = fold(weight, bias, mean, variance, EPS, torch.float64)
        return [reference.stem(inputs.scaled().double(), inputs.weight.double(), *vectors, None, None)]

    def baseline(self) -> Results:
        """Convolution and norm one by one."""
        inputs = self.first
        (activation,) = ConvInferenceInputs.eager(inputs, inputs.scaled(), inputs.weight, None)
        assert activation is not None
        return [pool(activation)]

    def terms(self, index: int, exact: Tensor) -> int:
        return terms_of_products(self.dtype, self.first.weight[0].numel())

    def flop(self) -> int:
        return self.conv.flop(self.batch_size)


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)
