"""bn_stats, bn_apply, bn_apply_dual, bn_grad_stats and bn_grad_apply in Triton against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_resnet import kernels
from fused_resnet.arguments import Norm
from fused_resnet.kernels.device import INTERPRETED_MULTIPROCESSORS
from fused_resnet.kernels.row_tiles import RowTiles, elementwise_tiles, reduction_tiles
from fused_resnet.kernels.welford import finalize_statistics
from fused_resnet.ops import reference
from fused_resnet.ops.route.packing import packed
from tests.accuracy import assert_at_most_twice

RUNNING = (None, None, 0.1, 1e-5)
"""Statistics that do not move."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (2, 64, 7, 7),  # a stage of ResNet: one block of channels, whole vectors
    (2, 17, 5, 3),  # a prime number of channels: nothing is aligned
    (3, 1, 9, 7),  # one channel
    (1, 64, 1, 1),  # one value for each channel
    (1, 257, 3, 2),  # one channel more than two blocks
    (37, 8, 13, 11),  # more rows than one tile: several chunks, the last one short
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu, with_residual", [(True, True), (True, False), (False, False)])
def test_every_pass(shape: tuple[int, ...], dtype: torch.dtype, relu: bool, with_residual: bool, device) -> None:
    check_every_pass(shape, dtype, device, relu=relu, residual=with_residual)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(
        st.integers(1, 4), st.sampled_from([1, 2, 3, 5, 16, 31, 40, 129]), st.integers(1, 8), st.integers(1, 8)
    ),
    dtype=st.sampled_from(DTYPES),
    relu=st.booleans(),
    residual=st.booleans(),
    affine=st.booleans(),
    constant=st.booleans(),
)
def test_any_shape(device, shape, dtype, relu, residual, affine, constant) -> None:
    torch.manual_seed(0)
    check_every_pass(shape, dtype, device, relu=relu, residual=residual, affine=affine, constant=constant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mean_of_ten_thousand_deviations(dtype: torch.dtype, device) -> None:
    """Sums of squares would lose every digit of the variance here."""
    check_every_pass((4, 24, 9, 9), dtype, device, mean=1e4, relu=True, residual=False)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_missing_weight_or_bias(weight: bool, bias: bool, device) -> None:
    x = image((2, 20, 5, 4), torch.float32, device)
    mean, invstd = reference.bn_stats(x, RUNNING)
    vectors = [torch.randn(20, device=device) if given else None for given in (weight, bias)]
    check("bn_apply", x, mean, invstd, *vectors, None, True)
    check("bn_grad_stats", torch.randn_like(x), x, None, mean, invstd, *vectors, True, terms=40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_vectors_of_other_dtypes(dtype: torch.dtype, device) -> None:
    x = image((2, 20, 5, 4), torch.float16, device)
    weight, bias, running_mean = (torch.randn(20, device=device).to(dtype) for _ in range(3))
    mean, invstd = check("bn_stats", x, running_mean, running_mean.abs(), 0.3, 1e-5)
    check("bn_apply", x, mean, invstd, weight, bias, None, True)


@pytest.mark.parametrize("has_mean, has_var", [(False, False), (True, False), (False, True)])
def test_missing_running_statistics(has_mean: bool, has_var: bool, device) -> None:
    running = [torch.rand(9, device=device) if has else None for has in (has_mean, has_var)]
    check("bn_stats", image((3, 9, 4, 4), torch.float32, device), *running, 0.1, 1e-5)


def test_running_statistics_that_are_not_dense_are_moved_in_place(device) -> None:
    both = torch.rand(12, 2, device=device)
    expected = both.clone()
    x = image((3, 12, 4, 4), torch.float32, device)
    kernels.bn_stats(x, (both[:, 0], both[:, 1], 0.25, 1e-5))
    reference.bn_stats(x, (expected[:, 0], expected[:, 1], 0.25, 1e-5))
    torch.testing.assert_close(both, expected)


@pytest.mark.parametrize("relu", [True, False])
def test_dual(relu: bool, device) -> None:
    x, x2 = (image((3, 70, 6, 5), torch.float16, device) for _ in range(2))
    norm, norm2 = (
        (*reference.bn_stats(each, RUNNING), torch.randn(70, device=device), bias)
        for each, bias in ((x, torch.randn(70, device=device)), (x2, None))
    )
    check("bn_apply_dual", x, *norm, x2, *norm2, relu)


def test_dead_channels(device) -> None:
    """A channel that never changes has variance 0; a channel behind a ReLU that is always shut has gradient 0."""
    x = image((3, 10, 4, 4), torch.float32, device)
    x[:, 3] = 2.5
    bias = torch.zeros(10, device=device)
    bias[7] = -100
    mean, invstd = check("bn_stats", x, None, None, 0.1, 1e-5)
    assert invstd[3].item() == pytest.approx(1e-5**-0.5, rel=1e-6)
    grad = torch.randn_like(x)
    *sums, _ = check("bn_grad_stats", grad, x, None, mean, invstd, None, bias, True, terms=48)
    assert sums[0][7] == 0 and sums[1][7] == 0
    check("bn_grad_apply", grad, x, mean, invstd, None, bias, *sums, True)


def test_nan_and_infinity_pass(device) -> None:
    """In one channel each; the other channels do not notice."""
    x = image((2, 6, 4, 4), torch.float32, device)
    mean, invstd = reference.bn_stats(x, RUNNING)
    x[0, 1, 2, 2], x[1, 2, 0, 0], x[1, 3, 0, 0] = float("nan"), float("inf"), float("-inf")
    out = check("bn_apply", x, mean, invstd, None, None, None, True)
    assert out[0, 1, 2, 2].isnan() and out[1, 2, 0, 0] == float("inf") and out[1, 3, 0, 0] == 0
    grad = torch.ones_like(x)
    *_, dz = kernels.bn_grad_stats(grad, x, out, Norm(mean, invstd), True)
    assert dz[0, 1, 2, 2] == 1  # where z is NaN the gradient passes
    grad_x = check("bn_grad_apply", grad, x, mean, invstd, None, None, None, None, True)
    assert grad_x[0, 1, 2, 2] == invstd[1]
    statistics = kernels.bn_stats(x, RUNNING)
    assert torch.equal(torch.stack(statistics).isfinite().all(0).nonzero().flatten().cpu(), torch.tensor([0, 4, 5]))


def test_gradient_at_zero_is_zero(device) -> None:
    x = torch.zeros(1, 4, 2, 2, device=device).contiguous(memory_format=torch.channels_last)
    zero, one = torch.zeros(4, device=device), torch.ones(4, device=device)
    *_, dz = kernels.bn_grad_stats(torch.ones_like(x), x, x, Norm(zero, one), True)
    assert not dz.any()
    assert not kernels.bn_grad_apply(torch.ones_like(x), x, Norm(zero, one), None, True).any()


def test_other_memory_formats(device) -> None:
    """grad_out and the residual may lie in any way; the results lie as x does."""
    x = image((2, 12, 5, 6), torch.float32, device)
    mean, invstd = reference.bn_stats(x, RUNNING)
    nchw = torch.randn(2, 12, 5, 6, device=device)
    broadcast = torch.ones((), device=device).expand(2, 12, 5, 6)  # what sum().backward() gives
    for other in (nchw, nchw.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), broadcast):
        out = check("bn_apply", x, mean, invstd, None, None, other, True)
        *sums, _ = check("bn_grad_stats", other, x, out, mean, invstd, None, None, True, terms=60)
        check("bn_grad_apply", other, x, mean, invstd, None, None, *sums, True)
    strided = image((2, 24, 5, 6), torch.float32, device)[:, ::2]
    out = kernels.bn_apply(strided, Norm(mean, invstd), None, True)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, reference.bn_apply(strided, Norm(mean, invstd), None, True))


def test_against_batch_norm_itself(device) -> None:
    """The whole of level 0 against nn.BatchNorm2d + residual + ReLU: output, every gradient, every buffer."""
    x, residual, grad = (image((5, 19, 6, 7), torch.float32, device) for _ in range(3))
    weight, bias = (torch.randn(19, device=device) for _ in range(2))

    def eager(dtype: torch.dtype) -> list[Tensor]:
        norm = nn.BatchNorm2d(19, device=device, dtype=dtype)
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, residual)]
        out = F.relu(norm(inputs[0]) + inputs[1])
        grads = torch.autograd.grad(out, [*inputs, norm.weight, norm.bias], grad.to(dtype))
        return [out, *grads, norm.running_mean, norm.running_var]

    running_mean, running_var = torch.zeros(19, device=device), torch.ones(19, device=device)
    vectors = Norm(*kernels.bn_stats(x, (running_mean, running_var, 0.1, 1e-5)), weight, bias)
    out = kernels.bn_apply(x, vectors, residual, True)
    grad_bias, grad_weight, grad_residual = kernels.bn_grad_stats(grad, x, out, vectors, True)
    grad_x = kernels.bn_grad_apply(grad_residual, x, vectors, (grad_bias, grad_weight), False)
    actual = [out, grad_x, grad_residual, grad_weight, grad_bias, running_mean, running_var]
    names = ["out", "grad x", "grad residual", "grad weight", "grad bias", "running mean", "running var"]
    for name, ours, theirs, exact in zip(names, actual, eager(torch.float32), eager(torch.float64), strict=True):
        terms = 5 * 6 * 7 if name in ("grad weight", "grad bias") else 1
        assert_at_most_twice(ours, theirs, exact, what=name, terms=terms)


def test_a_chunk_of_several_tiles(device) -> None:
    """Elementwise programs loop only when the device is full; 530,000 elements fill the interpreter's."""
    x = image((4, 64, 46, 45), torch.float16, device)
    rows, channels = x.numel() // 64, 64
    tiles = elementwise_tiles(rows, channels, INTERPRETED_MULTIPROCESSORS)
    assert tiles.chunk_rows == 2 * tiles.block_rows and rows % tiles.chunk_rows != 0
    mean, invstd = torch.randn(64, device=device), torch.rand(64, device=device)
    check("bn_apply", x, mean, invstd, None, None, None, True)
    check("bn_grad_apply", torch.randn_like(x), x, mean, invstd, None, None, mean, mean, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_of_numbers_near_the_largest(dtype: torch.dtype, device) -> None:
    """All of a channel, one of another, none of the third; and a fourth that has an infinity."""
    x = image((5, 4, 12, 11), torch.float32, device)
    x[:, 0] *= 1e38
    x[3, 1, 7, 5] = -3e38
    x[2, 3, 1, 1] = math.inf
    x = x.to(dtype)
    mean, invstd = kernels.bn_stats(x, RUNNING)
    variance, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean[:3].double(), exact_mean[:3], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(invstd[:3].double(), (variance[:3] + RUNNING[3]).rsqrt(), rtol=1e-5, atol=1e-44)
    assert mean[3].isinf() and invstd[3].isnan()


def test_statistics_merge_like_one_batch(device) -> None:
    """finalize_statistics takes partial results from anywhere: here unequal shares, one of them empty."""
    x = image((7, 11, 4, 3), torch.float32, device) * 3 + 50
    shares = [x[:1], x[1:1], x[1:3], x[3:]]
    counts = torch.tensor([share.numel() // 11 for share in shares], device=device)
    means, m2s = torch.zeros(4, 11, device=device), torch.zeros(4, 11, device=device)
    for index, share in enumerate(shares):
        if share.numel():
            variance, means[index] = torch.var_mean(share, (0, 2, 3), correction=0)
            m2s[index] = variance * counts[index]
    merged = finalize_statistics(counts, means, m2s, RUNNING, x)
    expected = reference.bn_stats(x.double(), RUNNING)
    for actual, exact in zip(merged, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=0)


def test_bitwise_repeatable(device) -> None:
    x = image((9, 33, 12, 12), torch.float16, device)
    grad = torch.randn_like(x)

    def run() -> list[Tensor]:
        statistics = kernels.bn_stats(x, RUNNING)
        sums = kernels.bn_grad_stats(grad, x, None, Norm(*statistics), True)
        return [*statistics, *sums]

    first = run()
    for _ in range(2 if kernels.INTERPRETED else 20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.integers(1, 2**33), st.integers(1, 5000), st.integers(1, 200))
def test_tiles_cover_the_matrix_once(rows: int, channels: int, multiprocessors: int) -> None:
    for choose in (elementwise_tiles, reduction_tiles):
        tiles: RowTiles = choose(rows, channels, multiprocessors)
        assert tiles.chunk_rows % tiles.block_rows == 0
        assert (tiles.chunks - 1) * tiles.chunk_rows < rows <= tiles.chunks * tiles.chunk_rows
        assert (tiles.channel_blocks - 1) * tiles.block_channels < channels
        assert channels <= tiles.channel_blocks * tiles.block_channels
        assert tiles.grid == (tiles.chunks * tiles.channel_blocks,)


@pytest.mark.gpu
def test_past_two_to_the_31(device) -> None:
    """Offsets past 2^31 elements: the last image of 2.2e9 elements is what it is alone."""
    x = torch.zeros(33, 64, 1024, 1024, dtype=torch.bfloat16, device=device).contiguous(
        memory_format=torch.channels_last
    )
    assert x.numel() > 2**31
    x[-1] = torch.randn(64, 1024, 1024, device=device)
    mean, invstd = kernels.bn_stats(x, RUNNING)
    last = x[-1:].double()
    torch.testing.assert_close(mean.double(), last.sum((0, 2, 3)) / (33 * 2**20), rtol=1e-5, atol=1e-8)
    variance = last.square().sum((0, 2, 3)) / (33 * 2**20) - mean.double().square()
    torch.testing.assert_close(invstd.double(), torch.rsqrt(variance + 1e-5), rtol=1e-5, atol=0)
    out = kernels.bn_apply(x, Norm(mean, invstd), None, True)[-1:].clone()
    torch.testing.assert_close(out, reference.bn_apply(x[-1:], Norm(mean, invstd), None, True))
    sums = kernels.bn_grad_stats(x, x, None, Norm(mean, invstd), False)
    torch.testing.assert_close(sums[0].double(), last.sum((0, 2, 3)), rtol=1e-4, atol=1e-2)
    grad_x = kernels.bn_grad_apply(x, x, Norm(mean, invstd), None, False)
    torch.testing.assert_close(grad_x[-1:], (x[-1:] * invstd[None, :, None, None]).to(x.dtype))


def image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mean: float = 0.5) -> Tensor:
    """Normally distributed, channels_last, every channel with a mean and a deviation of its own."""
    deviation = torch.linspace(0.5, 2, shape[1], device=device)[None, :, None, None]
    x = torch.randn(shape, device=device) * deviation + mean
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def check_every_pass(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    relu: bool,
    residual: bool,
    affine: bool = True,
    constant: bool = False,
    mean: float = 0.5,
) -> None:
    """All five passes, each given the results of the one before."""
    x, grad = image(shape, dtype, device, mean), image(shape, dtype, device)
    other = image(shape, dtype, device) if residual else None
    vectors = [torch.randn(shape[1], device=device) if affine else None for _ in range(2)]
    running = (torch.randn(shape[1], device=device), torch.rand(shape[1], device=device))
    count = x.numel() // shape[1]
    statistics = check("bn_stats", x, *running, 0.1, 1e-5)
    out = check("bn_apply", x, *statistics, *vectors, other, relu)
    saved = out if residual else None
    *sums, dz = check("bn_grad_stats", grad, x, saved, *statistics, *vectors, relu, terms=count)
    sums = [None, None] if constant else sums
    if residual:
        check("bn_grad_apply", dz, x, *statistics, *vectors, *sums, False)
    else:
        check("bn_grad_apply", grad, x, *statistics, *vectors, *sums, relu)


def check(op: str, *args: Any, terms: int = 1) -> Any:
    """The kernel's result, after the accuracy rule on every output and on every tensor given: the ``args`` are those
    of the op's schema."""
    ours, theirs = copy(args), copy(args)
    exact_args = [each.double() if isinstance(each, Tensor) else each for each in copy(args)]
    actual, baseline, exact = (
        getattr(module, op)(*packed(op, given))
        for module, given in ((kernels, ours), (reference, theirs), (reference, exact_args))
    )
    as_tuple = (actual, baseline, exact) if isinstance(actual, tuple) else ((actual,), (baseline,), (exact,))
    # A mean is a small sum of large numbers, and is moved into the running one.
    magnitude = exact_args[0].abs().max().item() if op == "bn_stats" and exact_args[0].isfinite().all() else None
    for index, (a, b, e) in enumerate(zip(*as_tuple, strict=True)):
        if a.numel() == 0 == b.numel():
            continue
        assert a.stride() == b.stride(), f"{op}: output {index} has strides {a.stride()}, not {b.stride()}"
        large = magnitude if index == 0 else None
        assert_at_most_twice(a, b, e, what=f"{op}: output {index}", terms=terms, magnitude=large)
    for index, (a, b, e) in enumerate(zip(ours, theirs, exact_args, strict=True)):
        if isinstance(a, Tensor):
            if a.dtype == torch.float64:  # running statistics: float32's digits are in them
                a, b = a.float(), b.float()
            large = magnitude if index == 1 else None
            assert_at_most_twice(a, b, e, what=f"{op}: argument {index}", magnitude=large)
    return actual


def copy(args: tuple[Any, ...]) -> list[Any]:
    """Tensors of one's own, where they are not broadcast, with the same strides."""
    return [each.clone() if isinstance(each, Tensor) and 0 not in each.stride() else each for each in args]
