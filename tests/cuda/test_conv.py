"""conv_bn_act of the cuda backend: every tile and number of splits against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_resnet.ops.backends.cuda import conv as cuda_conv
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from tests.cuda.cases import (
    HALVES,
    call,
    channels_last,
    check,
    convolution,
    misaligned,
    same_bits,
    vectors,
)

TILES = (0, 1, 2)  # test_every_tile_is_tested says that there are no more

# image, filters, kernel, and what is not (1, 1), (0, 0), (1, 1): why
SHAPES: list[tuple[tuple[int, ...], int, tuple[int, int], dict[str, tuple[int, int]]]] = [
    ((1, 64, 8, 7), 64, (1, 1), {}),  # pointwise, a whole step; 56 pixels are less than any tile
    ((1, 8, 1, 1), 8, (1, 1), {}),  # the least there can be
    ((2, 72, 7, 7), 136, (1, 1), {}),  # a step of 8 channels behind a whole one; 8 filters behind 128
    ((2, 16, 9, 9), 24, (1, 1), {"stride": (2, 2)}),  # a projection
    ((1, 64, 7, 9), 64, (3, 3), {"padding": (1, 1)}),  # layer1, rectangular
    ((2, 8, 9, 8), 16, (3, 3), {"stride": (2, 2), "padding": (1, 1)}),  # the first of a stage
    ((1, 8, 13, 11), 8, (7, 7), {"stride": (2, 2), "padding": (3, 3)}),  # a stem's window
    ((1, 24, 11, 9), 40, (3, 3), {"padding": (2, 2), "dilation": (2, 2)}),  # dilated
    ((2, 16, 10, 6), 8, (3, 2), {"stride": (1, 2), "padding": (0, 3), "dilation": (2, 1)}),  # nothing symmetrical
    ((3, 40, 3, 3), 24, (3, 3), {}),  # one pixel of output
    ((1, 8, 17, 15), 8, (1, 1), {"padding": (1, 1)}),  # padded though pointwise: the border is shift alone
    ((3, 8, 11, 13), 8, (3, 1), {"padding": (1, 0)}),  # 429 pixels: several tiles of them, the last one short
]


def identify(value: Any) -> str:
    return str(value).replace(" ", "")


@pytest.fixture
def use_choice(monkeypatch: pytest.MonkeyPatch):
    """A function after which every convolution takes this tile and these splits."""

    def use(tile: int, splits: int) -> None:
        def choice(x_shape: Any, weight_shape: Any, settings: Any, device: int, _: Any) -> Any:
            kernels, (filters, _, *kernel_size) = cuda_launch.kernels(), weight_shape
            place = kernels.Place(*x_shape, cuda_launch.extension.DType.float16, device, 0)
            shape = kernels.ConvShape(place, filters, kernel_size, *settings[:3])
            chosen = kernels.ConvChoice(tile, splits)
            return shape, chosen, kernels.conv_workspace_bytes(shape, chosen)

        monkeypatch.setattr(cuda_conv, "_conv_choice", choice)

    return use


def test_every_tile_is_tested(device) -> None:
    assert tuple(range(cuda_launch.kernels().CONV_TILES)) == TILES


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_shapes(shape: Any, dtype: torch.dtype, device) -> None:
    """With the tile and splits that are chosen."""
    image, filters, kernel, sizes = shape
    check("conv_bn_act", *convolution(image, filters, kernel, dtype, device, **sizes))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_every_tile_and_split(shape: Any, tile: int, device, use_choice) -> None:
    """One split, two, three, as many as steps, and more: a split that would be empty is not launched."""
    image, filters, kernel, sizes = shape
    args = convolution(image, filters, kernel, torch.float16, device, **sizes)
    steps = kernel[0] * kernel[1] * -(-image[1] // 64)
    for splits in sorted({1, 2, 3, steps, steps + 1}):
        if splits <= steps + 1:
            use_choice(tile, splits)
            check("conv_bn_act", *args)


@pytest.mark.parametrize("splits", [1, 2, 4, 7, 9, 13])
def test_splits_that_do_not_divide_the_steps(splits: int, device, use_choice) -> None:
    """9 taps in 2 steps each: 18 steps, of which the last split has 2 of 10, 3 of 5, ..., or as many as the others."""
    use_choice(2, splits)
    sizes = {"padding": (1, 1)}
    check("conv_bn_act", *convolution((1, 72, 5, 6), 72, (3, 3), torch.bfloat16, device, **sizes))


@pytest.mark.parametrize("tile", TILES)
def test_tiles_give_the_same_bits(tile: int, device, use_choice) -> None:
    """Of one split: each sums over the same steps in the same order."""
    args = convolution((2, 72, 7, 5), 136, (3, 3), torch.float16, device, padding=(1, 1))
    use_choice(0, 1)
    expected = call("conv_bn_act", *args)
    use_choice(tile, 1)
    assert same_bits(call("conv_bn_act", *args), expected)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_what_may_be_missing(scale: bool, shift: bool, residual: bool, relu: bool, splits: int, device, use_choice):
    use_choice(2, splits)
    args = convolution((2, 16, 5, 5), 24, (3, 3), torch.float16, device, padding=(1, 1), relu=relu)
    for index, wanted in ((2, scale), (3, shift), (4, residual)):
        args[index] = args[index] if wanted else None
    out = check("conv_bn_act", *args)
    assert (out < 0).any() != relu


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_spoiled_pixel_spoils_what_sees_it(value: float, splits: int, dtype: torch.dtype, device, use_choice) -> None:
    """And nothing else: not through the padding, not through the channels that fill up a step, not through a tile."""
    use_choice(2, splits)
    for sizes in ({"padding": (1, 1)}, {"padding": (2, 2), "dilation": (2, 2)}, {"stride": (2, 2), "padding": (1, 1)}):
        args = convolution((2, 72, 9, 8), 40, (3, 3), dtype, device, relu=False, **sizes)
        for place in ((0, 71, 0, 7), (1, 0, 5, 4), (1, 40, 8, 0)):
            x = args[0].clone()
            x[place] = value
            out = check("conv_bn_act", x, *args[1:])
            pixels = torch.zeros(2, 1, 9, 8)
            pixels[place[0], 0, place[2], place[3]] = 1
            seen = F.conv2d(pixels, torch.ones(1, 1, 3, 3), None, *args[5:8]).bool().expand(out.shape)
            assert torch.equal(~out.isfinite().cpu(), seen)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_spoiled_filter_spoils_its_channel(splits: int, device, use_choice) -> None:
    use_choice(0, splits)
    args = convolution((1, 72, 5, 4), 136, (3, 3), torch.float16, device, padding=(1, 1), relu=False)
    args[1][131, 71, 2, 2] = float("nan")
    out = call("conv_bn_act", *args)
    assert out[0, 131, :4, :3].isnan().all()  # elsewhere it meets the padding, and torch is of two minds about 0 * NaN
    assert out[:, :131].isfinite().all() and out[:, 132:].isfinite().all()


def test_nan_passes_the_relu_and_zero_has_no_sign(device) -> None:
    x, weight, scale, shift, _, *rest = convolution((1, 8, 4, 4), 8, (1, 1), torch.float16, device)
    shift[:4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0], device=device)
    scale[3] = -0.0
    out = check("conv_bn_act", x, weight, scale, shift, None, *rest)
    assert out[:, 0].isnan().all() and (out[:, 1] == float("inf")).all() and not out[:, 2:4].any()
    assert not out[:, 3].signbit().any()


def test_padding_is_zero_whatever_lies_beside_the_image(device) -> None:
    """x is a slice of NaN, in memory before and behind it."""
    args = convolution((1, 16, 5, 6), 16, (3, 3), torch.float16, device, padding=(2, 2), dilation=(2, 2))
    surroundings = torch.full((3, 5, 6, 16), float("nan"), dtype=torch.float16, device=device).permute(0, 3, 1, 2)
    inside = surroundings[1:2]
    inside.copy_(args[0])
    assert inside.data_ptr() % 16 == 0 and inside.is_contiguous(memory_format=torch.channels_last)
    out = check("conv_bn_act", inside, *args[1:])
    assert out.isfinite().all()


def test_a_sum_that_float16_could_not_hold(device) -> None:
    """576 products of 120 * 1: sums stay float32 between the taps and between the splits."""
    x = channels_last(torch.full((1, 64, 5, 5), 120.0, dtype=torch.float16, device=device))
    weight = channels_last(torch.ones(8, 64, 3, 3, dtype=torch.float16, device=device))
    scale = torch.full((8,), 0.5, device=device)
    out = call("conv_bn_act", x, weight, scale, None, None, [1, 1], [0, 0], [1, 1], 1, True)
    assert (out == 576 * 60).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_sums_of_splits_are_not_rounded(splits: int, dtype: torch.dtype, device, use_choice) -> None:
    """2048 + 1 in the first step, which 16 bits would round, and -2048 in the second."""
    use_choice(2, splits)
    x = channels_last(torch.zeros(1, 128, 3, 3, dtype=dtype, device=device))
    x[:, 0], x[:, 1], x[:, 64] = 2048, 1, -2048
    weight = torch.ones(8, 128, 1, 1, dtype=dtype, device=device)
    out = call("conv_bn_act", x, weight, None, None, None, [1, 1], [0, 0], [1, 1], 1, False)
    assert (out == 1).all()


@pytest.mark.parametrize("elements", [1, 2, 4])
def test_misaligned(elements: int, device) -> None:
    """Starts 2, 4 and 8 bytes behind a multiple of 16: the same bits."""
    args = convolution((2, 16, 6, 7), 24, (3, 3), torch.float16, device, padding=(1, 1))
    expected = call("conv_bn_act", *args)
    for index in range(5):
        other = list(args)
        other[index] = misaligned(args[index], elements)
        assert same_bits(call("conv_bn_act", *other), expected), index


def test_other_memory_formats(device) -> None:
    x, weight, scale, shift, residual, *rest = convolution((2, 24, 6, 7), 16, (3, 3), torch.float16, device)
    expected = call("conv_bn_act", x, weight, scale, shift, residual, *rest)
    wide = channels_last(torch.randn(3, 40, 6, 14).to(device, torch.float16))
    sliced = wide[1:, 8:32, :, ::2].copy_(x)
    strided = torch.stack([scale, shift], dim=1)
    other = [sliced, weight.contiguous(), strided[:, 0], strided[:, 1].double(), residual.contiguous()]
    for index, tensor in enumerate(other):
        args = [x, weight, scale, shift, residual]
        args[index] = tensor
        out = call("conv_bn_act", *args, *rest)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert same_bits(out, expected), index
    wider = call("conv_bn_act", x, weight, scale, shift, residual.float(), *rest)
    assert same_bits(wider, expected)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 9).map(lambda eighth: 8 * eighth),
    filters=st.integers(1, 9).map(lambda eighth: 8 * eighth),
    size=st.tuples(st.integers(5, 10), st.integers(5, 10)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dtype=st.sampled_from(HALVES),
    tile=st.sampled_from(TILES),
    splits=st.integers(1, 4),
    offset=st.integers(0, 8),
    relu=st.booleans(),
)
def test_any_shape(device, use_choice, batch, channels, filters, size, kernel, dtype, tile, splits, offset, **sizes):
    torch.manual_seed(0)
    use_choice(tile, splits)
    args = convolution((batch, channels, *size), filters, kernel, dtype, device, **sizes)
    args[0], args[4] = misaligned(args[0], offset), misaligned(args[4], offset)
    check("conv_bn_act", *args)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_against_the_layers_of_an_evaluated_network(dtype: torch.dtype, device) -> None:
    """conv, batch norm with running statistics, add and ReLU as PyTorch's modules compute them."""
    args = convolution((2, 64, 7, 6), 72, (3, 3), dtype, device, padding=(1, 1))
    mean, (weight, bias) = vectors(72, device, 1)[0], vectors(72, device)
    variance = torch.rand(72).to(device) + 0.5
    scale = weight / (variance + 1e-5).sqrt()
    args[2], args[3] = scale, bias - mean * scale
    out = check("conv_bn_act", *args)
    y = F.conv2d(args[0].double(), args[1].double(), None, 1, 1)
    z = F.batch_norm(y, mean.double(), variance.double(), weight.double(), bias.double()) + args[4].double()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), F.relu(z), rtol=unit, atol=4e-5)
