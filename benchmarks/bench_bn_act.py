"""bn_act against eager PyTorch on the norms of ResNet-50, with pytest-benchmark.

    python -m pytest benchmarks/bench_bn_act.py [-k "forward and layer1"] [--benchmark-json=FILE]

Every size is run as ``F.batch_norm``, add and ReLU in eager, and as ``bn_act``. ``extra_info`` holds the bytes that the
fused passes must move (KERNELS.md section 1) and, for each contender, these bytes by its median time in GB/s: for the
fused op its bandwidth, for eager what its time is worth in the same currency.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import RESNET50_SITES, Site
from fused_resnet.ops import BatchNorm, bn_act, bn_act_dual

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BATCH_SIZE = 256 if ON_GPU else 8
DTYPES = [torch.bfloat16, torch.float32] if ON_GPU else [torch.float32]
ROUNDS = 50 if ON_GPU else 9

# Activations read and written by the fused passes: statistics and apply; gradient statistics, which writes the
# residual's gradient where there is one, and gradient apply, which reads it.
FORWARD_PASSES = {"relu": 1 + 2, "residual": 1 + 3, "projection": 2 + 3}
BACKWARD_PASSES = {"relu": 2 + 3, "residual": 4 + 3, "projection": (4 + 3) + (2 + 3)}


class Activations:
    """Inputs of one site, channels_last, and its two contenders."""

    def __init__(self, site: Site, dtype: torch.dtype) -> None:
        self.ending = site.ending
        shape = (BATCH_SIZE, site.channels, site.size, site.size)
        self.x, self.shortcut = (
            torch.randn(shape, device=DEVICE, dtype=dtype)
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_()
            for _ in range(2)
        )
        self.norms = [
            BatchNorm(
                torch.rand(site.channels, device=DEVICE).requires_grad_(),
                torch.rand(site.channels, device=DEVICE).requires_grad_(),
                torch.zeros(site.channels, device=DEVICE),
                torch.ones(site.channels, device=DEVICE),
                training=True,
            )
            for _ in range(2)
        ]

    def eager(self) -> Tensor:
        z = self._batch_norm(self.x, self.norms[0])
        if self.ending == "residual":
            z += self.shortcut
        if self.ending == "projection":
            z += self._batch_norm(self.shortcut, self.norms[1])
        return F.relu(z, inplace=True)

    def fused(self) -> Tensor:
        if self.ending == "projection":
            return bn_act_dual(self.x, self.norms[0], self.shortcut, self.norms[1])
        weight, bias, mean, var, *_ = self.norms[0]
        residual = self.shortcut if self.ending == "residual" else None
        return bn_act(self.x, weight, bias, mean, var, residual, training=True)

    def gradients(self, out: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
        inputs = [self.x, self.norms[0].weight, self.norms[0].bias]
        if self.ending != "relu":
            inputs.append(self.shortcut)
        if self.ending == "projection":
            inputs += [self.norms[1].weight, self.norms[1].bias]
        return torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

    @staticmethod
    def _batch_norm(x: Tensor, norm: BatchNorm) -> Tensor:
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps
        )


@pytest.fixture(params=RESNET50_SITES, ids=str)
def site(request: pytest.FixtureRequest) -> Site:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contender", ["eager", "fused"])
def test_forward(benchmark, site: Site, contender: str, dtype: torch.dtype) -> None:
    activations = Activations(site, dtype)
    forward = getattr(activations, contender)

    def run() -> None:
        with torch.no_grad():
            forward()

    measure(benchmark, run, site, dtype, FORWARD_PASSES[site.ending])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contender", ["eager", "fused"])
def test_backward(benchmark, site: Site, contender: str, dtype: torch.dtype) -> None:
    activations = Activations(site, dtype)
    out = getattr(activations, contender)()
    grad_out = torch.randn_like(out)
    measure(benchmark, lambda: activations.gradients(out, grad_out), site, dtype, BACKWARD_PASSES[site.ending])


def measure(benchmark, run: Callable[[], object], site: Site, dtype: torch.dtype, passes: int) -> None:
    def run_to_the_end() -> None:
        run()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{benchmark.name.split('[')[0].removeprefix('test_')} {site} {dtype}"
    benchmark.pedantic(run_to_the_end, rounds=ROUNDS, warmup_rounds=3)
    moved = passes * site.elements(BATCH_SIZE) * dtype.itemsize
    benchmark.extra_info["bytes"] = moved
    benchmark.extra_info["batch_size"] = BATCH_SIZE
    benchmark.extra_info["sites_in_resnet50"] = site.count
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["gigabytes_per_second"] = moved / benchmark.stats.stats.median / 1e9
