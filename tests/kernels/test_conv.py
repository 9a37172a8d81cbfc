"""conv_bn_act in Triton against the reference in float64, its refusals, and its choice of tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet import kernels
from fused_resnet.arguments import ConvSettings
from fused_resnet.kernels import conv
from fused_resnet.kernels.conv_tiles import conv_tiles
from fused_resnet.ops import reference
from fused_resnet.ops.route import reasons as route_reasons
from tests.accuracy import assert_at_most_twice

# (image), filters, kernel, stride, padding, dilation: why
SHAPES = [
    ((1, 3, 20, 18), 16, (7, 7), (2, 2), (3, 3), (1, 1)),  # the stem: flat, 3 channels
    ((2, 16, 8, 8), 16, (3, 3), (1, 1), (1, 1), (1, 1)),  # CIFAR: flat, whole vectors
    ((1, 64, 9, 7), 64, (3, 3), (1, 1), (1, 1), (1, 1)),  # ResNet: by taps, even steps
    ((2, 64, 6, 5), 40, (1, 1), (1, 1), (0, 0), (1, 1)),  # pointwise
    ((2, 64, 7, 7), 32, (1, 1), (2, 2), (0, 0), (1, 1)),  # the projection: strided, not padded
    ((1, 16, 4, 4), 8, (1, 1), (1, 1), (1, 1), (1, 1)),  # 1x1 that is padded: not pointwise
    ((2, 37, 5, 6), 13, (3, 3), (1, 1), (1, 1), (1, 1)),  # prime channels and filters
    ((1, 131, 5, 5), 17, (3, 3), (1, 1), (1, 1), (1, 1)),  # by taps, the last step of each tap short
    ((1, 67, 5, 5), 130, (1, 1), (1, 1), (0, 0), (1, 1)),  # pointwise, uneven, several filter tiles
    ((2, 20, 11, 9), 12, (3, 2), (2, 1), (0, 3), (2, 3)),  # nothing symmetrical
    ((3, 48, 3, 3), 24, (3, 3), (1, 1), (0, 0), (1, 1)),  # one pixel of output
    ((1, 1, 6, 6), 1, (3, 3), (1, 1), (1, 1), (1, 1)),  # one channel, one filter
    ((11, 8, 17, 19), 96, (1, 3), (1, 1), (0, 1), (1, 1)),  # several row tiles, more than one group of them
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[Any, ...], dtype: torch.dtype, device) -> None:
    if kernels.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    check(*shape, dtype, device)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 70),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    filters=st.integers(1, 40),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_any_shape(device, batch, channels, size, filters, kernel, stride, padding) -> None:
    torch.manual_seed(0)
    check((batch, channels, *size), filters, kernel, stride, padding, (1, 1), torch.float16, device)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("residual, relu", [(True, False), (False, True), (False, False)])
def test_what_may_be_missing(scale: bool, shift: bool, residual: bool, relu: bool, device) -> None:
    shape = ((2, 16, 5, 5), 24, (3, 3), (1, 1), (1, 1), (1, 1))
    check(*shape, torch.float16, device, scale=scale, shift=shift, residual=residual, relu=relu)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[6]], ids=str)
def test_full_float32(shape: tuple[Any, ...], device) -> None:
    """Where TF32 is not allowed, no digit of float32 is dropped."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        check(*shape, torch.float32, device)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[9]], ids=str)
def test_64_bit_offsets(shape: tuple[Any, ...], device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "WIDE_ELEMENTS", 1)
    check(*shape, torch.float16, device)


def test_nan_and_infinity_pass(device) -> None:
    """A pixel reaches the outputs whose window it lies in, and the padding and the masked lanes reach none."""
    x, weight, *_ = tensors((1, 37, 8, 8), 13, (3, 3), (1, 1), (1, 1), (1, 1), torch.float32, device)
    x[0, 5, 2, 3] = float("nan")
    out = kernels.conv_bn_act(x, weight, None, None, None, ConvSettings(padding=(1, 1)), True)
    touched = torch.zeros(8, 8, dtype=torch.bool)
    touched[1:4, 2:5] = True
    assert torch.equal(out.isnan().all(1)[0].cpu(), touched) and torch.equal(out.isnan().any(1)[0].cpu(), touched)
    shift = torch.full((13,), float("-inf"), device=device)
    shift[3] = float("inf")
    x[0, 5, 2, 3] = 0
    out = kernels.conv_bn_act(x, weight, None, shift, None, ConvSettings(padding=(1, 1)), True)
    assert (out[:, 3] == float("inf")).all() and not out[:, [0, 12]].any()


def test_other_memory_formats(device) -> None:
    shape = ((2, 20, 6, 7), 12, (3, 3), (1, 1), (1, 1), (1, 1))
    x, weight, scale, shift, residual, *rest = tensors(*shape, torch.float16, device)
    expected = kernels.conv_bn_act(x, weight, scale, shift, residual, *rest)
    strided = torch.empty(24, device=device)[::2].copy_(scale)
    out = kernels.conv_bn_act(x, weight.contiguous(), strided, shift, residual.contiguous(), *rest)
    assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_bitwise_repeatable(device) -> None:
    args = tensors((4, 70, 9, 9), 33, (3, 3), (1, 1), (1, 1), (1, 1), torch.float16, device)
    first = kernels.conv_bn_act(*args)
    for _ in range(2 if kernels.INTERPRETED else 20):
        assert torch.equal(kernels.conv_bn_act(*args), first)


def test_reasons() -> None:
    """Each thing that it cannot do is named; several at once are all named."""
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 16, 3, 3).contiguous(memory_format=torch.channels_last)

    def reasons(**changed: Any) -> str:
        args = {"x": x, "conv_weight": weight, "scale": None, "shift": None, "residual": None} | changed
        settings = args.pop("settings", ConvSettings())
        arguments = (*args.values(), *settings, True)
        return "; ".join(route_reasons._conv_mismatches("conv_bn_act", arguments, kernels.why_not_conv))

    assert reasons() == ""
    assert "groups is 2; it takes 1" in reasons(settings=ConvSettings(groups=2))
    assert "conv_weight, (8, 15, 3, 3), takes 15 channels; x has 16" in reasons(conv_weight=weight[:, :15])
    assert "conv_weight is torch.float16" in reasons(conv_weight=weight.half())
    assert "conv_weight is empty" in reasons(conv_weight=weight[:0])
    assert "scale is (7,) on cpu; it takes (8,) on cpu" in reasons(scale=torch.ones(7))
    assert "residual is (2, 8, 6, 6) on cpu; it takes (2, 8, 4, 4)" in reasons(residual=torch.ones(2, 8, 6, 6))
    assert "the output would be 0 x 0" in reasons(settings=ConvSettings(dilation=(3, 3)))
    assert "shift is (8,) on meta" in reasons(shift=torch.ones(8, device="meta"))
    assert "it takes 4 dimensions each" in reasons(x=x[0])
    assert "neither x nor conv_weight" in reasons(x=x.contiguous(), conv_weight=weight.contiguous())
    assert "neither" not in reasons(x=x, conv_weight=weight.contiguous())
    bfloat16 = reasons(x=x.bfloat16(), conv_weight=weight.bfloat16())
    assert ("bfloat16" in bfloat16) == kernels.INTERPRETED
    both = reasons(settings=ConvSettings(groups=2), scale=torch.ones(7))
    assert "groups" in both and "scale" in both


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 2**33),
    filters=st.integers(1, 4096),
    channels=st.integers(1, 4096),
    taps=st.sampled_from([1, 9, 49]),
    element_bytes=st.sampled_from([2, 4]),
    multiprocessors=st.integers(1, 200),
    pointwise=st.booleans(),
)
def test_tiles_fit(rows, filters, channels, taps, element_bytes, multiprocessors, pointwise) -> None:
    pointwise = pointwise and taps == 1
    tiles = conv_tiles(rows, filters, channels, taps, element_bytes, multiprocessors, pointwise=pointwise)
    assert (tiles.rows + tiles.filters) * tiles.depth * element_bytes * tiles.stages <= 99 * 1024
    assert min(tiles.rows, tiles.filters, tiles.depth) >= 16  # what a matrix instruction takes
    assert not (tiles.flat and pointwise)


def test_tiles_fill_the_device() -> None:
    """Large tiles where there are enough of them; small ones where one image has few pixels; no wasted filters."""
    large = conv_tiles(256 * 28 * 28, 512, 128, 1, 2, 132, pointwise=True)
    assert (large.rows, large.filters) == (128, 128)
    narrow = conv_tiles(256 * 56 * 56, 64, 64, 9, 2, 132)
    assert narrow.filters == 64
    one_image = conv_tiles(7 * 7, 512, 512, 9, 2, 132)
    assert -(-49 // one_image.rows) * -(-512 // one_image.filters) > 32
    stem = conv_tiles(256 * 112 * 112, 64, 3, 49, 2, 132)
    assert stem.flat and stem.depth * -(-147 // stem.depth) == 160  # by taps it would be 49 * 16 = 784 or more


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        ((8, 3, 224, 224), 64, (7, 7), (2, 2), (3, 3), (1, 1)),
        ((8, 64, 56, 56), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
        ((8, 64, 56, 56), 256, (1, 1), (1, 1), (0, 0), (1, 1)),
        ((8, 256, 56, 56), 512, (1, 1), (2, 2), (0, 0), (1, 1)),
        ((8, 512, 7, 7), 512, (3, 3), (1, 1), (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_bfloat16_against_cudnn(shape: tuple[Any, ...], device) -> None:
    """The shapes of ResNet-50, at most twice as far from float64 as cuDNN and separate passes."""
    check(*shape, torch.bfloat16, device)


@pytest.mark.gpu
def test_past_two_to_the_31(device) -> None:
    """Offsets past 2^31 elements: the last of 33 images gives what it gives alone."""
    x = torch.randn(1, 64, 1024, 1024, device=device).bfloat16().expand(33, -1, -1, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    for kernel, padding in ((1, 0), (3, 1)):
        weight = torch.randn(16, 64, kernel, kernel, device=device).bfloat16()
        rest = (ConvSettings(padding=(padding, padding)), True)
        out = kernels.conv_bn_act(x, weight, None, None, None, *rest)
        alone = kernels.conv_bn_act(x[:1].contiguous(memory_format=torch.channels_last), weight, *[None] * 3, *rest)
        assert torch.equal(out[-1:], alone)


def tensors(
    shape: tuple[int, ...],
    filters: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Any]:
    """The arguments of conv_bn_act, everything channels_last, the outputs around 1."""
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    fan_in = shape[1] * kernel[0] * kernel[1]
    weight = (torch.randn(filters, shape[1], *kernel, device=device) / fan_in**0.5).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    scale, shift = (torch.randn(filters, device=device) for _ in range(2))
    settings = ConvSettings(stride, padding, dilation)
    out = torch.nn.functional.conv2d(x.to("meta"), weight.to("meta"), None, *settings)
    residual = torch.randn(out.shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return [x, weight, scale, shift, residual, settings, True]


def check(
    shape: tuple[int, ...],
    filters: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    scale: bool = True,
    shift: bool = True,
    residual: bool = True,
    relu: bool = True,
) -> None:
    args = tensors(shape, filters, kernel, stride, padding, dilation, dtype, device)
    for index, wanted in ((2, scale), (3, shift), (4, residual)):
        args[index] = args[index] if wanted else None
    args[-1] = relu
    actual, baseline = kernels.conv_bn_act(*args), reference.conv_bn_act(*args)
    exact = reference.conv_bn_act(*(each.double() if isinstance(each, Tensor) else each for each in args))
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_at_most_twice(actual, baseline, exact, what="out")
