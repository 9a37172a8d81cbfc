"""The C++ convolutions of a training step: against float64 by the accuracy rule, in every method, what they promise and
what they refuse; and that blocks on the CPU train with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet
from fused_resnet.arguments import NO_RUNNING_STATISTICS, ConvSettings, Norm
from fused_resnet.ops import reference, use_backend, use_fusion_level
from fused_resnet.ops.backends.native import conv as native_conv
from fused_resnet.ops.route import choose, reasons, routes
from fused_resnet.ops.route import fusion_level as plan
from tests.accuracy import EXTREMES, assert_at_most_twice, with_extremes
from tests.ops.step import NEEDS_NATIVE

pytestmark = NEEDS_NATIVE
if not reasons.unavailable("native"):
    from fused_resnet.ops.backends import native
    from fused_resnet.ops.backends.native import conv_training as native_training

if native_conv.why_no_kernels(torch.float32):
    pytest.skip("; ".join(native_conv.why_no_kernels(torch.float32)), allow_module_level=True)

# images, channels, height, width, filters, kernel, stride, padding, dilation
CASES = {
    "1x1": (2, 64, 14, 13, 96, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 stride 2": (2, 64, 15, 14, 128, (1, 1), (2, 2), (0, 0), (1, 1)),
    "3x3": (2, 64, 28, 28, 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, odd sizes": (3, 32, 15, 13, 37, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, many filters": (2, 16, 9, 9, 300, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, deep": (2, 528, 7, 7, 32, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, many pixels": (8, 16, 40, 41, 24, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 without padding": (2, 16, 12, 11, 16, (3, 3), (1, 1), (0, 0), (1, 1)),
    "3x3 stride 2": (2, 32, 15, 14, 40, (3, 3), (2, 2), (1, 1), (1, 1)),
    "stem": (2, 3, 33, 30, 64, (7, 7), (2, 2), (3, 3), (1, 1)),
    "few channels and filters": (3, 5, 9, 10, 7, (3, 3), (2, 2), (1, 1), (1, 1)),
    "few filters, stride 2": (2, 16, 8, 7, 3, (3, 3), (2, 2), (1, 1), (1, 1)),
    "dilated": (2, 24, 13, 12, 33, (3, 3), (1, 1), (2, 2), (2, 2)),
    "stride beyond the kernel": (2, 16, 11, 13, 24, (2, 1), (3, 2), (1, 0), (1, 1)),
    "unequal sides": (2, 20, 11, 9, 18, (3, 5), (1, 2), (1, 2), (1, 1)),
    "one pixel": (4, 40, 1, 1, 24, (1, 1), (1, 1), (0, 0), (1, 1)),
    "splits of the depth": (2, 40, 50, 51, 24, (1, 1), (1, 1), (0, 0), (1, 1)),
}
METHODS = ("gemm", "winograd")


class Inputs:
    """Of a case, in float32 and channels_last; ``norm``: the vectors of a norm in front, None without one."""

    def __init__(self, case: str, normed: bool) -> None:
        images, channels, height, width, filters, kernel, *settings = CASES[case]
        self.settings = ConvSettings(*settings)
        self.x = laid_out(torch.randn(images, channels, height, width))
        self.weight = laid_out(torch.randn(filters, channels, *kernel) / (channels * kernel[0] * kernel[1]) ** 0.5)
        self.norm: Norm | None = None
        if normed:
            mean, invstd = torch.randn(channels), torch.rand(channels) + 0.5
            self.norm = Norm(mean, invstd, torch.randn(channels), torch.randn(channels))
        self.dy = laid_out(torch.randn(F.conv2d(self.x, self.weight, None, *self.settings).shape))
        self.residual = laid_out(torch.randn_like(self.x))

    def forward(self, module, dtype: torch.dtype = torch.float32) -> Tensor:
        x, weight, norm = self._in(dtype, self.x, self.weight, self.norm)
        return module.conv_stats(x, weight, norm, NO_RUNNING_STATISTICS, self.settings, False)[0]

    def grad_input(self, module, dtype: torch.dtype = torch.float32) -> Tensor:
        dy, weight, x, residual = self._in(dtype, self.dy, self.weight, self.x, self.residual)
        return module.conv_grad_input(dy, None, None, weight, x, None, residual, self.settings)[0]

    def grad_weight(self, module, dtype: torch.dtype = torch.float32) -> Tensor:
        dy, x, weight, norm = self._in(dtype, self.dy, self.x, self.weight, self.norm)
        return module.conv_grad_weight(dy, None, None, x, norm, weight, self.settings)

    def _in(self, dtype: torch.dtype, *arguments: Tensor | Norm | None) -> list:
        """The same in this dtype."""
        return [
            Norm(*self._in(dtype, *each)) if isinstance(each, Norm) else None if each is None else each.to(dtype)
            for each in arguments
        ]


PARTS = {"forward": Inputs.forward, "grad_input": Inputs.grad_input, "grad_weight": Inputs.grad_weight}


def laid_out(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method that runs where it can."""
    monkeypatch.setattr(native_training, "prefers_winograd", lambda *size: request.param == "winograd")
    return request.param


@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case: str, normed: bool, method: str):
    inputs = Inputs(case, normed)
    depth = inputs.weight[0].numel()
    terms = {"forward": depth, "grad_input": depth, "grad_weight": inputs.dy[:, 0].numel()}
    for name, run in PARTS.items():
        exact = run(inputs, reference, torch.float64)
        assert_at_most_twice(
            run(inputs, native), run(inputs, reference), exact, what=name, terms=terms[name] if normed else 1
        )
        assert run(inputs, native).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("case", CASES)
def test_infinite_and_largest_numbers_reach_only_what_they_should(
    case: str, normed: bool, values: tuple[float, ...], method: str
):
    """Winograd's method multiplies sums of inputs, which are infinite or NaN where the products are not."""
    inputs = Inputs(case, normed)
    inputs.x, dy = with_extremes(inputs.x, values), inputs.dy
    for name, run in PARTS.items():
        inputs.dy = with_extremes(dy, values) if name == "grad_input" else dy / 10
        exact = run(inputs, reference, torch.float64)
        assert_at_most_twice(run(inputs, native), run(inputs, reference), exact, what=name)


def test_both_methods_are_tested(method: str):
    conv = native_training._conv(Inputs("3x3", False).weight.shape, ConvSettings(padding=(1, 1)))
    for what in ("forward", "input", "weight"):
        assert native_training._method(conv, what, 2, 28, 28).name == method


@pytest.mark.parametrize("case", ["1x1", "3x3", "3x3 stride 2", "splits of the depth", "3x3, many pixels"])
def test_the_same_bits_with_any_threads(case: str, method: str):
    inputs = Inputs(case, True)
    before = torch.get_num_threads()
    try:
        for run in PARTS.values():
            expected = run(inputs, native)
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                assert torch.equal(run(inputs, native), expected)
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", ["1x1", "3x3", "3x3 stride 2"])
def test_any_memory_format_of_weights_and_gradients(case: str, method: str):
    """Weights lie as the optimizer has them; what is not channels_last is copied."""
    inputs = Inputs(case, True)
    expected = [run(inputs, native) for run in PARTS.values()]
    inputs.weight, inputs.dy = inputs.weight.contiguous(), inputs.dy.contiguous()
    inputs.residual = torch.cat([inputs.residual, inputs.residual], 3)[..., : inputs.x.shape[3]]
    padded = torch.cat([inputs.weight, inputs.weight], 1)
    for run, right in zip(PARTS.values(), expected, strict=True):
        assert torch.equal(run(inputs, native), right)
    inputs.weight = padded[:, : inputs.x.shape[1]]
    for run, right in zip(PARTS.values(), expected, strict=True):
        assert torch.equal(run(inputs, native), right)


@pytest.mark.parametrize("case", ["1x1", "3x3"])
def test_nan_passes_and_padding_is_of_the_activation(case: str, method: str):
    inputs = Inputs(case, True)
    inputs.norm = inputs.norm._replace(bias=torch.full_like(inputs.norm.bias, 5.0))
    exact = inputs.forward(reference, torch.float64)
    torch.testing.assert_close(inputs.forward(native).double(), exact, rtol=1e-4, atol=1e-4)
    inputs.x[0, 3, 2, 2] = float("nan")
    assert inputs.forward(native)[0, :, 2, 2].isnan().all()
    assert inputs.grad_weight(native)[:, 3].isnan().any()


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=" ".join)
def test_a_norm_without_weight_or_bias(absent: tuple[str, ...], method: str):
    inputs = Inputs("3x3, odd sizes", True)
    inputs.norm = inputs.norm._replace(**dict.fromkeys(absent))
    for name, run in PARTS.items():
        exact, baseline = run(inputs, reference, torch.float64), run(inputs, reference)
        terms = inputs.dy[:, 0].numel()
        assert_at_most_twice(run(inputs, native), baseline, exact, what=name, terms=terms)


def test_statistics_and_running_ones():
    inputs = Inputs("3x3", True)
    moved, expected = ([torch.zeros(64), torch.ones(64)] for _ in range(2))
    arguments = (inputs.x, inputs.weight, inputs.norm)
    y, mean, invstd = native.conv_stats(*arguments, (*moved, 0.2, 1e-5), inputs.settings, True)
    other = reference.conv_stats(*arguments, (*expected, 0.2, 1e-5), inputs.settings, True)
    for ours, right in zip((y, mean, invstd, *moved), (*other, *expected), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_reasons():
    inputs = Inputs("3x3", True)
    x, weight, vectors, sizes = inputs.x, inputs.weight, inputs.norm, inputs.settings

    def forward(x: Tensor = x, weight: Tensor = weight, sizes: tuple = sizes, norm: list = vectors) -> list[str]:
        return choose.why_not("native", "conv_stats", x, weight, *norm, None, None, 0.1, 1e-5, *sizes, True)

    assert not forward()
    both = {"x": x.bfloat16(), "weight": weight.bfloat16()}
    assert forward(**both) == ["x is torch.bfloat16; its training convolutions take torch.float32"]
    assert forward(x=x.bfloat16()) == ["conv_weight is torch.float32; it takes x's dtype, torch.bfloat16"]
    assert forward(x=x.contiguous()) == ["x is not channels_last"]
    assert forward(weight=weight[:, :32]) == ["conv_weight, (64, 32, 3, 3), takes 32 channels; x has 64"]
    assert forward(weight=weight[:0]) == ["conv_weight is empty"]
    assert forward(sizes=(*sizes[:3], 2)) == ["groups is 2; it takes 1"]
    assert "padding that is less" in forward(sizes=([1, 1], [3, 3], [1, 1], 1))[0]
    assert "a dilation where stride is 1" in forward(sizes=([2, 2], [1, 1], [2, 2], 1))[0]
    assert "at least one pixel" in forward(sizes=([1, 1], [0, 0], [14, 14], 1))[0]
    assert "mean is (3,)" in forward(norm=[torch.zeros(3), *vectors[1:]])[0]
    assert "x is empty" in forward(x=x[:0])

    def of_input(dy: Tensor, coefficients: Tensor | None, norm: list) -> list[str]:
        arguments = (dy, None, coefficients, weight, x, *norm, None)
        return choose.why_not("native", "conv_grad_input", *arguments, *sizes)

    nothing = [None] * 4
    assert not of_input(inputs.dy, None, nothing)
    assert "dz is" in of_input(inputs.dy[:, :3], None, nothing)[0]
    assert "coefficients are given" in of_input(inputs.dy, torch.zeros(4, 64), nothing)[0]
    assert "a norm in front is given" in of_input(inputs.dy, None, vectors)[0]


def test_the_extension_refuses_what_it_cannot_do():
    """Behind every check above: an address is never used for a size that does not fit."""
    built = native_conv.extension
    conv = built.Conv(16, 16, [3, 3], [2, 2], [1, 1], [1, 1], 1, built.DType.float32)
    grouped = built.Conv(16, 16, [3, 3], [1, 1], [1, 1], [1, 1], 2, built.DType.float32)
    for what in ("forward", "input", "weight"):
        assert built.conv_trains(conv, built.ConvMethod.gemm, what)
        assert not built.conv_trains(conv, built.ConvMethod.winograd, what)
        assert not built.conv_trains(grouped, built.ConvMethod.gemm, what)
    gemm, winograd = built.ConvMethod.gemm, built.ConvMethod.winograd
    for methods in ((winograd, gemm, gemm), (gemm, winograd, gemm), (gemm, gemm, winograd)):
        with pytest.raises(ValueError, match="a method cannot do this"):
            built.TrainingConv(conv, 1, 8, 8, 1, *methods)
    with pytest.raises(ValueError, match="a method cannot do this"):
        built.TrainingConv(grouped, 1, 8, 8, 1, gemm, gemm, gemm)
    with pytest.raises(ValueError, match="must be positive"):
        built.TrainingConv(conv, 1, 0, 8, 1, gemm, gemm, gemm)


def test_the_extension_takes_tensors_with_memory_alone():
    built = native_conv.extension
    conv = built.Conv(16, 16, [3, 3], [1, 1], [1, 1], [1, 1], 1, built.DType.float32)
    ready = built.TrainingConv(conv, 1, 8, 8, 1, *[built.ConvMethod.gemm] * 3)
    x, weight = laid_out(torch.randn(1, 16, 8, 8)), torch.randn(16, 16, 3, 3)
    with pytest.raises(RuntimeError, match="memory of their own"):
        ready.forward(x.to("meta"), None, weight, weight.stride(), torch.empty_like(x))
    for nonsense in ("x", 1.5, object()):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            ready.forward(nonsense, None, weight, weight.stride(), torch.empty_like(x))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        ready.forward(x, (weight, None, None, None), weight, weight.stride(), torch.empty_like(x))


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the C++ convolutions run from here on."""
    calls: list[str] = []
    for name in ("forward", "grad_input", "grad_weight"):
        real = getattr(native.NativeConvolution, name)
        monkeypatch.setattr(
            native.NativeConvolution, name, lambda *args, real=real, name=name: calls.append(name) or real(*args)
        )
    return calls


def gradients(block: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = block(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out))
    found = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
    return {"x": x.grad, "out": out.detach(), **found}


@pytest.mark.parametrize("memory", ["default", "efficient"])
@pytest.mark.parametrize("name", ["basic", "bottleneck with a projection"])
def test_a_block_trains_with_them_and_as_exactly(name: str, memory: str, monkeypatch: pytest.MonkeyPatch):
    if not reasons.why_not_device("triton", torch.device("cpu")):
        pytest.skip("Triton's interpreter runs the kernels of a GPU here")
    if name == "basic":
        block: torch.nn.Module = fused_resnet.modules.BasicBlock(32, 32)
    else:
        projection = torch.nn.Sequential(torch.nn.Conv2d(32, 64, 1, 2, bias=False), torch.nn.BatchNorm2d(64))
        block = fused_resnet.modules.Bottleneck(32, 16, 2, projection)
    fused_resnet.fuse(block, memory=memory)
    block = block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = laid_out(torch.randn(4, 32, 16, 15))
    with use_fusion_level(0):
        plain = gradients(block, x)
    calls = calls_of(monkeypatch)
    ours = gradients(block, x)
    assert calls.count("grad_weight") == sum(isinstance(m, torch.nn.Conv2d) for m in block.modules())
    assert {"forward", "grad_input"} <= set(calls)
    with use_backend("reference"), use_fusion_level(0):
        exact = gradients(block.double(), x.double())
    for key, right in exact.items():
        magnitude = right.abs().max().item()
        terms = 1 if right.dim() == 4 and key in ("x", "out") else x[:, 0].numel()
        assert_at_most_twice(ours[key], plain[key], right, what=key, terms=terms, magnitude=magnitude)


def test_a_block_in_groups_runs_the_rest_of_its_convolutions_here(monkeypatch: pytest.MonkeyPatch):
    if not reasons.why_not_device("triton", torch.device("cpu")):
        pytest.skip("Triton's interpreter runs the kernels of a GPU here")
    block = fused_resnet.modules.Bottleneck(64, 16, groups=4, base_width=64)
    block = block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calls = calls_of(monkeypatch)
    gradients(block, laid_out(torch.randn(2, 64, 8, 8)))
    assert calls.count("grad_weight") == 2


@pytest.mark.parametrize("frozen", ["weights", "input", "the first weight"])
def test_nothing_is_computed_that_nobody_asked_for(frozen: str, monkeypatch: pytest.MonkeyPatch):
    if not reasons.why_not_device("triton", torch.device("cpu")):
        pytest.skip("Triton's interpreter runs the kernels of a GPU here")
    block = fused_resnet.modules.BasicBlock(16, 16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = laid_out(torch.randn(2, 16, 8, 8)).requires_grad_(frozen != "input")
    for conv in {"weights": [block.conv1, block.conv2], "input": [], "the first weight": [block.conv1]}[frozen]:
        conv.weight.requires_grad_(False)
    with use_fusion_level(0):
        block(x).square().sum().backward()
        expected = {name: p.grad for name, p in [("x", x), *block.named_parameters()] if p.grad is not None}
    for parameter in (x, *block.parameters()):
        parameter.grad = None
    calls = calls_of(monkeypatch)
    block(x).square().sum().backward()
    assert calls.count("grad_weight") == {"weights": 0, "input": 2, "the first weight": 1}[frozen]
    assert calls.count("grad_input") == {"weights": 2, "input": 1, "the first weight": 2}[frozen]
    found = {name: p.grad for name, p in [("x", x), *block.named_parameters()] if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-3)


def test_a_batch_of_gradients_goes_through_the_dispatcher():
    block = fused_resnet.modules.BasicBlock(16, 16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = laid_out(torch.randn(2, 16, 8, 8)).requires_grad_()
    out = block(x)
    cotangents = torch.randn(3, *out.shape)
    one_by_one = [torch.autograd.grad(out, x, each, retain_graph=True)[0] for each in cotangents]
    (together,) = torch.autograd.grad(out, x, cotangents, is_grads_batched=True)
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-4, atol=1e-4)


def test_a_cpu_beside_a_gpu_trains_with_them_too(monkeypatch: pytest.MonkeyPatch):
    """There Triton is usable, and takes no CPU tensor."""
    if not reasons.why_not_device("triton", torch.device("cpu")):
        pytest.skip("Triton's interpreter runs the kernels of a GPU here")
    monkeypatch.setattr(routes, "kept", {})
    monkeypatch.setattr(reasons, "unavailable", lambda name: [])
    inputs = Inputs("3x3", False)
    with use_fusion_level(None), use_backend("auto"):
        assert plan.training_level(inputs.x, inputs.weight, *inputs.settings) == 2
        route = routes.link_route(inputs.x, inputs.weight, inputs.settings)
        assert isinstance(route.convolution, native.NativeConvolution)


def test_weights_that_are_no_plain_tensors_stay_at_level_0():
    class Weight(Tensor):
        pass

    inputs = Inputs("3x3", False)
    with use_fusion_level(None), use_backend("native"):
        assert plan.training_level(inputs.x, inputs.weight, *inputs.settings) == 2
        assert plan.training_level(inputs.x, inputs.weight.as_subclass(Weight), *inputs.settings) == 0


def test_level_0_asked_for_is_pytorchs_convolution(monkeypatch: pytest.MonkeyPatch):
    block = fused_resnet.modules.BasicBlock(16, 16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calls = calls_of(monkeypatch)
    with use_fusion_level(0):
        gradients(block, laid_out(torch.randn(2, 16, 8, 8)))
    gradients(block, torch.randn(2, 16, 8, 8))  # NCHW
    assert not calls
