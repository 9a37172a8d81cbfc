"""bn_apply_pool, bn_pool_grad_stats and bn_pool_grad_apply in Triton against the reference, it against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import kernels
from fused_resnet.arguments import Norm, PoolSettings
from fused_resnet.ops import reference
from fused_resnet.ops.reference.pool import window_corners
from tests.accuracy import assert_at_most_twice

STEM = PoolSettings((3, 3), (2, 2), (1, 1))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (x), kernel_size, stride, padding: why
SHAPES = [
    ((2, 64, 8, 8), (3, 3), (2, 2), (1, 1)),  # the stem of a ResNet
    ((1, 17, 9, 7), (3, 3), (2, 2), (1, 1)),  # odd sizes, a prime number of channels
    ((2, 5, 6, 6), (2, 2), (2, 2), (0, 0)),  # windows that do not overlap
    ((1, 8, 7, 9), (3, 2), (1, 3), (1, 0)),  # nothing symmetrical; pixels in no window
    ((3, 130, 3, 3), (3, 3), (2, 2), (1, 1)),  # two blocks of channels
    ((1, 1, 2, 2), (3, 3), (2, 2), (1, 1)),  # an image smaller than the window
    ((5, 8, 31, 29), (3, 3), (2, 2), (1, 1)),  # several tiles of rows
]


def tensors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Norm]:
    x = torch.randn(shape).to(dtype).to(device).contiguous(memory_format=torch.channels_last)
    channels = shape[1]
    vectors = (torch.randn(channels) * 0.3, torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels))
    return x, Norm(*(vector.to(device) for vector in vectors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, kernel_size, stride, padding", SHAPES, ids=str)
def test_shapes(shape, kernel_size, stride, padding, dtype: torch.dtype, device) -> None:
    x, norm = tensors(shape, dtype, device)
    window = PoolSettings(kernel_size, stride, padding)
    wide = Norm(*(vector.double() for vector in norm))
    out, place = kernels.bn_apply_pool(x, norm, window)
    baseline, _ = reference.bn_apply_pool(x, norm, window)
    exact, _ = reference.bn_apply_pool(x.double(), wide, window)
    assert_at_most_twice(out, baseline, exact, what="output")
    assert out.is_contiguous(memory_format=torch.channels_last) and place.dtype == torch.uint8
    # Rounding may make another of a window the first of equals: what the places point at is the maximum all the same.
    top, left = window_corners(place, window)
    index = (place.long() // kernel_size[1] + top) * shape[3] + place.long() % kernel_size[1] + left
    activation = reference.bn_apply(x, norm, None, True)
    pointed_at = activation.flatten(2).gather(2, index.flatten(2)).view(out.shape)
    torch.testing.assert_close(pointed_at, out, rtol=torch.finfo(dtype).eps, atol=1e-6)

    grad = torch.randn(out.shape).to(dtype).to(device).contiguous(memory_format=torch.channels_last)
    sums = torch.randn(2, shape[1], device=device).unbind()
    arguments = (grad, place, x)
    for index, results in enumerate(
        zip(
            kernels.bn_pool_grad_stats(*arguments, norm, window),
            reference.bn_pool_grad_stats(*arguments, norm, window),
            reference.bn_pool_grad_stats(grad.double(), place, x.double(), wide, window),
            strict=True,
        )
    ):
        assert_at_most_twice(*results, what=f"sum {index}", terms=x.numel() // shape[1])
    for given in (sums, None):
        exact_sums = None if given is None else tuple(vector.double() for vector in given)
        assert_at_most_twice(
            kernels.bn_pool_grad_apply(*arguments, norm, given, window),
            reference.bn_pool_grad_apply(*arguments, norm, given, window),
            reference.bn_pool_grad_apply(grad.double(), place, x.double(), wide, exact_sums, window),
            what="gradient",
        )


@pytest.mark.parametrize("shape, kernel_size, stride, padding", SHAPES, ids=str)
def test_the_reference_is_what_pytorch_does(shape, kernel_size, stride, padding) -> None:
    x, norm = tensors(shape, torch.float64, torch.device("cpu"))
    norm = Norm(*(vector.double() for vector in norm))
    mean, invstd, weight, bias = norm
    window = PoolSettings(kernel_size, stride, padding)
    x.requires_grad_()
    z = (x - mean[:, None, None]) * (invstd * weight)[:, None, None] + bias[:, None, None]
    expected = F.max_pool2d(F.relu(z), *window)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    out, place = reference.bn_apply_pool(x.detach(), norm, window)
    torch.testing.assert_close(out, expected.detach())
    actual = reference.bn_pool_grad_apply(grad, place, x.detach(), norm, None, window)
    torch.testing.assert_close(actual, expected_grad)


def test_the_first_of_equal_maxima_and_nan(device) -> None:
    """As PyTorch: of equals the first, and a NaN is the maximum of every window it lies in."""
    x = torch.zeros(1, 2, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    x[0, 0] = 1.0
    x[0, 1, 2, 2] = float("nan")
    norm = Norm(torch.zeros(2, device=device), torch.ones(2, device=device))
    out, place = kernels.bn_apply_pool(x, norm, STEM)
    expected, index = F.max_pool2d(F.relu(x), 3, 2, 1, return_indices=True)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out[0, 0], expected[0, 0])
    assert torch.equal(place, reference.bn_apply_pool(x, norm, STEM)[1])
    assert index[0, 1, 1, 1] == 12 and place[0, 1, 1, 1] == 4


def test_bitwise_repeatable(device) -> None:
    x, norm = tensors((4, 40, 13, 11), torch.float16, device)
    window = STEM
    out, place = kernels.bn_apply_pool(x, norm, window)
    first = kernels.bn_pool_grad_stats(out, place, x, norm, window)
    for _ in range(2 if kernels.INTERPRETED else 20):
        again = kernels.bn_pool_grad_stats(out, place, x, norm, window)
        assert all(map(torch.equal, first, again))
