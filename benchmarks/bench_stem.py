"""The first layers of a ResNet in inference as one kernel, against eager and convolution with pooling behind it.

    python -m pytest benchmarks/bench_stem.py [-k "batch1- and not compile"] [--benchmark-json=FILE]     on a GPU
    python -m benchmarks.bench_stem --dry                           anywhere: runs every contender, measures nothing

"stem" is ``torch.ops.fused_resnet.stem`` of the cuda backend; "triton" and "cuda" are ``conv_bn_act`` there and
``F.max_pool2d``, skipped with the backend's reasons where it refuses three channels; "eager" is cuDNN's convolution in
channels_last with the norm folded into its weight, ReLU and pooling; "compile" is ``torch.compile`` of that. Images are
channels_last, contiguous, or bytes in channels_last, which all but the stem scale to the weight's dtype first.

``extra_info``: the bytes that one kernel must move (image, weight, result) and the operations of the convolution, both
by the median of the device's time, and for eager what its ops move, as ``fused_resnet.bench.ledger`` counts them; of
the copy's bandwidth, the L2 cache and ``accuracy``, see bench_bn_act.py.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_bn_act import (
    COMPILE,
    CUDA,
    DEVICE,
    EAGER,
    ON_GPU,
    TRITON,
    Work,
    device_time,
    measure_on_device,
    on_backend,
)
from fused_resnet.bench.ledger import ledger
from fused_resnet.bench.norm_inputs import EPS
from fused_resnet.bench.passes import Results, why_wrong
from fused_resnet.ops import reference
from fused_resnet.ops.conv_bn_act import fold

STEM = "stem"
CONTENDERS = (STEM, CUDA, TRITON, EAGER, COMPILE)
LAYOUTS = ("nhwc", "nchw", "bytes")
BATCHES = (256, 32, 1)
DTYPES = (torch.float16, torch.bfloat16)
FILTERS, IMAGE_SIZE = 64, 224
DRY_BATCH, DRY_SIZE = 2, 33
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, of values from 0 to 1
PIXEL_SCALE = [1 / (255 * std) for std in PIXEL_STD]
PIXEL_SHIFT = [-mean / std for mean, std in zip(PIXEL_MEAN, PIXEL_STD, strict=True)]

_ops = torch.ops.fused_resnet


class Stem:
    """Images and the first layers' parameters, random, and every contender on them."""

    def __init__(self, batch: int, size: int, layout: str, dtype: torch.dtype, device: str) -> None:
        shape = (batch, 3, size, size)
        memory_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
        self.bytes, self.dtype = layout == "bytes", dtype
        x = (
            torch.randint(0, 256, shape, device=device).to(torch.uint8)
            if self.bytes
            else torch.randn(shape, device=device)
        )
        self.x = x.to(torch.uint8 if self.bytes else dtype).contiguous(memory_format=memory_format)
        weight = torch.randn(FILTERS, 3, 7, 7, device=device) * (3 * 7 * 7) ** -0.5
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.norm = [torch.rand(FILTERS, device=device) + 0.5 for _ in range(4)]  # weight, bias, mean, variance
        self.scale, self.shift = fold(*self.norm, EPS)
        self.pixel_scale, self.pixel_shift = (
            torch.tensor(vector, device=device)[:, None, None] for vector in (PIXEL_SCALE, PIXEL_SHIFT)
        )
        folded = self.weight.float() * self.scale[:, None, None, None]
        self.folded_weight = folded.to(dtype).contiguous(memory_format=torch.channels_last)
        self.folded_bias = self.shift.to(dtype)

    @property
    def conv_size(self) -> int:
        return (self.x.shape[2] - 1) // 2 + 1

    @property
    def out_size(self) -> int:
        return (self.conv_size - 1) // 2 + 1

    @property
    def moved(self) -> int:
        """Bytes that one kernel reads and writes; vectors are not counted."""
        out = self.x.shape[0] * FILTERS * self.out_size**2 * self.dtype.itemsize
        return self.x.nbytes + self.weight.nbytes + out

    @property
    def eager_moved(self) -> int:
        """Bytes that the ops of eager read and write, vectors and the pooling's indices included."""
        return ledger(self.eager).total

    @property
    def flop(self) -> int:
        """Additions and multiplications of the convolution, its padding included."""
        return 2 * self.x.shape[0] * FILTERS * self.conv_size**2 * self.weight[0].numel()

    def fused(self) -> Results:
        pixels = (PIXEL_SCALE, PIXEL_SHIFT) if self.bytes else (None, None)
        return [_ops.stem(self.x, self.weight, self.scale, self.shift, *pixels)]

    def two_kernels(self) -> Results:
        x = self._scaled().contiguous(memory_format=torch.channels_last)
        settings = ([2, 2], [3, 3], [1, 1], 1, True)
        return [self._pool(_ops.conv_bn_act(x, self.weight, self.scale, self.shift, None, *settings))]

    def eager(self) -> Results:
        z = F.conv2d(self._scaled(), self.folded_weight, self.folded_bias, stride=2, padding=3)
        return [self._pool(z.relu_())]

    def why_wrong(self, actual: Results) -> str | None:
        """By the project's rule, PyTorch's own being convolution and norm one by one."""
        x = self._scaled()
        weight, bias, mean, variance = self.norm
        z = F.batch_norm(F.conv2d(x, self.weight, stride=2, padding=3), mean, variance, weight, bias, eps=EPS)
        exact_vectors = fold(*self.norm, EPS, torch.float64)
        exact = reference.stem(x.double(), self.weight.double(), *exact_vectors, None, None)
        (out,) = actual
        assert out is not None
        return why_wrong(out, self._pool(z.relu_()), exact)

    def _scaled(self) -> Tensor:
        return (self.x.float() * self.pixel_scale + self.pixel_shift).to(self.dtype) if self.bytes else self.x

    @staticmethod
    def _pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=2, padding=1)


def stem_work(stem: Stem, contender: str, dry: bool = False) -> Work:
    if contender == EAGER:
        run: Callable[[], Results] = stem.eager
    elif contender == COMPILE:
        torch.compiler.reset()
        compiled = {"backend": "eager"} if dry else {"mode": "max-autotune-no-cudagraphs"}
        run = torch.compile(stem.eager, dynamic=False, **compiled)
    elif contender == STEM:
        run = on_backend(CUDA, stem.fused, dry)
    else:
        run = on_backend(contender, stem.two_kernels, dry)
    return Work(without_gradients(run), stem.why_wrong, stem.moved)


def without_gradients(run: Callable[[], Results]) -> Callable[[], Results]:
    @functools.wraps(run)
    def run_so() -> Results:
        with torch.no_grad():
            return run()

    return run_so


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device; python -m benchmarks.bench_stem --dry runs here")
@device_time
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES, ids="batch{}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_stem(benchmark, contender: str, layout: str, batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stem = Stem(batch, IMAGE_SIZE, layout, dtype, DEVICE)
    extra: dict[str, object] = {"flop": stem.flop, "layout": layout, "image_size": IMAGE_SIZE}
    if contender == EAGER:
        extra["bytes_of_its_ops"] = stem.eager_moved
    measure_on_device(benchmark, lambda: stem_work(stem, contender), f"stem {layout}", batch, dtype, **extra)
    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["gigaflop_per_second"] = stem.flop / seconds / 1e9
        if contender == EAGER:
            benchmark.extra_info["gigabytes_per_second_of_its_ops"] = stem.eager_moved / seconds / 1e9


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", required=True, help="small images, reference backend, no times")
    parser.parse_args(words)
    torch.manual_seed(0)
    wrong_ones = 0
    for layout in LAYOUTS:
        for dtype in DTYPES:
            stem = Stem(DRY_BATCH, DRY_SIZE, layout, dtype, "cpu")
            print(f"{layout} {dtype}: {stem.moved} bytes, eager's ops {stem.eager_moved}, {stem.flop} operations")
            for contender in CONTENDERS:
                work = stem_work(stem, contender, dry=True)
                wrong = work.why_wrong(work.run())
                wrong_ones += wrong is not None
                print(f"  {contender:10} {wrong or 'right'}")
    return 1 if wrong_ones else 0


if __name__ == "__main__":
    raise SystemExit(main())
