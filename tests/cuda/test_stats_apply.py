"""bn_stats_apply of the cuda backend, one cooperative launch, against the reference in float64 and against two ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet.ops import BackendError, use_backend
from fused_resnet.ops.backends import cuda
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from fused_resnet.ops.route import choose, reasons
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
    mask_bits,
    misaligned,
    use_small_machine,
    vectors,
)

NAN, INFINITY = float("nan"), float("inf")
FORMS = [(False, False), (True, False), (True, True)]  # ReLU, mask


def check_forms(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Every form of the op; the result of the last."""
    for relu, with_mask in FORMS:
        running = [torch.rand(x.shape[1]).to(x.device) for _ in range(2)]
        out, mask, *_ = check("bn_stats_apply", x, *running, 0.1, 1e-5, weight, bias, residual, relu, with_mask)
        assert (mask.numel() > 0) == with_mask
    bits = mask_bits(mask, x)
    assert (out[~bits] == 0).all() and bits[out > 0].all()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_every_form(shape: tuple[int, ...], with_residual: bool, dtype: torch.dtype, device) -> None:
    residual = image(shape, dtype, device) if with_residual else None
    check_forms(image(shape, dtype, device), residual, *vectors(shape[1], device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_many_blocks(dtype: torch.dtype, device) -> None:
    """One image of layer1: one slice of channels, and nearly 50 parts that wait for each other."""
    x = image(SHAPES[-1], dtype, device)
    check("bn_stats_apply", x, None, None, 0.1, 1e-5, *vectors(64, device), x, True, True)


@host_only
@pytest.mark.parametrize("multiprocessors", [3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 64, 37, 31),  # several layers for each block, in groups of four and what is left
        (1, 13, 41, 43),  # one element at a time
        (1, 12, 41, 43),  # vectors of 4 floats without a mask, one element with it
        (1, 512, 7, 9),  # two slices of channels, of 16-bit elements
    ],
    ids=str,
)
def test_several_layers_for_each_block(
    shape: tuple[int, ...], dtype: torch.dtype, multiprocessors: int, device, host, monkeypatch
) -> None:
    use_small_machine(host, monkeypatch, multiprocessors)
    if shape[1] == 512 and (dtype == torch.float32 and multiprocessors < 4):
        pytest.skip("four slices of channels need four multiprocessors")
    host.launches()
    check_forms(image(shape, dtype, device), image(shape, dtype, device), *vectors(shape[1], device))
    launches = host.launches()
    assert len(launches) == len(FORMS)
    for launch in launches:
        assert launch.cooperative and launch.grid[0] * launch.grid[1] <= multiprocessors


def test_equals_two_ops(device) -> None:
    """bn_stats and bn_apply_mask; what differs is the order in which rows are added up."""
    x, residual = (image((2, 72, 11, 13), torch.float32, device) for _ in range(2))
    weight, bias = vectors(72, device)
    out, mask, mean, invstd = call("bn_stats_apply", x, None, None, 0.1, 1e-5, weight, bias, residual, True, True)
    expected = call("bn_stats", x, None, None, 0.1, 1e-5)
    torch.testing.assert_close(mean, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(invstd, expected[1], rtol=1e-6, atol=0)
    # Of the same statistics the same bits.
    assert_same_bits(call("bn_apply_mask", x, mean, invstd, weight, bias, residual), (out, mask), x, "bn_apply_mask")


@pytest.mark.parametrize("mean", [1e4, -1e6])
@pytest.mark.parametrize("channels", [24, 13])
def test_mean_of_many_deviations(channels: int, mean: float, device) -> None:
    """A mean that is rounded to float32 is in the result, as it is in PyTorch's."""
    x = image((2, channels, 23, 11), torch.float32, device, mean)
    args = (x, *vectors(channels, device), 0.1, 1e-5, *vectors(channels, device), None, True, True)
    out, mask, mean_of_x, invstd = call("bn_stats_apply", *args)
    exact = by_reference("bn_stats", x.double(), None, None, 0.1, 1e-5)
    torch.testing.assert_close(mean_of_x.double(), exact[0], rtol=1e-7, atol=0)
    torch.testing.assert_close(invstd.double(), exact[1], rtol=2e-6, atol=0)
    expected = call("bn_apply_mask", x, mean_of_x, invstd, args[5], args[6], None)
    assert_same_bits(expected, (out, mask), x, "bn_apply_mask")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [24, 13])
def test_dead_channels(channels: int, dtype: torch.dtype, device) -> None:
    x = image((3, channels, 4, 5), dtype, device)
    x[:, 3] = 2.5
    weight, bias = vectors(channels, device)
    weight[[1, 5]], bias[1], bias[3], bias[5] = 0, 0.5, 0.25, -0.5
    running = [torch.zeros(channels, device=device) for _ in range(2)]
    out, mask, mean, invstd = call("bn_stats_apply", x, *running, 1.0, 1e-5, weight, bias, None, True, True)
    assert mean[3] == 2.5 and running[1][3] == 0 and invstd[3].item() == pytest.approx(1e-5**-0.5, rel=1e-6)
    assert (out[:, 1] == 0.5).all() and (out[:, 3] == 0.25).all() and (out[:, 5] == 0).all()
    bits = mask_bits(mask, x)
    assert bits[:, [1, 3]].all() and not bits[:, 5].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [24, 13])
def test_nan_and_infinity_stay_in_their_channel(channels: int, dtype: torch.dtype, device) -> None:
    x = image((2, channels, 4, 3), dtype, device)
    clean = call("bn_stats_apply", x, None, None, 0.1, 1e-5, None, None, None, True, True)
    x[0, 1, 2, 2], x[1, 2, 0, 0], x[1, 3, 0, 0] = NAN, INFINITY, -INFINITY
    out, mask, mean, invstd = call("bn_stats_apply", x, None, None, 0.1, 1e-5, None, None, None, True, True)
    assert not mean[1:4].isfinite().any() and out[:, 1:4].isnan().all() and mask_bits(mask, x)[:, 1:4].all()
    others = [channel for channel in range(channels) if channel not in (1, 2, 3)]
    assert torch.equal(out[:, others], clean[0][:, others]) and torch.equal(invstd[others], clean[3][others])


def test_a_nan_residual_passes_the_relu(device) -> None:
    x = image((2, 24, 4, 3), torch.float16, device)
    residual = torch.zeros_like(x)
    residual[0, 5, 1, 1], residual[1, 6, 2, 0] = NAN, -INFINITY
    out, mask, *_ = check("bn_stats_apply", x, None, None, 0.1, 1e-5, None, None, residual, True, True)
    assert out[0, 5, 1, 1].isnan() and out.isnan().sum() == 1 and out[1, 6, 2, 0] == 0
    bits = mask_bits(mask, x)
    assert bits[0, 5, 1, 1] and not bits[1, 6, 2, 0]


@pytest.mark.parametrize("has_mean, has_var", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_what_may_be_missing(has_mean: bool, has_var: bool, weight: bool, bias: bool, device) -> None:
    x = image((2, 24, 5, 4), torch.float16, device)
    args = [vector if wanted else None for vector, wanted in zip(vectors(24, device), (weight, bias), strict=True)]
    running = [torch.rand(24).to(device) if has else None for has in (has_mean, has_var)]
    check("bn_stats_apply", x, *running, 0.1, 1e-5, *args, None, True, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_vectors_of_other_dtypes(dtype: torch.dtype, device) -> None:
    x = image((2, 24, 5, 4), torch.float16, device)
    weight, bias, running_mean = (vector.to(dtype) for vector in vectors(24, device, 3))
    check("bn_stats_apply", x, running_mean, running_mean.abs(), 0.3, 1e-5, weight, bias, x, True, True)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("elements", [1, 2, 4])
def test_misaligned(elements: int, shape: tuple[int, ...], device) -> None:
    x, residual = (image(shape, torch.float16, device) for _ in range(2))
    rest = (0.1, 1e-5, *vectors(shape[1], device))
    for first, second in ((misaligned(x, elements), residual), (x, misaligned(residual, elements))):
        check("bn_stats_apply", first, None, None, *rest, second, True, True)


FITTING = [
    ((1, 4232, 2, 2), torch.float16),  # 17 slices of vectors; 133 of single elements: more than multiprocessors
    ((1, 2304, 64, 64), torch.float16),
    ((64, 256, 14, 14), torch.float16),  # layer3 of ResNet-18
    ((1, 13, 199, 501), torch.float32),
]


@host_only
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("shape, dtype", FITTING, ids=str)
def test_what_fits_is_taken(shape: Any, dtype: torch.dtype, with_mask: bool, device, host) -> None:
    """What fits_on_chip says holds with and without a mask. Nothing runs: only the launch is asked for, of addresses
    that nobody reads."""
    assert cuda.fits_on_chip(torch.empty_strided(shape, (1, 1, 1, 1), dtype=dtype))
    kernels, address = cuda_launch.kernels(), 4096
    place = kernels.Place(*shape, cuda_launch.dtype_of(dtype), 0, 0)
    host.skip_launches(True)
    mask, statistics = address if with_mask else 0, (address, address, 0, 0)
    kernels.bn_stats_apply(place, address, 0, 0, 0, *statistics, 0.1, 1e-5, True, address, mask, address)
    assert len(host.launches()) == 1


@host_only
@pytest.mark.parametrize("shape", [(1, 324, 160, 125), (1, 2052, 56, 56)], ids=str)
def test_what_fits_only_with_a_mask_is_refused(shape: tuple[int, ...], device, host) -> None:
    """Single elements with a mask, without one vectors of 4, which are dealt out to fewer parts with larger shares."""
    assert not cuda.fits_on_chip(torch.empty_strided(shape, (1, 1, 1, 1), dtype=torch.float32))


def test_a_misaligned_slice_of_many_channels(device) -> None:
    """In single elements these would be more slices than a device has multiprocessors."""
    x = image((1, 4232, 2, 2), torch.float16, device)
    for first, second in ((misaligned(x), None), (x, misaligned(x))):
        check("bn_stats_apply", first, None, None, 0.1, 1e-5, None, None, second, True, True)


@host_only
def test_what_does_not_fit_is_refused_by_name_or_done_in_two_launches(device, host) -> None:
    x = channels_last(torch.zeros(1, 4232, 130, 40, dtype=torch.float16))
    args = (x, None, None, 0.1, 1e-5, None, None, None, True, False)
    assert not cuda.fits_on_chip(x)
    with pytest.raises(BackendError, match=r"bn_stats_apply: x, \(1, 4232, 130, 40\) torch.float16, does not fit in"):
        call("bn_stats_apply", *args)
    assert choose.why_not("cuda", "bn_stats_apply", *args)
    small = channels_last(torch.randn(1, 4232, 2, 2, dtype=torch.float16))
    assert not choose.why_not("cuda", "bn_stats_apply", small, *args[1:])
    with use_backend("auto"):
        assert choose.choose_automatically("bn_stats_apply", args) is not reasons.module("cuda")


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(
        st.integers(1, 4), st.sampled_from([1, 3, 4, 8, 12, 16, 31, 40, 129]), st.integers(1, 8), st.integers(1, 8)
    ),
    dtype=st.sampled_from(DTYPES),
    offsets=st.tuples(*[st.integers(0, 8)] * 2),
    with_residual=st.booleans(),
    affine=st.booleans(),
    form=st.sampled_from(FORMS),
)
def test_any_shape(device, shape, dtype, offsets, with_residual, affine, form) -> None:
    torch.manual_seed(0)
    x, residual = (misaligned(image(shape, dtype, device), offset) for offset in offsets)
    weight, bias, *running = vectors(shape[1], device, 4)
    pair = (weight, bias) if affine else (None, None)
    rest = (0.1, 1e-5, *pair, residual if with_residual else None, *form)
    check("bn_stats_apply", x, running[0], running[1].abs(), *rest)
