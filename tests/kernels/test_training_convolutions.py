"""conv_stats, conv_grad_input, conv_grad_weight and bn_grad_coefficients in Triton against the reference in float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet import kernels
from fused_resnet.arguments import ConvSettings, Norm
from fused_resnet.kernels import training_tiles
from fused_resnet.kernels.device import chip_of
from fused_resnet.ops import reference
from tests.accuracy import assert_at_most_twice

MODULES = [
    sys.modules[f"fused_resnet.kernels.{name}"] for name in ("conv_stats", "conv_grad_input", "conv_grad_weight")
]

RUNNING = (None, None, 0.1, 1e-5)
"""Statistics that do not move."""

# (image), filters, kernel, stride, padding, dilation: why
SHAPES = [
    ((2, 16, 8, 8), 16, (3, 3), (1, 1), (1, 1), (1, 1)),  # CIFAR: whole vectors
    ((1, 64, 9, 7), 64, (3, 3), (1, 1), (1, 1), (1, 1)),  # ResNet: even steps
    ((2, 64, 6, 5), 40, (1, 1), (1, 1), (0, 0), (1, 1)),  # pointwise
    ((2, 32, 9, 7), 24, (3, 3), (2, 2), (1, 1), (1, 1)),  # stride 2, odd sizes: four phases of different sizes
    ((2, 32, 8, 6), 24, (3, 3), (2, 2), (1, 1), (1, 1)),  # stride 2, even sizes
    ((2, 64, 7, 8), 32, (1, 1), (2, 2), (0, 0), (1, 1)),  # the projection: three of four phases have no tap
    ((1, 3, 20, 18), 16, (7, 7), (2, 2), (3, 3), (1, 1)),  # the stem: flat, 3 channels
    ((2, 37, 5, 6), 13, (3, 3), (1, 1), (1, 1), (1, 1)),  # prime channels and filters
    ((1, 131, 5, 5), 67, (1, 1), (1, 1), (0, 0), (1, 1)),  # several tiles of columns, the last step short
    ((2, 20, 11, 9), 12, (3, 2), (2, 1), (0, 3), (2, 3)),  # nothing symmetrical
    ((2, 20, 9, 9), 12, (3, 3), (2, 2), (2, 2), (2, 2)),  # stride and dilation 2: a phase has all taps or none
    ((3, 24, 1, 1), 16, (3, 3), (2, 2), (1, 1), (1, 1)),  # one pixel: three phases have none at all
    ((1, 1, 6, 6), 1, (3, 3), (1, 1), (1, 1), (1, 1)),  # one channel, one filter
]
FIRST = SHAPES[:6]


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs that compute several tiles of rows one after the other, and depths that several programs share."""
    monkeypatch.setattr(training_tiles, "CHUNK_WAVES", 0.1)
    training_tiles.training_tiles.cache_clear()
    yield
    training_tiles.training_tiles.cache_clear()


class Case:
    """Random arguments of a convolution in training, the vectors away from 1 and 0."""

    def __init__(
        self,
        shape: tuple[int, ...],
        filters: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        mean: float = 0.3,
        gradient: float = 1.0,
    ) -> None:
        def image(size: Any, scale: float = 1.0, offset: float = 0.0) -> Tensor:
            values = torch.randn(size) * scale + offset
            return values.to(dtype).to(device).contiguous(memory_format=torch.channels_last)

        channels, depth = shape[1], shape[1] * kernel[0] * kernel[1]
        self.settings = ConvSettings(stride, padding, dilation)
        self.x = image(shape, offset=mean)
        self.weight = image((filters, channels, *kernel), depth**-0.5)
        vectors = (torch.randn(channels) * 0.2 + mean, torch.rand(channels) + 0.5)
        vectors += (torch.rand(channels) + 0.5, torch.randn(channels))
        self.norm = Norm(*(vector.to(device) for vector in vectors))
        arguments = (self.norm, RUNNING, self.settings, False)
        out = reference.conv_stats(self.x.float(), self.weight.float(), *arguments)
        self.y = out[0].to(dtype).contiguous(memory_format=torch.channels_last)
        self.dz = image(self.y.shape, gradient)
        self.residual = image(shape, gradient)
        self.count = self.y.numel() // filters
        sums = (torch.randn(2, filters) * gradient * self.count**0.5).to(device).unbind()
        behind = Norm(*reference.bn_stats(self.y, RUNNING), torch.rand(filters, device=device) + 0.5)
        self.coefficients = reference.bn_grad_coefficients(sums, behind, self.count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[Any, ...], dtype: torch.dtype, device) -> None:
    if kernels.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    check_everything(Case(*shape, dtype, device))


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    filters=st.integers(1, 40),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.just(1)),
)
def test_any_shape(device, batch, channels, size, filters, kernel, stride, padding, dilation) -> None:
    torch.manual_seed(0)
    if any(size[i] + 2 * padding[i] <= dilation[i] * (kernel[i] - 1) for i in (0, 1)):
        return  # the kernel is larger than the image
    check_everything(Case((batch, channels, *size), filters, kernel, stride, padding, dilation, torch.float16, device))


@pytest.mark.parametrize("shape", FIRST, ids=str)
def test_several_tiles_and_splits(shape: tuple[Any, ...], device, few_programs) -> None:
    """Partial results merged within a program, and the depth of the weight's gradient cut in splits."""
    (_, channels, *size), filters, *rest = shape
    check_everything(Case((5, min(channels, 24), *size), min(filters, 24), *rest, torch.float32, device))


@pytest.mark.parametrize("shape", [SHAPES[2], ((1, 136, 5, 5), 72, *SHAPES[2][2:])], ids=str)
def test_tensor_descriptors(shape: tuple[Any, ...], device, monkeypatch: pytest.MonkeyPatch, few_programs) -> None:
    """Pointwise convolutions where the chip copies tiles by itself: whole tiles, and rows and columns past the end."""
    chip = replace(chip_of(device), tma=True)
    if not kernels.INTERPRETED and not chip_of(device).tma:
        pytest.skip("this GPU has no such copies")
    described: list[object] = []
    for module in MODULES:
        describe = module.describe_rows
        monkeypatch.setattr(module, "chip_of", lambda device: chip)
        monkeypatch.setattr(module, "describe_rows", lambda *a, f=describe: described.append(a) or f(*a))
    check_everything(Case(*shape, torch.float16, device))
    assert len(described) == 2 * 2 + 3 * 2 + 3 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mean_of_many_deviations(dtype: torch.dtype, device, few_programs) -> None:
    """Sums of squares would lose every digit of y's variance here, and B * y + C those of the gradient."""
    case = Case((6, 32, 8, 8), 32, (1, 1), (1, 1), (0, 0), (1, 1), dtype, device)
    offset = torch.full((32,), 300.0, device=device)
    case.norm = case.norm._replace(bias=offset)  # every activation about 300, its deviation about 1
    case.y = reference.conv_stats(case.x, case.weight, case.norm, RUNNING, case.settings, False)[0]
    statistics = reference.bn_stats(case.y, RUNNING)
    assert (statistics[0].abs() * statistics[1]).median() > 50
    sums = torch.randn(2, 32, device=device).unbind()
    case.coefficients = reference.bn_grad_coefficients(sums, Norm(*statistics), case.count)
    check_everything(case)


def test_padding_is_of_the_activation(device) -> None:
    """relu(0 * scale + bias) is not 0: with a large bias, padding that went through the norm would be seen at once."""
    case = Case((1, 16, 3, 3), 16, (3, 3), (1, 1), (1, 1), (1, 1), torch.float32, device)
    case.norm = case.norm._replace(bias=torch.full((16,), 100.0, device=device))
    case.weight.fill_(1.0)
    y, _, _ = kernels.conv_stats(case.x, case.weight, case.norm, RUNNING, case.settings, False)
    assert (y[..., 0, 0] < 0.5 * y[..., 1, 1]).all()
    check_everything(case)


@pytest.mark.parametrize("gradient", [1e-6, 1e4])
def test_huge_and_tiny_gradients(gradient: float, device) -> None:
    check_everything(Case(*SHAPES[3], torch.float32, device, gradient=gradient))


def test_statistics_of_numbers_near_the_largest(device, few_programs) -> None:
    """Of all filters but one; a sum of products overflows in no order."""
    case = Case(*SHAPES[3], torch.float32, device)
    case.weight[1:] *= 1e37
    y, mean, invstd = kernels.conv_stats(case.x, case.weight, case.norm, RUNNING, case.settings, True)
    variance, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert variance[1:].min() > 1e70 and variance[0] < 1e3
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(invstd.double(), (variance + RUNNING[3]).rsqrt(), rtol=1e-5, atol=1e-44)


def test_dead_channels(device) -> None:
    """gamma = 0 behind the convolution, so no gradient; gamma = 0 in front, so every activation is relu(bias)."""
    case = Case(*SHAPES[0], torch.float32, device)
    case.norm[2][3:9] = 0
    case.coefficients[:3, 2:7] = 0
    check_everything(case)
    dw = kernels.conv_grad_weight(case.dz, case.y, case.coefficients, case.x, case.norm, case.weight, case.settings)
    assert not dw[2:7].any() and dw[7:].any()


def test_other_forms(device) -> None:
    """Constant statistics (no y), dy as it is (no coefficients), no statistics, no norm's weight or bias."""
    case = Case(*SHAPES[3], torch.float16, device)
    x, weight, norm, settings = case.x, case.weight, case.norm, case.settings
    for coefficients in (case.coefficients, None):
        terms = case.x.shape[0] * 63
        check("conv_grad_input", case.dz, None, coefficients, weight, x, norm, None, settings, terms=terms)
        check("conv_grad_weight", case.dz, None, coefficients, x, norm, weight, settings)
    y, mean, invstd = kernels.conv_stats(x, weight, norm, RUNNING, settings, False)
    assert mean.numel() == invstd.numel() == 0
    assert torch.equal(y, kernels.conv_stats(x, weight, norm, RUNNING, settings, True)[0])
    norm = Norm(*norm[:2])
    check("conv_stats", x, weight, norm, RUNNING, settings, True)
    check("conv_grad_weight", case.dz, case.y, case.coefficients, x, norm, weight, settings)
    filters = case.weight.shape[0]
    vectors = torch.rand(3, filters, device=device).unbind()
    check("bn_grad_coefficients", None, Norm(*vectors), 7.0)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[6], SHAPES[9]], ids=str)
def test_64_bit_offsets(shape: tuple[Any, ...], device, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        monkeypatch.setattr(module, "WIDE_ELEMENTS", 1)
    check_everything(Case(*shape, torch.float32, device))


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[7]], ids=str)
@pytest.mark.parametrize("fp32_precision", ["ieee"], indirect=True)
def test_full_float32(shape: tuple[Any, ...], device, fp32_precision: str) -> None:
    """Where TF32 is not allowed, no digit of float32 is dropped."""
    check_everything(Case(*shape, torch.float32, device))


def test_other_memory_formats(device) -> None:
    case, nchw = (Case(*SHAPES[0], torch.float32, device) for _ in range(2))
    for name in ("weight", "y", "dz", "residual"):
        setattr(nchw, name, getattr(case, name).contiguous())
    nchw.x, nchw.norm, nchw.coefficients = case.x, case.norm, case.coefficients
    for expected, actual in zip(everything(case, kernels), everything(nchw, kernels), strict=True):
        assert torch.equal(actual[1], expected[1]), expected[0]


def test_nan_reaches_what_it_should(device) -> None:
    """A pixel reaches the outputs whose window it lies in; a NaN in dz the pixels of its window."""
    case = Case((1, 37, 8, 8), 13, (3, 3), (1, 1), (1, 1), (1, 1), torch.float32, device)
    case.x[0, 5, 2, 3] = float("nan")
    case.dz[0, 5, 2, 3] = float("nan")
    touched = torch.zeros(8, 8, dtype=torch.bool)
    touched[1:4, 2:5] = True
    y, mean, _ = kernels.conv_stats(case.x, case.weight, case.norm, RUNNING, case.settings, True)
    assert torch.equal(y.isnan().all(1)[0].cpu(), touched) and mean.isnan().all()
    args = (case.dz, case.y, case.coefficients, case.weight, torch.zeros_like(case.x), None, None)
    grad, _, _ = kernels.conv_grad_input(*args, case.settings)
    assert torch.equal(grad.isnan().all(1)[0].cpu(), touched)


def test_bitwise_repeatable(device, few_programs) -> None:
    case = Case((4, 24, 7, 7), 17, (3, 3), (2, 2), (1, 1), (1, 1), torch.float16, device)
    first = everything(case, kernels)
    for _ in range(1 if kernels.INTERPRETED else 20):
        for (name, tensor), (_, again) in zip(first, everything(case, kernels), strict=True):
            assert torch.equal(tensor, again), name


@pytest.mark.gpu
@pytest.mark.parametrize("kernel, padding", [((1, 1), (0, 0)), ((3, 3), (1, 1))], ids=str)
def test_more_than_2_to_the_31_elements(kernel: tuple[int, int], padding: tuple[int, int], device) -> None:
    """The last of many images gets what it gets alone: no offset wraps around."""
    if kernels.INTERPRETED:
        pytest.skip("the interpreter would take days")
    alone = Case((1, 64, 512, 512), 64, kernel, (1, 1), padding, (1, 1), torch.bfloat16, device)
    images = 2**31 // alone.x.numel() + 2
    large = object.__new__(Case)
    vars(large).update(vars(alone))
    for name in ("x", "y", "dz", "residual"):
        image = getattr(alone, name)
        many = torch.zeros((images, *image.shape[1:]), dtype=image.dtype, device=device)
        many = many.to(memory_format=torch.channels_last)
        many[-1] = image[0]
        setattr(large, name, many)
    assert large.x.numel() > 2**31
    args = (alone.weight, alone.norm, RUNNING, alone.settings, False)
    y = kernels.conv_stats(large.x, *args)[0]
    assert torch.equal(y[-1], kernels.conv_stats(alone.x, *args)[0][0])
    results = []
    for case in (large, alone):
        gradient = (case.dz, case.y, case.coefficients)
        results.append(kernels.conv_grad_input(*gradient, case.weight, case.x, case.norm, None, case.settings)[0][-1])
    assert torch.equal(*results)


def everything(case: Case, module: Any) -> list[tuple[str, Tensor]]:
    """Every result of the three convolutions, with everything there and with less."""
    x, weight, norm, settings, residual = case.x, case.weight, case.norm, case.settings, case.residual
    wide = torch.promote_types(x.dtype, torch.float32)
    running = torch.linspace(-1, 1, weight.shape[0], device=x.device, dtype=wide), None
    running = running[0], running[0].abs() + 0.5
    gradient = (case.dz, case.y, case.coefficients)
    results = {
        "forward": module.conv_stats(x, weight, norm, (*running, 0.3, 1e-5), settings, True),
        "running": running,
        "forward, raw": module.conv_stats(x, weight, None, RUNNING, settings, True),
        "input": module.conv_grad_input(*gradient, weight, x, norm, None, settings),
        "input, residual": module.conv_grad_input(*gradient, weight, x, None, residual, settings)[:1],
        "weight": (module.conv_grad_weight(*gradient, x, norm, weight, settings),),
        "weight, raw": (module.conv_grad_weight(*gradient, x, None, weight, settings),),
    }
    return [(f"{name} {i}", tensor) for name, tensors in results.items() for i, tensor in enumerate(tensors)]


def check_everything(case: Case) -> None:
    exact_case = object.__new__(Case)
    vars(exact_case).update({name: widen(value) for name, value in vars(case).items()})
    actual, baseline, exact = everything(case, kernels), everything(case, reference), everything(exact_case, reference)
    wanted = dict(exact)
    for (name, tensor), (_, like) in zip(actual, baseline, strict=True):
        terms = case.count if name.startswith(("input 1", "input 2", "weight")) else 1
        size = magnitude(case, name, wanted)
        assert_at_most_twice(tensor, like, wanted[name], what=name, terms=terms, magnitude=size)


def magnitude(case: Case, name: str, exact: dict[str, Tensor]) -> float | None:
    """Of the numbers that are rounded, where they are not of the size of the result.

    y's mean is rounded with y, which changes its deviation. The weight's gradient is float32, but its operands were
    rounded to x's dtype."""
    if name.startswith("forward") and name.endswith("2"):
        mean, invstd = exact[name[:-1] + "1"], exact[name]
        return (invstd * (1 + mean.abs() * invstd)).max().item()
    if name.startswith("weight"):
        activation = 1.0 if name == "weight, raw 0" else max(case.norm[3].abs().max().item(), 1.0)
        rounding = torch.finfo(case.x.dtype).eps / torch.finfo(torch.float32).eps
        return (case.coefficients[0].abs().max() * case.dz.abs().max()).item() * activation * rounding
    return None


def check(op: str, *args: Any, terms: int = 1) -> None:
    def run(module: Any, arguments: Any) -> tuple[Tensor, ...]:
        results = getattr(module, op)(*arguments)
        return results if isinstance(results, tuple) else (results,)

    actual, baseline = run(kernels, args), run(reference, args)
    exact = run(reference, [widen(argument) for argument in args])
    for index, results in enumerate(zip(actual, baseline, exact, strict=True)):
        assert_at_most_twice(*results, what=f"{op} {index}", terms=terms if index else 1)


def widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return Norm(*map(widen, value)) if isinstance(value, Norm) else value
