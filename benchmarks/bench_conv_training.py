"""The three convolutions of a training step on every shape of ResNet-18 and ResNet-50, with pytest-benchmark.

    python -m pytest benchmarks/bench_conv_training.py [-k "forward and 3x3"] [--benchmark-json=FILE]

"fused" is conv_stats, conv_grad_input or conv_grad_weight; "separate" is PyTorch's convolution (cuDNN, oneDNN) and the
passes beside it that the fused kernel saves. ``extra_info`` holds the bytes that the fused kernel must move, the
operations, and the fraction of the roofline that either contender reaches with them: the least time that the two
ceilings, measured in the same run, allow for the fused kernel's bytes and operations, over its median time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.bench.convolutions import Convolution, convolutions
from fused_resnet.bench.roofline import Ceilings, measure_ceilings
from fused_resnet.ops import training_level

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BATCH_SIZES = (256, 32) if ON_GPU else (2,)
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]
ROUNDS = 30 if ON_GPU else 5
SHAPES = list({conv.sizes: conv for name in ("resnet18", "resnet50") for conv in convolutions(name)}.values())

_ops = torch.ops.fused_resnet


@functools.cache
def ceilings(dtype: torch.dtype) -> Ceilings:
    return measure_ceilings(DEVICE, dtype)


class Step:
    """Tensors of one convolution inside a block, channels_last, with a norm in front of it and a norm behind it."""

    def __init__(self, conv: Convolution, batch: int, dtype: torch.dtype) -> None:
        def image(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, device=DEVICE) * scale
            return values.to(dtype).contiguous(memory_format=torch.channels_last)

        def vectors(channels: int) -> tuple[Tensor, ...]:
            return tuple(torch.rand(channels, device=DEVICE) + 0.1 for _ in range(4))

        self.settings = conv.settings
        self.x = image(conv.input_shape(batch))
        self.weight = image(conv.weight_shape, (conv.weight_shape[1] * conv.sizes.kernel[0] ** 2) ** -0.5)
        self.y, self.dz = image(conv.output_shape(batch)), image(conv.output_shape(batch))
        self.before, self.behind = vectors(conv.sizes.channels), vectors(conv.sizes.filters)
        self.sums = vectors(conv.sizes.filters)[:2]
        self.count = self.y.numel() // conv.sizes.filters
        self.coefficients = _ops.bn_grad_coefficients(*self.sums, *self.behind[:3], self.count)

    def forward_fused(self) -> object:
        moving = (None, None, 0.1, 1e-5)
        return _ops.conv_stats(self.x, self.weight, *self.before, *moving, *self.settings, True)

    def forward_separate(self) -> object:
        activation = _ops.bn_apply(self.x, *self.before, None, True)
        return _ops.bn_stats(F.conv2d(activation, self.weight, None, *self.settings), None, None, 0.1, 1e-5)

    def grad_input_fused(self) -> object:
        arguments = (self.dz, self.y, self.coefficients, self.weight, self.x, *self.before, None)
        return _ops.conv_grad_input(*arguments, *self.settings)

    def grad_input_separate(self) -> object:
        dy = _ops.bn_grad_apply(self.dz, self.y, *self.behind, *self.sums, False)
        grad = self._convolution_backward(dy, self.x, 0)
        return _ops.bn_grad_stats(grad, self.x, None, *self.before, True)

    def grad_weight_fused(self) -> object:
        arguments = (self.dz, self.y, self.coefficients, self.x, *self.before, self.weight)
        return _ops.conv_grad_weight(*arguments, *self.settings)

    def grad_weight_separate(self) -> object:
        """dy is there already, from grad_input_separate; the activation is made again, as level 0 does."""
        return self._convolution_backward(self.dz, _ops.bn_apply(self.x, *self.before, None, True), 1)

    def _convolution_backward(self, dy: Tensor, x: Tensor, wanted: int) -> Tensor:
        stride, padding, dilation, groups = self.settings
        mask = [wanted == 0, wanted == 1, False]
        settings = (None, stride, padding, dilation, False, [0, 0], groups, mask)
        return torch.ops.aten.convolution_backward(dy, x, self.weight, *settings)[wanted]

    def moved(self, product: str) -> int:
        """Bytes that the fused kernel reads and writes; vectors and partial sums are not counted."""
        x, y, weight = self.x.nbytes, self.y.nbytes, self.weight.nbytes
        return {
            "forward": x + weight + y,
            "grad_input": 2 * y + weight + 2 * x,
            "grad_weight": 2 * y + x + 4 * self.weight.numel(),
        }[product]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCH_SIZES)
@pytest.mark.parametrize("conv", SHAPES, ids=str)
@pytest.mark.parametrize("product", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("contender", ["fused", "separate"])
def test_convolution(
    benchmark, conv: Convolution, product: str, contender: str, batch: int, dtype: torch.dtype
) -> None:
    step = Step(conv, batch, dtype)
    if contender == "fused" and ON_GPU:
        assert training_level(step.x, step.weight, *step.settings) == 3
    run = run_to_the_end(getattr(step, f"{product}_{contender}"))
    benchmark.group = f"{product} {conv} x {batch} {dtype}"
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=3)
    moved, flop = step.moved(product), conv.flop(batch)
    benchmark.extra_info.update(bytes=moved, flop=flop, batch_size=batch, count_in_network=conv.count)
    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.median
        best = ceilings(dtype)
        benchmark.extra_info["ceilings"] = vars(best)
        benchmark.extra_info["gigabytes_per_second"] = moved / seconds / 1e9
        benchmark.extra_info["roofline_fraction"] = best.fraction(seconds, moved, flop)


def run_to_the_end(work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            work()
        if ON_GPU:
            torch.cuda.synchronize()

    return run
