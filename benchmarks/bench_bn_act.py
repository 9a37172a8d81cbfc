"""bn_act and each of its passes against eager PyTorch on the norms of ResNet-50, with pytest-benchmark.

    python -m pytest benchmarks/bench_bn_act.py [-k "forward and layer1"] [--benchmark-json=FILE]
    python -m pytest benchmarks/bench_bn_act.py -k "test_pass and not compile"        on a GPU
    python -m benchmarks.bench_bn_act --dry                                           anywhere: runs, measures nothing

test_forward and test_backward run every size as ``F.batch_norm``, add and ReLU in eager, and as ``bn_act``.
``extra_info`` holds the bytes that the fused passes must move (KERNELS.md section 1) and, for each contender, these
bytes by its median time in GB/s: for the fused op its bandwidth, for eager what its time is worth in the same currency.

On a GPU, test_pass runs every pass by itself where ResNet-50 has it, test_stats_apply the one launch that does two of
them, and test_step forward and backward of norm, add and ReLU. The time is the device's, by events. At batch 32 and 256
the L2 cache is overwritten before each repetition; at batch 1 it is not, and the GB/s there may pass those of memory.
``extra_info`` also holds the percentage of a copy's bandwidth, measured in the same run, and ``accuracy``: "right", or
"wrong" and why, by the project's rule against float64, once in front of the measurement.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import RESNET50_SITES, Site
from fused_resnet.bench.device_clock import Moment, before_each_round
from fused_resnet.bench.machine import machine_facts
from fused_resnet.bench.norm_inputs import EPS, Norm
from fused_resnet.bench.passes import PASSES, STATS_APPLY, NormPass, Results, why_wrong
from fused_resnet.bench.roofline import measure_ceilings
from fused_resnet.ops import BackendError, BatchNorm, bn_act, bn_act_dual, use_backend
from fused_resnet.ops.backend import takes_one_launch

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


PASS_BATCHES = (256, 32, 1)
FLUSHED_FROM = 32  # images
CUDA, TRITON, EAGER, COMPILE = "cuda", "triton", "eager", "compile"
CONTENDERS = (CUDA, TRITON, EAGER, COMPILE)
TWO_LAUNCHES = {f"{CUDA}-two-ops": CUDA, f"{TRITON}-two-ops": TRITON}
DRY_SHAPE = (2, 40, 5, 7)

gpu_only = pytest.mark.skipif(not ON_GPU, reason="no CUDA device; python -m benchmarks.bench_bn_act --dry runs here")
device_time = pytest.mark.benchmark(timer=Moment if ON_GPU else time.perf_counter)
_ops = torch.ops.fused_resnet


@dataclass(frozen=True)
class Work:
    """What one contender does, and whether its results are right."""

    run: Callable[[], Results]
    why_wrong: Callable[[Results], str | None]
    moved: int


def pass_work(norm_pass: NormPass, norm: Norm, contender: str, dry: bool = False) -> Work:
    """One pass on a backend, in eager or compiled; "cuda-two-ops" and "triton-two-ops" are those of ``STATS_APPLY``."""
    if contender == EAGER:
        run: Callable[[], Results] = functools.partial(norm_pass.eager, norm)
    elif contender == COMPILE:
        run = norm_pass.compiled(norm, "eager" if dry else "inductor")
    elif contender in TWO_LAUNCHES:
        run = on_backend(TWO_LAUNCHES[contender], functools.partial(stats_then_apply, norm, contender), dry)
    else:
        run = on_backend(contender, norm_pass.call(norm), dry)
    return Work(run, lambda results: norm_pass.why_wrong(results, norm), norm_pass.moved(norm.shape, norm.dtype))


def stats_then_apply(norm: Norm, contender: str) -> Results:
    statistics = _ops.bn_stats(norm.x, None, None, 0.0, EPS)
    vectors = (*statistics, norm.weight, norm.bias, norm.residual)
    if TWO_LAUNCHES[contender] == TRITON:  # has no bits
        return [_ops.bn_apply(norm.x, *vectors, True), None, *statistics]
    return [*_ops.bn_apply_mask(norm.x, *vectors), *statistics]


def step_work(norm: Norm, contender: str, dry: bool = False) -> Work:
    """Forward and backward of norm, add and ReLU: (out and the gradients of x, weight, bias and residual)."""
    step = Step(norm)
    if contender == EAGER:
        run: Callable[[], Results] = step.eager
    elif contender == COMPILE:
        torch.compiler.reset()
        run = functools.partial(
            step.eager, torch.compile(step.plain, dynamic=False, backend="eager" if dry else "inductor")
        )
    else:
        run = on_backend(contender, step.fused, dry)
    return Work(run, step.why_wrong, step.moved(contender))


class Step:
    """Training of one norm with a residual."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm
        self.leaves = [tensor.clone().requires_grad_() for tensor in (norm.x, norm.weight, norm.bias, norm.residual)]
        self.running = [torch.zeros_like(norm.bias), torch.ones_like(norm.bias)]

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        running = [vector.to(weight.dtype) for vector in self.running]
        return F.batch_norm(x, *running, weight, bias, True, 0.1, EPS).add_(residual).relu_()

    def eager(self, function: Callable[..., Tensor] | None = None) -> Results:
        return self._with_gradients((function or self.plain)(*self.leaves), self.leaves, self.norm.grad_out)

    def fused(self) -> Results:
        x, weight, bias, residual = self.leaves
        out = bn_act(x, weight, bias, *self.running, residual, training=True, eps=EPS)
        return self._with_gradients(out, self.leaves, self.norm.grad_out)

    def moved(self, contender: str) -> int:
        """Bytes: of ``cuda``, which keeps bits, its own passes; of all others those that keep the output."""
        shape, dtype = self.norm.shape, self.norm.dtype
        if contender != CUDA:
            return (FORWARD_PASSES["residual"] + BACKWARD_PASSES["residual"]) * self.norm.x.nbytes
        forward = ["bn_stats", "bn_apply_mask residual"]
        backward = ["bn_grad_stats of bits", "bn_grad_apply of bits, with dz"]
        if takes_one_launch(self.norm.x):
            forward = [STATS_APPLY.name]
        return sum(p.moved(shape, dtype) for p in [*PASSES, STATS_APPLY] if p.name in forward + backward)

    def why_wrong(self, actual: Results) -> str | None:
        doubles = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        exact = self._with_gradients(self.plain(*doubles), doubles, self.norm.grad_out.double())
        baseline = self.eager()
        for name, *tensors, terms in zip(
            ("out", "grad_x", "grad_weight", "grad_bias", "grad_residual"),
            *(actual, baseline, exact),
            (1, 1, self.norm.values, self.norm.values, 1),
            strict=True,
        ):
            if wrong := why_wrong(*tensors, terms):
                return f"{name}: {wrong}"
        return None

    @staticmethod
    def _with_gradients(out: Tensor, leaves: list[Tensor], grad_out: Tensor) -> Results:
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def on_backend(name: str, run: Callable[[], Results], dry: bool) -> Callable[[], Results]:
    """On a backend, which a dry run replaces by the reference."""

    def run_there() -> Results:
        with use_backend("reference" if dry else name):
            return run()

    return run_there


def unique_shapes(endings: tuple[str, ...]) -> list[Site]:
    """The first site of every shape among those that end so."""
    return list({(s.channels, s.size): s for s in reversed(RESNET50_SITES) if s.ending in endings}.values())[::-1]


PASS_CASES = [
    pytest.param(norm_pass, site, id=f"{norm_pass}-{site}")
    for norm_pass in PASSES
    for site in unique_shapes(norm_pass.endings)
]


@gpu_only
@device_time
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", PASS_BATCHES, ids="batch{}".format)
@pytest.mark.parametrize(("norm_pass", "site"), PASS_CASES)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_pass(benchmark, norm_pass: NormPass, site: Site, contender: str, batch: int, dtype: torch.dtype) -> None:
    norm = norm_at(site, batch, dtype)
    measure_on_device(benchmark, lambda: pass_work(norm_pass, norm, contender), f"{norm_pass} {site}", batch, dtype)


@gpu_only
@device_time
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", PASS_BATCHES, ids="batch{}".format)
@pytest.mark.parametrize("site", unique_shapes(("residual",)), ids=str)
@pytest.mark.parametrize("contender", [*TWO_LAUNCHES, *CONTENDERS])
def test_stats_apply(benchmark, site: Site, contender: str, batch: int, dtype: torch.dtype) -> None:
    norm = norm_at(site, batch, dtype)
    if contender == TRITON:
        pytest.skip("triton has no bn_stats_apply; its two launches are triton-two-ops")
    measure_on_device(benchmark, lambda: pass_work(STATS_APPLY, norm, contender), f"{STATS_APPLY} {site}", batch, dtype)


@gpu_only
@device_time
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", PASS_BATCHES, ids="batch{}".format)
@pytest.mark.parametrize("site", unique_shapes(("residual",)), ids=str)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_step(benchmark, site: Site, contender: str, batch: int, dtype: torch.dtype) -> None:
    norm = norm_at(site, batch, dtype)
    measure_on_device(benchmark, lambda: step_work(norm, contender), f"step {site}", batch, dtype)


def norm_at(site: Site, batch: int, dtype: torch.dtype) -> Norm:
    torch.manual_seed(0)
    return Norm((batch, site.channels, site.size, site.size), dtype, DEVICE)


def measure_on_device(
    benchmark, make: Callable[[], Work], title: str, batch: int, dtype: torch.dtype, **extra: object
) -> None:
    """The device's time of some work, with what it moves and whether it is right; skipped if a backend refuses."""
    try:
        work = make()
        wrong = work.why_wrong(work.run())
    except BackendError as refusal:
        pytest.skip(str(refusal))
    flush = batch >= FLUSHED_FROM
    benchmark.group = f"{title} x {batch} {dtype}"
    benchmark.pedantic(work.run, setup=before_each_round(DEVICE, flush), rounds=ROUNDS, warmup_rounds=10)
    note(benchmark, work.moved, copy_bandwidth(dtype))
    benchmark.extra_info.update(
        batch_size=batch,
        l2_cache="flushed" if flush else "warm",
        accuracy="right" if wrong is None else f"wrong: {wrong}",
        machine=facts(),
        **extra,
    )


def note(benchmark, moved: int, bandwidth: float) -> None:
    """The bytes of one round, and what its median time makes of them."""
    benchmark.extra_info.update(bytes=moved, copy_gigabytes_per_second=bandwidth / 1e9)
    if benchmark.stats is not None:  # None under --benchmark-disable
        reached = moved / benchmark.stats.stats.median
        benchmark.extra_info["gigabytes_per_second"] = reached / 1e9
        benchmark.extra_info["percent_of_copy"] = 100 * reached / bandwidth


@functools.cache
def copy_bandwidth(dtype: torch.dtype) -> float:
    """Bytes a second, read and written, of a copy on this device in this run."""
    return measure_ceilings(DEVICE, dtype).bytes_per_second


@functools.cache
def facts() -> dict[str, Any]:
    return machine_facts(DEVICE)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", required=True, help="small tensors, reference backend, no times")
    parser.parse_args(words)
    torch.manual_seed(0)
    wrong_ones = 0
    for dtype in (torch.float32, torch.bfloat16):
        norm = Norm(DRY_SHAPE, dtype, "cpu")
        works = {f"{p.name}, {name}": pass_work(p, norm, name, dry=True) for p in PASSES for name in CONTENDERS}
        names = [*TWO_LAUNCHES, CUDA, EAGER, COMPILE]
        works |= {f"{STATS_APPLY.name}, {name}": pass_work(STATS_APPLY, norm, name, dry=True) for name in names}
        works |= {f"step, {name}": step_work(norm, name, dry=True) for name in CONTENDERS}
        for name, work in works.items():
            wrong = work.why_wrong(work.run())
            wrong_ones += wrong is not None
            print(f"{name:60} {str(dtype).removeprefix('torch.'):10} {work.moved:9} bytes   {wrong or 'right'}")
    return 1 if wrong_ones else 0


if __name__ == "__main__":
    raise SystemExit(main())
