"""The C++ convolutions of the CPU: against float64 by the accuracy rule, in every method, and what they promise."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import ConvSettings, PoolSettings
from fused_resnet.ops.backends.native import conv as native_conv
from fused_resnet.ops.backends.native.chain import Block, NativeChain
from fused_resnet.ops.backends.native.conv import NativeConv, average, max_pool, pooling_window, why_not_native
from tests.accuracy import EXTREMES, assert_at_most_twice, with_extremes

GEMM, WINOGRAD, GROUPED = "gemm", "winograd", "grouped"
# (method, images, channels, height, width, filters, kernel, stride, padding, dilation, groups)
CASES = {
    "1x1": (GEMM, 2, 64, 14, 14, 96, (1, 1), 1, 0, 1, 1),
    "1x1 stride 2": (GEMM, 1, 48, 15, 13, 64, (1, 1), 2, 0, 1, 1),
    "one pixel": (GEMM, 1, 33, 1, 1, 5, (1, 1), 1, 0, 1, 1),
    "stem": (GEMM, 2, 3, 33, 30, 64, (7, 7), 2, 3, 1, 1),
    "narrow, without padding": (GEMM, 1, 5, 9, 11, 20, (3, 2), 1, 0, 1, 1),
    "deep": (GEMM, 1, 600, 7, 7, 40, (3, 3), 2, 1, 1, 1),
    "rows with tiles of their own": (GEMM, 3, 32, 7, 7, 64, (3, 3), 2, 1, 1, 1),
    "padding beyond the kernel": (GEMM, 1, 16, 4, 4, 33, (3, 3), 2, 4, 1, 1),
    "dilated": (GEMM, 2, 24, 13, 12, 31, (3, 3), 1, 2, 2, 1),
    "wide groups": (GEMM, 2, 128, 9, 9, 128, (3, 3), 1, 1, 1, 4),
    "many filters": (GEMM, 2, 300, 9, 6, 1100, (1, 1), 1, 0, 1, 1),
    "more filters than pixels": (GEMM, 1, 40, 3, 2, 1100, (1, 1), 1, 0, 1, 1),
    "odd channels": (GEMM, 1, 37, 8, 9, 37, (3, 3), 2, 1, 1, 1),
    "3x3": (WINOGRAD, 2, 64, 28, 28, 64, (3, 3), 1, 1, 1, 1),
    "3x3, prime sizes": (WINOGRAD, 3, 32, 23, 19, 37, (3, 3), 1, 1, 1, 1),
    "3x3, deep": (WINOGRAD, 4, 528, 14, 14, 32, (3, 3), 1, 1, 1, 1),
    "3x3 without padding": (WINOGRAD, 2, 16, 30, 17, 16, (3, 3), 1, 0, 1, 1),
    "groups of 4": (GROUPED, 2, 128, 14, 15, 128, (3, 3), 1, 1, 1, 32),
    "groups of 8, stride 2": (GROUPED, 1, 64, 15, 28, 64, (3, 3), 2, 1, 1, 8),
    "groups of 16": (GROUPED, 2, 32, 7, 19, 32, (3, 3), 1, 1, 1, 2),
    "groups of 16, stride 2": (GROUPED, 1, 48, 14, 9, 48, (3, 3), 2, 2, 1, 3),
}
DTYPES = [torch.float32, torch.bfloat16]


class Inputs:
    def __init__(self, case: str, dtype: torch.dtype) -> None:
        method, images, channels, height, width, filters, kernel, stride, padding, dilation, groups = CASES[case]
        self.method = method
        self.settings = ConvSettings((stride, stride), (padding, padding), (dilation, dilation), groups)
        fan_in = channels // groups * kernel[0] * kernel[1]
        self.x = laid_out(torch.randn(images, channels, height, width), dtype)
        self.weight = laid_out(torch.randn(filters, channels // groups, *kernel) / fan_in**0.5, dtype)
        self.bias = torch.randn(filters)
        shape = F.conv2d(self.x.float(), self.weight.float(), None, *self.settings).shape
        self.residual = laid_out(torch.randn(shape), dtype)
        if reasons := why_not_native(self.x, self.weight, self.settings):
            pytest.skip("; ".join(reasons))

    def native(self, relu: bool, method: str | None = None) -> NativeConv:
        return NativeConv(self.weight, self.bias, self.settings, relu, method)

    def expected(self, relu: bool, residual: bool, dtype: torch.dtype) -> Tensor:
        """PyTorch's: in this dtype with the bias rounded to it, or exact."""
        tensors = (tensor.to(dtype) for tensor in (self.x, self.weight, self.bias))
        out = F.conv2d(*tensors, *self.settings)
        out = out + self.residual.to(dtype) if residual else out
        return out.relu() if relu else out


def laid_out(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case: str, dtype: torch.dtype):
    inputs = Inputs(case, dtype)
    estimated = inputs.native(True).estimated(inputs.x.shape, dtype)
    assert estimated == inputs.method or (case == "wide groups" and estimated == "grouped")  # with AVX2
    for relu, residual, method in itertools.product((False, True), (False, True), inputs.native(True).candidates):
        conv = inputs.native(relu, None if method == estimated else method)
        out = conv(inputs.x, inputs.residual if residual else None)
        assert conv.methods == [method]
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        assert_at_most_twice(
            out, inputs.expected(relu, residual, dtype), inputs.expected(relu, residual, torch.float64)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["3x3", "deep", "groups of 4", "stem", "wide groups"])
def test_the_same_bits_with_any_threads_and_any_batch(case: str, dtype: torch.dtype):
    inputs = Inputs(case, dtype)
    conv = inputs.native(True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = conv(inputs.x)
        torch.set_num_threads(3)
        assert torch.equal(conv(inputs.x), alone)
    finally:
        torch.set_num_threads(threads)
    twice = inputs.native(True)(inputs.x.repeat(3, 1, 1, 1).contiguous(memory_format=torch.channels_last))
    assert torch.equal(twice, alone.repeat(3, 1, 1, 1))


@pytest.mark.parametrize("case", ["3x3", "1x1", "groups of 4"])
def test_the_residual_may_be_overwritten_and_else_is_not(case: str):
    inputs = Inputs(case, torch.float32)
    conv = inputs.native(True)
    before = inputs.residual.clone()
    out = conv(inputs.x, inputs.residual)
    assert torch.equal(inputs.residual, before) and out.data_ptr() != inputs.residual.data_ptr()
    overwritten = conv(inputs.x, inputs.residual, overwrite=True)
    assert overwritten.data_ptr() == inputs.residual.data_ptr()
    assert torch.equal(overwritten, out)


def test_any_memory_format_and_size():
    inputs = Inputs("1x1", torch.float32)
    conv = inputs.native(False)
    expected = conv(inputs.x)
    assert torch.equal(conv(inputs.x.contiguous()), expected)
    assert torch.equal(conv(inputs.x.repeat(1, 1, 1, 2)[..., ::1][..., :14]), expected)
    assert torch.equal(conv(inputs.x, inputs.residual.contiguous()), conv(inputs.x, inputs.residual))
    larger = laid_out(torch.randn(1, 64, 20, 3), torch.float32)
    torch.testing.assert_close(conv(larger), F.conv2d(larger, inputs.weight, inputs.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["3x3", "1x1", "groups of 4", "stem"])
def test_nan_passes_the_relu(case: str):
    inputs = Inputs(case, torch.float32)
    inputs.x[0, 0, 5, 6] = float("nan")
    out, expected = inputs.native(True)(inputs.x), inputs.expected(True, False, torch.float32)
    assert out.isnan().any() and (out.isnan() | ~expected.isnan()).all()
    far = torch.ones_like(out, dtype=torch.bool)
    far[0, :, :12, :14] = False
    assert not out[far].isnan().any()


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_infinite_and_largest_inputs_reach_only_what_they_should(
    case: str, dtype: torch.dtype, values: tuple[float, ...]
):
    """Winograd's method multiplies sums of inputs, which are infinite or NaN where the products are not."""
    inputs = Inputs(case, dtype)
    inputs.x = with_extremes(inputs.x, values)
    exact = inputs.expected(True, True, torch.float64)
    baseline = inputs.expected(True, True, torch.float32).to(dtype)  # in bfloat16 oneDNN multiplies infinity by 0
    assert_at_most_twice(inputs.native(True, inputs.method)(inputs.x, inputs.residual), baseline, exact)


def test_errors():
    inputs = Inputs("1x1", torch.float32)
    conv = inputs.native(True)
    with pytest.raises(ValueError, match=r"x must have 64 channels in torch.float32; got \(2, 65, 14, 14\)"):
        conv(torch.randn(2, 65, 14, 14))
    with pytest.raises(ValueError, match="in torch.bfloat16"):
        conv(inputs.x.bfloat16())
    with pytest.raises(ValueError, match=r"residual must be \(2, 96, 14, 14\)"):
        conv(inputs.x, inputs.residual[:1])
    deep = Inputs("deep", torch.float32)
    with pytest.raises(ValueError, match="as large as the kernel"):
        NativeConv(deep.weight, deep.bias, ConvSettings(), True)(torch.randn(1, 600, 2, 2))


def test_reasons(monkeypatch):
    weight = torch.randn(8, 8, 1, 1)
    assert "meta" in why_not_native(torch.empty(1, 8, 4, 4, device="meta"), weight, ConvSettings())[0]
    assert "float64" in why_not_native(torch.randn(1, 8, 4, 4).double(), weight.double(), ConvSettings())[0]
    if not native_conv.takes_dtype(torch.float32):
        return
    narrow = torch.randn(24, 1, 3, 3)
    assert "groups of 1 filters" in why_not_native(torch.randn(1, 24, 4, 4), narrow, ConvSettings(groups=24))[0]
    monkeypatch.setattr(native_conv, "why_no_kernels", lambda dtype: ("fused_resnet._C is not built",))
    assert why_not_native(torch.randn(1, 8, 4, 4), weight, ConvSettings()) == ["fused_resnet._C is not built"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling(dtype: torch.dtype):
    if not native_conv.takes_dtype(dtype):
        pytest.skip(f"no kernels for {dtype}")
    x = laid_out(torch.randn(2, 40, 15, 12), dtype)
    x[1, 3, 4, 5] = float("nan")
    x[0, 39, 0, 0] = -float("inf")
    pooled = max_pool(x, PoolSettings((3, 3), (2, 2), (1, 1)))
    torch.testing.assert_close(pooled, F.max_pool2d(x, 3, 2, 1), rtol=0, atol=0, equal_nan=True)
    x = x.nan_to_num(1.0, 1.0, -1.0)
    exact = F.adaptive_avg_pool2d(x.double(), 1)
    assert_at_most_twice(average(x), F.adaptive_avg_pool2d(x, 1), exact, magnitude=1.0)  # of what cancels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chain_is_its_convolutions_one_by_one(dtype: torch.dtype):
    if not native_conv.takes_dtype(dtype):
        pytest.skip(f"no kernels for {dtype}")

    def conv(channels: int, filters: int, kernel: int, stride: int, relu: bool) -> NativeConv:
        weight = laid_out(torch.randn(filters, channels, kernel, kernel) / (channels * kernel**2) ** 0.5, dtype)
        settings = ConvSettings((stride, stride), (kernel // 2, kernel // 2))
        return NativeConv(weight, torch.randn(filters), settings, relu)

    blocks = [
        Block([conv(32, 32, 3, 1, True), conv(32, 32, 3, 1, True)], None, True),  # adds the chain's own input
        Block(
            [conv(32, 16, 1, 1, True), conv(16, 16, 3, 2, True), conv(16, 64, 1, 1, True)],
            conv(32, 64, 1, 2, False),
            True,
        ),
        Block([conv(64, 64, 1, 1, True)], None, True),
        Block([conv(64, 64, 3, 1, True), conv(64, 64, 3, 1, True)], None, False),
        Block([conv(64, 32, 1, 1, True), conv(32, 64, 1, 1, True)], None, True),
    ]
    x = laid_out(torch.randn(2, 32, 17, 18), dtype)
    before = x.clone()
    chain = NativeChain(blocks, x)
    out = chain(x)
    expected = x
    for block in blocks:
        *convs, last = block.convs
        between = expected
        for one in convs:
            between = one(between)
        shortcut = expected if block.downsample is None else block.downsample(expected)
        expected = last(between, shortcut if block.shortcut else None)
    assert torch.equal(out, expected) and torch.equal(x, before)
    assert torch.equal(chain(x.contiguous()), expected)
    wrong = [Block([conv(32, 16, 1, 1, True)], None, True)]
    with pytest.raises(ValueError, match="shortcut"):
        NativeChain(wrong, x)


@pytest.mark.parametrize(
    ("offsets", "missing", "message"),
    [
        ([0, 64], 0, None),
        ([0, 64], 1, "inside the chain's memory"),
        ([0, -64], 0, "inside the chain's memory"),
        ([0, 32], 0, "neither the chain's input nor the step's"),
    ],
)
def test_a_chain_refuses_memory_in_which_a_step_would_overwrite_what_it_reads(offsets, missing, message):
    if not native_conv.takes_dtype(torch.float32):
        pytest.skip("no kernels for torch.float32")
    pool = pooling_window(4, PoolSettings((1, 1), (1, 1)), torch.float32)
    chain = native_conv.extension.ConvChain(64 + 64 - missing, offsets)  # two activations of 2 x 2 pixels
    chain.add_max_pool(pool, 1, 2, 2, 1, 0, 2)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        chain.add_max_pool(pool, 1, 2, 2, 1, 2, 3)
