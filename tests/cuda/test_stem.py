"""The whole stem of the cuda backend, of images and of bytes, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet.ops import reference
from tests.accuracy import assert_at_most_twice
from tests.cuda.cases import HALVES, call, channels_last, check, same_bits, vectors

NAN, INFINITY = float("nan"), float("inf")

# A tile is 7 x 8 pooled pixels, of about 28 x 32 pixels of the image.
SIZES = [
    (1, 1),  # one pixel, in the middle of every window
    (2, 3),
    (7, 5),  # all odd, smaller than a tile
    (28, 32),  # one tile, exactly
    (29, 33),  # one more pixel: 8 x 9 pooled, four tiles
    (64, 47),  # several tiles, the last ones short
    (13, 70),  # wide
    (70, 13),
]
IMAGENET = ([0.0171, 0.0175, 0.0174], [-2.118, -2.036, -1.804])
POWERS_OF_TWO = ([1 / 64, 1 / 32, 1 / 128], [-2.0, -4.0, 0.5])  # whose products and sums no rounding touches


def filters(dtype: torch.dtype, device: torch.device, count: int = 64) -> Tensor:
    return channels_last((torch.randn(count, 3, 7, 7) / 147**0.5).to(device, dtype))


def pixels(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def bytes_of_images(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(device)


def seen(shape: tuple[int, ...], place: tuple[int, int, int]) -> Tensor:
    """Which pooled pixels have (image, row, column) of x in a window, (N, H, W)."""
    image, row, column = place
    mark = torch.zeros(shape[0], 1, *shape[2:])
    mark[image, 0, row, column] = 1
    reached = F.conv2d(mark, torch.ones(1, 1, 7, 7), None, 2, 3)
    return F.max_pool2d(reached, 3, 2, 1)[:, 0] > 0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int], dtype: torch.dtype, device) -> None:
    for images in (1, 3):
        x = pixels((images, 3, *size), dtype, device)
        out = check("stem", x, filters(dtype, device), *vectors(64, device), None, None)
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("count", [128, 192])
def test_more_filters_than_a_block_has(count: int, dtype: torch.dtype, device) -> None:
    x = pixels((2, 3, 31, 35), dtype, device)
    check("stem", x, filters(dtype, device, count), *vectors(count, device), None, None)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_what_may_be_missing(scale: bool, shift: bool, device) -> None:
    given = [vector if wanted else None for vector, wanted in zip(vectors(64, device), (scale, shift), strict=True)]
    check("stem", pixels((1, 3, 17, 19), torch.float16, device), filters(torch.float16, device), *given, None, None)


@pytest.mark.parametrize("with_bytes", [True, False])
def test_strides(with_bytes: bool, device) -> None:
    """NCHW, NHWC, a slice, every other pixel, turned, one image for all, and four channels of which three are taken."""
    shape = (2, 3, 21, 18)
    x = bytes_of_images(shape, device) if with_bytes else pixels(shape, torch.float16, device)
    rest = (filters(torch.float16, device), *vectors(64, device), *(IMAGENET if with_bytes else (None, None)))
    expected = call("stem", x, *rest)
    wide = torch.zeros(3, 4, 23, 40, dtype=x.dtype, device=device)
    views = {
        "nhwc": channels_last(x),
        "slice": wide[1:, :3, 1:22, 3:21],
        "channels behind the first": wide[1:, 1:, 2:, :18],
        "every other pixel": wide[:2, :3, :21, ::2][..., :18],
        "four channels side by side": channels_last(wide)[1:, :3, 1:22, 3:21],
        "turned": torch.empty(2, 18, 21, 3, dtype=x.dtype, device=device).permute(0, 3, 2, 1),
    }
    for name, view in views.items():
        view.copy_(x)
        assert same_bits(call("stem", view, *rest), expected), name
    once = x[:1].expand(shape)
    assert same_bits(call("stem", once, *rest), expected[:1].expand(expected.shape))
    other = (rest[0].contiguous(), *torch.stack(rest[1:3], 1).unbind(1), *rest[3:])
    assert same_bits(call("stem", x, *other), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (29, 33), (30, 17)], ids=str)
def test_bytes_are_normalised_and_rounded_first(size: tuple[int, int], dtype: torch.dtype, device) -> None:
    """The same bits as of the normalised image: padded with 0 after that, not with what a byte 0 becomes."""
    x = bytes_of_images((2, 3, *size), device)
    rest = (filters(dtype, device), *vectors(64, device))
    for pixel_scale, pixel_shift in (POWERS_OF_TWO, IMAGENET):
        factor, offset = (torch.tensor(numbers, device=device)[:, None, None] for numbers in (pixel_scale, pixel_shift))
        normalised = (x.float() * factor + offset).to(dtype)
        out = call("stem", x, *rest, pixel_scale, pixel_shift)
        of_normalised = call("stem", normalised, *rest, None, None)
        # A GPU rounds a product and a sum together: then a pixel may be another number of 16 bits.
        if device.type == "cpu" or pixel_scale is POWERS_OF_TWO[0]:
            assert same_bits(out, of_normalised)
        exact = reference.stem(x, rest[0].double(), *(v.double() for v in rest[1:]), pixel_scale, pixel_shift)
        baseline = reference.stem(x, *rest, pixel_scale, pixel_shift)
        assert_at_most_twice(out, baseline, exact, what="stem of bytes")


def test_every_byte(device) -> None:
    """0 and 255 are the ends, and 128 is no negative number."""
    x = torch.arange(256, dtype=torch.uint8, device=device).repeat(3).view(1, 3, 16, 16)
    weight = torch.zeros(64, 3, 7, 7, dtype=torch.float16, device=device)
    for channel in range(3):
        weight[channel, channel, 3, 3] = 1
    out = call("stem", x, weight, None, None, [1.0, 0.5, 2.0], [0.0, 1.0, -10.0])
    centre = x[0, :, ::2, ::2].float()
    expected = F.max_pool2d(centre * torch.tensor([1.0, 0.5, 2.0], device=device)[:, None, None], 3, 2, 1)
    expected += torch.tensor([0.0, 1.0, -10.0], device=device)[:, None, None]
    assert torch.equal(out[0, :3].float(), expected.relu())


PLACES = [(0, 0, 0), (1, 0, 16), (1, 28, 15), (0, 13, 33), (1, 14, 17), (0, 15, 34), (1, 30, 32), (0, 29, 31)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_spoiled_pixel_spoils_what_sees_it(value: float, dtype: torch.dtype, device) -> None:
    """And nothing else, in every column of a tile and beside it: the kernel multiplies an eighth tap of each row of a
    filter, the pixel beside its window, by zero; and an infinite product in front of the ReLU may be no NaN."""
    weight = filters(dtype, device)
    assert weight.all()  # every tap spoils
    for place in PLACES:
        x = pixels((2, 3, 31, 35), dtype, device)
        clean = call("stem", x, weight, None, None, None, None)
        x[place[0], place[1] % 3, place[1], place[2]] = value
        out = call("stem", x, weight, None, None, None, None)
        where = seen(tuple(x.shape), place)[:, None].expand(out.shape).to(device)
        assert torch.equal(out[~where], clean[~where])
        if value != value:
            assert out[where].isnan().all()
            continue
        # In float64, as oneDNN makes NaN of some infinities in bfloat16.
        exact = reference.stem(x.double(), weight.double(), None, None, None, None)
        assert torch.equal(out.isposinf(), exact.isposinf()) and not out.isnan().any()


@pytest.mark.parametrize("column", range(34))
def test_the_eighth_tap_is_silent(column: int, device) -> None:
    """A column of infinities: exactly the columns of windows that hold it notice, in each of the rows of a filter."""
    x = pixels((1, 3, 15, 34), torch.float16, device)
    weight = filters(torch.float16, device).abs() + 0.01
    x[..., column] = INFINITY
    out = call("stem", x, weight, None, None, None, None)
    where = seen((1, 3, 15, 34), (0, 0, column)).any(1)[0].to(device)
    assert torch.equal(out.isposinf().all(dim=1)[0].all(0), where)
    assert torch.equal(~out.isfinite().all(dim=1)[0].all(0), where)


def test_a_spoiled_filter_spoils_its_channel(device) -> None:
    x, weight = pixels((2, 3, 20, 21), torch.float16, device), filters(torch.float16, device, 128)
    weight[70, 1, 3, 3] = NAN
    out = call("stem", x, weight, None, None, None, None)
    assert out[:, 70].isnan().all()
    assert out[:, :70].isfinite().all() and out[:, 71:].isfinite().all()


def test_nan_passes_and_zero_has_no_sign(device) -> None:
    """The largest of nine is found by bits: a NaN is above infinity, and nothing is below 0."""
    x, weight = pixels((1, 3, 20, 21), torch.float16, device), filters(torch.float16, device)
    scale, shift = vectors(64, device)
    shift[:4] = torch.tensor([NAN, INFINITY, -INFINITY, -0.0], device=device)
    scale[3] = -0.0
    shift[4] = -NAN
    out = check("stem", x, weight, scale, shift, None, None)
    assert out[:, [0, 4]].isnan().all() and (out[:, 1] == INFINITY).all() and not out[:, 2:4].any()
    assert not out[:, 3].signbit().any()


def test_results_that_are_too_large_for_float16(device) -> None:
    x, weight = pixels((1, 3, 20, 21), torch.float16, device), filters(torch.float16, device)
    scale = torch.full((64,), 3e4, device=device)
    out = check("stem", x, weight, scale, None, None, None)
    assert out.isposinf().any() and out.isfinite().any()


def test_padding_of_the_pooling_is_below_everything(device) -> None:
    """Where the convolution is negative all around, the ReLU gives 0, as the padding does; where it is positive, the
    padding must not add what a window beside the image would have given."""
    x = torch.zeros(1, 3, 9, 11, dtype=torch.float16, device=device)
    weight = filters(torch.float16, device)
    shift = torch.linspace(-1, 1, 64, device=device)
    out = call("stem", x, weight, None, shift, None, None)
    assert torch.equal(out, shift.relu().half()[None, :, None, None].expand(out.shape))


def test_images_stay_apart(device) -> None:
    """Each gives what it gives alone."""
    x, weight = pixels((3, 3, 40, 37), torch.bfloat16, device), filters(torch.bfloat16, device)
    out = call("stem", x, weight, *[None] * 4)
    for index in range(3):
        assert same_bits(out[index : index + 1], call("stem", x[index : index + 1], weight, *[None] * 4))


@pytest.mark.parametrize("elements", [1, 2, 4])
def test_misaligned(elements: int, device) -> None:
    x, weight = pixels((2, 3, 13, 12), torch.float16, device), filters(torch.float16, device)
    rest = vectors(64, device)

    def moved(tensor: Tensor) -> Tensor:
        buffer = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=device)
        return buffer[elements:].view(tensor.shape).copy_(tensor)

    expected = call("stem", x, weight, *rest, None, None)
    args = [x, weight, *rest]
    for index in range(4):
        other = list(args)
        other[index] = moved(args[index])
        assert same_bits(call("stem", *other, None, None), expected), index


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.integers(1, 2),
    size=st.tuples(st.integers(1, 45), st.integers(1, 45)),
    dtype=st.sampled_from(HALVES),
    last=st.booleans(),
    with_bytes=st.booleans(),
)
def test_any_size(device, images, size, dtype, last, with_bytes) -> None:
    torch.manual_seed(0)
    shape = (images, 3, *size)
    x: Any = bytes_of_images(shape, device) if with_bytes else pixels(shape, dtype, device)
    x = channels_last(x) if last else x
    check("stem", x, filters(dtype, device), *vectors(64, device), *(IMAGENET if with_bytes else (None, None)))
