"""bn_grad_stats and bn_grad_apply of the cuda backend, with a mask of every kind, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_resnet.ops import reference
from tests.accuracy import assert_at_most_twice
from tests.cuda.cases import (
    DTYPES,
    SHAPES,
    SMALL,
    assert_same_bits,
    by_reference,
    call,
    channels_last,
    check,
    host_only,
    image,
    misaligned,
    same_bits,
    statistics,
    use_small_machine,
    vectors,
)

NAN, INFINITY = float("nan"), float("inf")


def check_sums(op: str, *args) -> list[Tensor]:
    """With the floor of sums that cancel: as many terms as rows, of the size of the largest."""
    x = args[1]
    return list(check(op, *args, terms=x.numel() // x.shape[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape: tuple[int, ...], dtype: torch.dtype, device) -> None:
    """No ReLU, a ReLU recomputed of x, the sign of out, out without a ReLU, and bits."""
    x, grad, residual = (image(shape, dtype, device) for _ in range(3))
    norm = (*statistics(x), *vectors(shape[1], device))
    out, mask = by_reference("bn_apply_mask", x, *norm, residual)
    check_sums("bn_grad_stats", grad, x, None, *norm, False)
    check_sums("bn_grad_stats", grad, x, None, *norm, True)
    dz = check_sums("bn_grad_stats", grad, x, out, *norm, False)[2]
    assert same_bits(dz, grad)
    sums = check_sums("bn_grad_stats", grad, x, out, *norm, True)
    assert torch.equal(sums[2], torch.where(out <= 0, 0, grad))
    alone = check_sums("bn_grad_stats_mask", grad, x, mask, *norm[:2], False)
    beside = check_sums("bn_grad_stats_mask", grad, x, mask, *norm[:2], True)
    assert alone[2].numel() == 0 and all(same_bits(a, b) for a, b in zip(alone[:2], beside[:2], strict=True))
    assert torch.equal(beside[2], torch.where(reference.unpack_mask(mask, x), grad, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("constant", [False, True])
def test_gradients(shape: tuple[int, ...], dtype: torch.dtype, constant: bool, device) -> None:
    x, grad, residual = (image(shape, dtype, device) for _ in range(3))
    norm = (*statistics(x), *vectors(shape[1], device))
    mask = by_reference("bn_apply_mask", x, *norm, residual)[1]
    for relu in (False, True):
        sums = [None, None] if constant else by_reference("bn_grad_stats", grad, x, None, *norm, relu)[:2]
        check("bn_grad_apply", grad, x, *norm, *sums, relu)
    sums = [None, None] if constant else by_reference("bn_grad_stats_mask", grad, x, mask, *norm[:2], False)[:2]
    alone, _ = check("bn_grad_apply_mask", grad, x, mask, *norm[:3], *sums, False)
    beside, dz = check("bn_grad_apply_mask", grad, x, mask, *norm[:3], *sums, True)
    assert same_bits(alone, beside)
    assert torch.equal(dz, torch.where(reference.unpack_mask(mask, x), grad, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_give_what_the_sign_of_the_output_gives(shape: tuple[int, ...], dtype: torch.dtype, device) -> None:
    """Bitwise, where the rounding of out to its dtype made no zero: the same numbers are added in the same order."""
    x, grad, residual = (image(shape, dtype, device) for _ in range(3))
    norm = (*statistics(x), *vectors(shape[1], device))
    out, mask = call("bn_apply_mask", x, *norm, residual)
    assert torch.equal(reference.unpack_mask(mask, x), out > 0)
    sum_dz, sum_dz_xhat, dz = call("bn_grad_stats", grad, x, out, *norm, True)
    of_bits = call("bn_grad_stats_mask", grad, x, mask, *norm[:2], True)
    assert same_bits(of_bits[2], dz)
    if shape[1] % 8 == 0 or shape[1] % 4:  # else bits take one element at a time and out four: another order
        assert same_bits(of_bits[0], sum_dz) and same_bits(of_bits[1], sum_dz_xhat)
    sums = (sum_dz, sum_dz_xhat)
    grad_x = call("bn_grad_apply", dz, x, *norm, *sums, False)
    grad_x_of_bits, dz_of_bits = call("bn_grad_apply_mask", grad, x, mask, *norm[:3], *sums, True)
    assert same_bits(grad_x_of_bits, grad_x) and same_bits(dz_of_bits, dz)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_bits_give_what_x_gives(shape: tuple[int, ...], dtype: torch.dtype, device) -> None:
    """Without a residual forward and backward compute the same z: its sign cannot come out differently."""
    x, grad = (image(shape, dtype, device) for _ in range(2))
    norm = (*statistics(x), *vectors(shape[1], device))
    mask = call("bn_apply_mask", x, *norm, None)[1]
    sums = call("bn_grad_stats", grad, x, None, *norm, True)[:2]
    of_bits = call("bn_grad_stats_mask", grad, x, mask, *norm[:2], False)[:2]
    if shape[1] % 8 == 0 or shape[1] % 4:
        assert all(same_bits(a, b) for a, b in zip(sums, of_bits, strict=True))
    grad_x = call("bn_grad_apply", grad, x, *norm, *sums, True)
    assert same_bits(call("bn_grad_apply_mask", grad, x, mask, *norm[:3], *sums, False)[0], grad_x)


@host_only
@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [64, 13, 12, 520])
def test_more_tiles_than_parts(channels: int, dtype: torch.dtype, multiprocessors: int, device, host, monkeypatch):
    use_small_machine(host, monkeypatch, multiprocessors)
    shape = (1, channels, 97, 61) if channels < 64 else (1, channels, 37, 31) if channels == 64 else (1, 520, 17, 19)
    x, grad, residual = (image(shape, dtype, device) for _ in range(3))
    norm = (*statistics(x), *vectors(channels, device))
    out, mask = by_reference("bn_apply_mask", x, *norm, residual)
    *sums, dz = check_sums("bn_grad_stats", grad, x, out, *norm, True)
    check_sums("bn_grad_stats_mask", grad, x, mask, *norm[:2], True)
    check("bn_grad_apply", dz, x, *norm, *sums, False)
    check("bn_grad_apply", grad, x, *norm, *sums, True)
    check("bn_grad_apply_mask", grad, x, mask, *norm[:3], *sums, True)


@pytest.mark.parametrize("size", [1e4, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_small_gradients(size: float, dtype: torch.dtype, device) -> None:
    """1e-6 is among float16's subnormal numbers; sums of 1e4 are beyond float16."""
    x = image((2, 24, 9, 7), dtype, device)
    grad = (image(tuple(x.shape), torch.float32, device, mean=1.0) * size).to(dtype)
    norm = (*statistics(x), *vectors(24, device))
    sums = check_sums("bn_grad_stats", grad, x, None, *norm, True)[:2]
    check("bn_grad_apply", grad, x, *norm, *sums, True)
    mask = by_reference("bn_apply_mask", x, *norm, None)[1]
    check_sums("bn_grad_stats_mask", grad, x, mask, *norm[:2], True)
    _, dz = check("bn_grad_apply_mask", grad, x, mask, *norm[:3], *sums, True)
    assert torch.equal(dz, torch.where(reference.unpack_mask(mask, x), grad, 0))


@pytest.mark.parametrize("mean", [1e4, -1e6])
@pytest.mark.parametrize("channels", [24, 13])
def test_mean_of_many_deviations(channels: int, mean: float, device) -> None:
    x = image((2, channels, 9, 11), torch.float32, device, mean)
    grad = image(tuple(x.shape), torch.float32, device)
    norm = (*statistics(x), *vectors(channels, device))
    sums = check_sums("bn_grad_stats", grad, x, None, *norm, True)[:2]
    check("bn_grad_apply", grad, x, *norm, *sums, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [24, 13])
def test_dead_channels(channels: int, dtype: torch.dtype, device) -> None:
    """gamma 0 stops the gradient of x but not gamma's own; a ReLU that is always shut stops everything."""
    x, grad = image((2, channels, 5, 4), dtype, device), image((2, channels, 5, 4), dtype, device)
    norm = [*statistics(x), *vectors(channels, device)]
    weight, bias = norm[2:]
    weight[1], bias[1] = 0, 0.5
    weight[2], bias[2] = 1, -100
    sum_dz, sum_dz_xhat, _ = check_sums("bn_grad_stats", grad, x, None, *norm, True)
    assert sum_dz[2] == 0 and sum_dz_xhat[2] == 0 and sum_dz_xhat[1] != 0
    grad_x = check("bn_grad_apply", grad, x, *norm, sum_dz, sum_dz_xhat, True)
    assert not grad_x[:, 1:3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [24, 13])
def test_nan_lets_the_gradient_pass(channels: int, dtype: torch.dtype, device) -> None:
    """As in torch, whose ReLU shuts where its output is <= 0; a gradient that is not let through is 0, be it NaN."""
    x = image((2, channels, 4, 4), dtype, device)
    mean, invstd = statistics(x)
    x[0, 1, 2, 2], x[1, 2, 0, 0], x[1, 3, 0, 0] = NAN, INFINITY, -INFINITY
    grad = channels_last(torch.ones_like(x))
    grad[1, 3, 0, 0] = NAN
    out, mask = call("bn_apply_mask", x, mean, invstd, None, None, None)
    expected = torch.where(out <= 0, 0, grad)
    assert expected[0, 1, 2, 2] == 1 and expected[1, 2, 0, 0] == 1 and expected[1, 3, 0, 0] == 0
    dz = call("bn_grad_stats", grad, x, out, mean, invstd, None, None, True)[2]
    assert torch.equal(dz, expected)
    grad_x, dz = call("bn_grad_apply_mask", grad, x, mask, mean, invstd, None, None, None, True)
    assert torch.equal(dz, expected)
    assert_same_bits(grad_x, call("bn_grad_apply", grad, x, mean, invstd, None, None, None, None, True), x, "grad_x")
    check("bn_grad_apply", grad, x, mean, invstd, None, None, None, None, True)
    for sums in (
        call("bn_grad_stats", grad, x, None, mean, invstd, None, None, True)[:2],
        call("bn_grad_stats", grad, x, out, mean, invstd, None, None, True)[:2],
        call("bn_grad_stats_mask", grad, x, mask, mean, invstd, False)[:2],
    ):
        assert torch.equal(sums[0], expected.float().sum((0, 2, 3)))
        # dz * xhat of an x that is NaN or infinite: only its own channel notices, also where dz is 0 (0 * inf).
        assert sums[1].isfinite().tolist() == [channel not in (1, 2, 3) for channel in range(channels)]


@pytest.mark.parametrize("channels", [16, 13])
def test_gradient_at_zero_is_zero(channels: int, device) -> None:
    x = channels_last(torch.zeros(1, channels, 2, 3, device=device))
    x[:, ::2] = -0.0
    zero, one, grad = torch.zeros(channels, device=device), torch.ones(channels, device=device), torch.ones_like(x)
    mask = call("bn_apply_mask", x, zero, one, None, None, None)[1]
    assert not call("bn_grad_stats", grad, x, x, zero, one, None, None, True)[2].any()
    for sums in (
        call("bn_grad_stats", grad, x, x, zero, one, None, None, True)[:2],
        call("bn_grad_stats", grad, x, None, zero, one, None, None, True)[:2],
        call("bn_grad_stats_mask", grad, x, mask, zero, one, False)[:2],
    ):
        assert not torch.stack(sums).any()
    assert not call("bn_grad_apply", grad, x, zero, one, None, None, None, None, True).any()
    assert not call("bn_grad_apply_mask", grad, x, mask, zero, one, None, None, None, True)[0].any()


@pytest.mark.parametrize("with_dz", [True, False])
def test_one_sum_alone_means_constant_statistics(with_dz: bool, device) -> None:
    """As in the reference: both are needed."""
    x, grad = (image((2, 24, 5, 4), torch.float32, device) for _ in range(2))
    norm, (one,) = (*statistics(x), *vectors(24, device)), vectors(24, device, 1)
    check("bn_grad_apply", grad, x, *norm, one, None, True)
    mask = by_reference("bn_apply_mask", x, *norm, None)[1]
    check("bn_grad_apply_mask", grad, x, mask, *norm[:3], None, one, with_dz)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_vectors_of_other_dtypes(dtype: torch.dtype, device) -> None:
    x, grad = (image((2, 24, 5, 4), torch.float16, device) for _ in range(2))
    weight, bias = (vector.to(dtype) for vector in vectors(24, device))
    norm = (*statistics(x), weight, bias)
    sums = check_sums("bn_grad_stats", grad, x, None, *norm, True)[:2]
    check("bn_grad_apply", grad, x, *norm, *sums, True)


def test_vectors_that_are_not_dense(device) -> None:
    x, grad = (image((2, 24, 5, 4), torch.float32, device) for _ in range(2))
    norm = torch.stack([*statistics(x), *vectors(24, device)], dim=1)
    norm = [norm[:, index] for index in range(4)]
    sums = check_sums("bn_grad_stats", grad, x, None, *norm, True)[:2]
    pair = torch.stack(sums, dim=1)
    check("bn_grad_apply", grad, x, *norm, pair[:, 0], pair[:, 1], True)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_mask_that_is_not_dense(shape: tuple[int, ...], device) -> None:
    """A slice of a wider matrix, and one that starts at an odd address."""
    x, grad = (image(shape, torch.float16, device) for _ in range(2))
    norm = (*statistics(x), *vectors(shape[1], device))
    mask = call("bn_apply_mask", x, *norm, None)[1]
    wide = torch.full((mask.shape[0], mask.shape[1] + 5), 255, dtype=torch.uint8, device=device)
    slice_of_wide = wide[:, 2:-3].copy_(mask)
    for other in (misaligned(mask), slice_of_wide, mask.t().contiguous().t()):
        *sums, dz = call("bn_grad_stats_mask", grad, x, mask, *norm[:2], True)
        found = call("bn_grad_stats_mask", grad, x, other, *norm[:2], True)
        assert all(same_bits(a, b) for a, b in zip((*sums, dz), found, strict=True)), other.stride()
        expected = call("bn_grad_apply_mask", grad, x, mask, *norm[:3], *sums, True)
        found = call("bn_grad_apply_mask", grad, x, other, *norm[:3], *sums, True)
        assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True)), other.stride()


def test_other_memory_formats(device) -> None:
    """The gradient of the output and the output may lie in any way; the results lie as x does."""
    x, plain = (image((2, 24, 5, 6), torch.float32, device) for _ in range(2))
    norm = (*statistics(x), None, None)
    turned = plain.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    broadcast = torch.ones((), device=device).expand(plain.shape)  # what sum().backward() gives
    for grad in (plain.contiguous(), turned, broadcast, misaligned(plain)):
        *sums, dz = check_sums("bn_grad_stats", grad, x, plain.contiguous(), *norm, True)
        assert dz.is_contiguous(memory_format=torch.channels_last)
        check("bn_grad_apply", grad, x, *norm, *sums, True)
        mask = by_reference("bn_apply_mask", x, *norm, plain)[1]
        check("bn_grad_apply_mask", grad, x, mask, *norm[:3], *sums, True)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(
        st.integers(1, 4), st.sampled_from([1, 3, 4, 8, 12, 16, 31, 40, 129]), st.integers(1, 8), st.integers(1, 8)
    ),
    dtype=st.sampled_from(DTYPES),
    offsets=st.tuples(*[st.integers(0, 8)] * 3),
    affine=st.booleans(),
    constant=st.booleans(),
    with_dz=st.booleans(),
)
def test_any_shape(device, shape, dtype, offsets, affine, constant, with_dz) -> None:
    torch.manual_seed(0)
    x, grad, out = (misaligned(image(shape, dtype, device), offset) for offset in offsets)
    norm = (*statistics(x), *(vectors(shape[1], device) if affine else (None, None)))
    *sums, dz = check_sums("bn_grad_stats", grad, x, out, *norm, True)
    sums = [None, None] if constant else sums
    # Of few rows the gradient is what is left of three terms, each as large as the first: those are what is rounded.
    scale = norm[1] if norm[2] is None else norm[1] * norm[2]
    size = (scale.abs().max() * grad.float().abs().max()).item() if dtype == torch.float32 else None
    check("bn_grad_apply", dz, x, *norm, *sums, False, magnitude=size)
    check("bn_grad_apply", grad, x, *norm, *sums, True, magnitude=size)
    mask = by_reference("bn_apply_mask", x, *norm, out)[1]
    check_sums("bn_grad_stats_mask", grad, x, mask, *norm[:2], True)
    check("bn_grad_apply_mask", grad, x, mask, *norm[:3], *sums, with_dz, magnitude=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_batch_norm_itself(dtype: torch.dtype, device) -> None:
    """A whole step against nn.BatchNorm2d + residual + ReLU: output, every gradient, every buffer."""
    shape = (5, 24, 6, 7)
    x, residual, grad = (image(shape, dtype, device) for _ in range(3))
    weight, bias = vectors(24, device)

    def eager(wide: torch.dtype) -> list[Tensor]:
        # PyTorch's own parameters stay float32 beside 16-bit activations.
        norm = nn.BatchNorm2d(24, device=device, dtype=torch.float64 if wide == torch.float64 else torch.float32)
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
        inputs = [tensor.to(wide).requires_grad_() for tensor in (x, residual)]
        out = F.relu(norm(inputs[0]) + inputs[1])
        grads = torch.autograd.grad(out, [*inputs, norm.weight, norm.bias], grad.to(wide))
        return [out, *grads, norm.running_mean, norm.running_var]

    def ours(with_mask: bool) -> list[Tensor]:
        running_mean, running_var = torch.zeros(24, device=device), torch.ones(24, device=device)
        mean, invstd = call("bn_stats", x, running_mean, running_var, 0.1, 1e-5)
        norm = (mean, invstd, weight, bias)
        if with_mask:
            out, mask = call("bn_apply_mask", x, *norm, residual)
            sums = call("bn_grad_stats_mask", grad, x, mask, mean, invstd, False)[:2]
            grad_x, dz = call("bn_grad_apply_mask", grad, x, mask, mean, invstd, weight, *sums, True)
        else:
            out = call("bn_apply", x, *norm, residual, True)
            *sums, dz = call("bn_grad_stats", grad, x, out, *norm, True)
            grad_x = call("bn_grad_apply", dz, x, *norm, *sums, False)
        return [out, grad_x, dz, sums[1], sums[0], running_mean, running_var]

    names = ["out", "grad x", "grad residual", "grad weight", "grad bias", "running mean", "running var"]
    baseline, exact = eager(dtype), eager(torch.float64)
    for with_mask in (True, False):
        for name, actual, theirs, wide in zip(names, ours(with_mask), baseline, exact, strict=True):
            terms = 5 * 6 * 7 if name in ("grad weight", "grad bias") else 1
            assert_at_most_twice(actual, theirs, wide, what=name, terms=terms)
