"""The global average pooling of the cuda backend against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cuda.cases import DTYPES, SHAPES, call, channels_last, check, image, misaligned, same_bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 512, 7, 7), (7, 40, 1, 1), (2, 2056, 2, 3)], ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, device) -> None:
    x = image(shape, dtype, device)
    out = check("avgpool", x, magnitude=None if dtype != torch.float32 else x.abs().max().item())
    assert out.shape == (*shape[:2], 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_stay_apart(dtype: torch.dtype, device) -> None:
    """Each image is a number of its own in each channel: the mean is that number, exactly."""
    values = (torch.arange(5)[:, None] * 32 + torch.arange(24)[None]).to(device, dtype)
    x = channels_last(values[:, :, None, None].expand(5, 24, 4, 8))
    assert torch.equal(call("avgpool", x)[:, :, 0, 0], values)


def test_more_images_than_a_grid_has_rows(device) -> None:
    """65,535 blocks in y: the images beside them are second ones of the first blocks, which must not begin to write
    what is still being added up. Sums of small integers are exact."""
    x = channels_last(torch.randint(-8, 9, (65541, 1, 2, 1)).to(device, torch.float32))
    assert torch.equal(call("avgpool", x), x.mean((2, 3), keepdim=True))


def test_a_sum_that_float16_could_not_hold(device) -> None:
    x = channels_last(torch.full((1, 16, 10, 10), 6e4, dtype=torch.float16, device=device))
    x[:, 3] *= -1
    assert torch.equal(call("avgpool", x), x[:, :, :1, :1])


@pytest.mark.parametrize("channels", [24, 13])
def test_nan_and_infinity_stay_in_their_channel_and_image(channels: int, device) -> None:
    x = image((3, channels, 5, 4), torch.float16, device)
    x[0, 1, 2, 2], x[1, 2, 0, 0], x[2, 3, 4, 3] = float("nan"), float("inf"), float("-inf")
    out = check("avgpool", x)
    assert out[0, 1].isnan() and out[1, 2] == float("inf") and out[2, 3] == float("-inf")
    assert out.isfinite().sum() == 3 * channels - 3


@pytest.mark.parametrize("elements", [1, 2, 4])
def test_misaligned(elements: int, device) -> None:
    x = image((2, 24, 7, 5), torch.float16, device)
    check("avgpool", misaligned(x, elements))
    wide = channels_last(torch.randn(3, 40, 7, 10).to(device, torch.float16))
    assert same_bits(call("avgpool", wide[1:, 8:32, :, ::2].copy_(x)), call("avgpool", x))


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 140), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 8),
)
def test_any_shape(device, shape, dtype, offset) -> None:
    torch.manual_seed(0)
    x = misaligned(image(shape, dtype, device), offset)
    check("avgpool", x, magnitude=x.abs().max().item() if dtype == torch.float32 else None)
