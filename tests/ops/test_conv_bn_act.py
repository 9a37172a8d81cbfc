"""conv_bn_act on the CPU against its composition in float64, and oneDNN's convolutions with packed weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops import conv_bn_act, use_backend
from fused_resnet.ops.backends.onednn import pack_conv_weight, packed_conv_act, why_not_packed
from tests.accuracy import assert_at_most_twice
from tests.ops.step import FORMATS, HALF

BACKENDS = ["auto", "separate", "reference"]


@dataclass(frozen=True)
class Case:
    images: tuple[int, int, int, int]
    filters: int
    kernel: tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    @property
    def settings(self) -> dict:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}


CASES = {
    "3x3": Case((2, 16, 14, 14), 24, (3, 3), padding=1),
    "3x3 stride 2, odd size": Case((2, 16, 13, 11), 32, (3, 3), stride=2, padding=1),
    "1x1": Case((2, 64, 7, 7), 16, (1, 1)),
    "1x1 stride 2, odd size": Case((3, 16, 9, 7), 20, (1, 1), stride=2),
    "stem": Case((1, 3, 33, 31), 64, (7, 7), stride=2, padding=3),
    "5x3, uneven": Case((2, 7, 12, 9), 5, (5, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "dilation": Case((1, 8, 11, 11), 8, (3, 3), padding=2, dilation=2),
    "groups": Case((2, 32, 8, 8), 32, (3, 3), padding=1, groups=8),
    "depthwise": Case((2, 13, 6, 5), 13, (3, 3), padding=1, groups=13),
    "one channel, one filter": Case((2, 1, 6, 6), 1, (3, 3)),
    "one pixel left": Case((5, 9, 3, 3), 11, (3, 3)),
}


def conv_inputs(case: Case, dtype: torch.dtype, memory_format: torch.memory_format, residual: bool) -> dict:
    x = torch.randn(case.images)
    conv_weight = torch.randn(case.filters, case.images[1] // case.groups, *case.kernel)
    conv_weight /= conv_weight[0].numel() ** 0.5
    shape = F.conv2d(x, conv_weight, **case.settings).shape
    inputs = {
        "x": x.to(dtype).contiguous(memory_format=memory_format),
        "conv_weight": conv_weight.to(dtype).contiguous(memory_format=memory_format),
        "residual": torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) if residual else None,
    }
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    for name, vector in {
        "weight": torch.rand(case.filters) + 0.5,
        "bias": torch.randn(case.filters),
        "running_mean": torch.randn(case.filters),
        "running_var": torch.rand(case.filters) + 0.5,
    }.items():
        inputs[name] = vector.to(vectors)
    return inputs


def pytorch_conv_bn_act(
    x, conv_weight, weight, bias, running_mean, running_var, residual=None, *, eps=1e-5, activation="relu", **settings
) -> Tensor:
    """What ``conv_bn_act``'s docstring says it equals."""
    out = F.conv2d(x, conv_weight, **settings)
    out = F.batch_norm(out, running_mean, running_var, weight, bias, eps=eps)
    out = out if residual is None else out + residual
    return out if activation is None else F.relu(out)


def widen(inputs: dict) -> dict:
    return {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_accuracy(case, dtype, backend):
    for number, memory_format in enumerate(FORMATS.values()):
        for residual, activation in ((True, "relu"), (False, "relu"), (True, None)):
            if number and activation is None:
                continue
            inputs = conv_inputs(case, dtype, memory_format, residual)
            with use_backend(backend):
                actual = conv_bn_act(**inputs, **case.settings, activation=activation)
            baseline = pytorch_conv_bn_act(**inputs, **case.settings, activation=activation)
            exact = pytorch_conv_bn_act(**widen(inputs), **case.settings, activation=activation)
            assert_at_most_twice(actual, baseline, exact)
            plain = F.conv2d(inputs["x"], inputs["conv_weight"], **case.settings)
            assert actual.is_contiguous(memory_format=memory_format) == plain.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64(backend):
    for case in CASES.values():
        inputs = conv_inputs(case, torch.float64, torch.contiguous_format, True)
        with use_backend(backend):
            actual = conv_bn_act(**inputs, **case.settings)
        torch.testing.assert_close(actual, pytorch_conv_bn_act(**inputs, **case.settings), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_that_are_none_and_eps(backend):
    case = CASES["3x3"]
    for missing in (("weight",), ("bias",), ("weight", "bias")):
        inputs = conv_inputs(case, torch.float32, FORMATS["nhwc"], True) | dict.fromkeys(missing)
        with use_backend(backend):
            actual = conv_bn_act(**inputs, **case.settings, eps=0.5)
        exact = pytorch_conv_bn_act(**widen(inputs), **case.settings, eps=0.5)
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity(backend):
    case = CASES["3x3"]
    inputs = conv_inputs(case, torch.float32, FORMATS["nhwc"], True)
    inputs["x"][0, 3, 5, 5], inputs["x"][1, 2, 1, 9] = float("nan"), float("inf")
    inputs["residual"][1, 7, 13, 13] = float("-inf")
    with use_backend(backend):
        actual = conv_bn_act(**inputs, **case.settings)
    baseline = pytorch_conv_bn_act(**inputs, **case.settings)
    assert torch.equal(actual.isnan(), baseline.isnan())
    assert torch.equal(actual.isinf(), baseline.isinf())
    assert actual[1, 7, 13, 13] == 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("wanted", ["x", "conv_weight", "weight", "residual"])
def test_gradients_are_those_of_the_composition(wanted, backend):
    case = CASES["3x3 stride 2, odd size"]
    inputs = conv_inputs(case, torch.float32, FORMATS["nhwc"], True)
    grads = []
    for function, dtype in ((conv_bn_act, torch.float32), (pytorch_conv_bn_act, torch.float64)):
        leaves = {name: tensor.to(dtype).clone() for name, tensor in inputs.items()}
        leaves[wanted].requires_grad_()
        with use_backend(backend):
            out = function(**leaves, **case.settings)
            (grad,) = torch.autograd.grad(out.square().sum(), leaves[wanted])
        grads.append(grad.double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4 * grads[1].abs().max().item())


def test_without_gradients_nothing_is_saved():
    case = CASES["3x3"]
    inputs = conv_inputs(case, torch.float32, FORMATS["nhwc"], True)
    inputs["x"].requires_grad_()
    with torch.no_grad():
        assert not conv_bn_act(**inputs, **case.settings).requires_grad
    assert conv_bn_act(**inputs, **case.settings).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_runs_the_convolution_in_its_dtype(gradients, backend):
    if backend == "separate" and gradients:
        return  # it has no gradients
    case = CASES["3x3"]
    inputs = conv_inputs(case, torch.float32, FORMATS["nhwc"], False)
    inputs["conv_weight"].requires_grad_(gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16), use_backend(backend):
        actual = conv_bn_act(**inputs, **case.settings)
        baseline = pytorch_conv_bn_act(**inputs, **case.settings)
    assert actual.dtype == torch.bfloat16
    assert_at_most_twice(actual, baseline, pytorch_conv_bn_act(**widen(inputs), **case.settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("of_x", "of_residual"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)],
)
def test_a_residual_of_another_dtype_promotes_as_plus_does(of_x, of_residual, backend):
    case = CASES["3x3"]
    inputs = conv_inputs(case, of_x, FORMATS["nhwc"], True)
    inputs["residual"] = inputs["residual"].to(of_residual)
    with use_backend(backend):
        actual = conv_bn_act(**inputs, **case.settings)
    baseline = pytorch_conv_bn_act(**inputs, **case.settings)
    assert_at_most_twice(actual, baseline, pytorch_conv_bn_act(**widen(inputs), **case.settings))


def test_vectors_in_half_precision():
    case = CASES["3x3"]
    inputs = conv_inputs(case, torch.bfloat16, FORMATS["nhwc"], True)
    vectors = {n: inputs[n].bfloat16() for n in ("weight", "bias", "running_mean", "running_var")}
    rounded = inputs | {name: vector.float() for name, vector in vectors.items()}
    assert torch.equal(conv_bn_act(**inputs | vectors, **case.settings), conv_bn_act(**rounded, **case.settings))


def test_empty_batch():
    case = CASES["3x3"]
    inputs = conv_inputs(case, torch.float32, FORMATS["nhwc"], True)
    inputs |= {"x": inputs["x"][:0], "residual": inputs["residual"][:0]}
    assert conv_bn_act(**inputs, **case.settings).shape == (0, 24, 14, 14)


def test_torch_func_transforms():
    case = CASES["3x3"]
    inputs = conv_inputs(case, torch.float32, FORMATS["nchw"], False)
    x = inputs.pop("x")
    results = [
        torch.func.vmap(torch.func.grad(lambda image, f=f: f(image[None], **inputs, **case.settings).square().sum()))(x)
        for f in (conv_bn_act, pytorch_conv_bn_act)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_packed_convolution(case, dtype):
    inputs = conv_inputs(case, dtype, FORMATS["nhwc"], True)
    x, weight, residual, bias = inputs["x"], inputs["conv_weight"], inputs["residual"], inputs["bias"].to(dtype)
    if reasons := why_not_packed(x):
        pytest.skip("; ".join(reasons))
    pairs = [
        [value, value] if isinstance(value, int) else list(value)
        for value in (case.stride, case.padding, case.dilation)
    ]
    settings = ConvSettings.of(*pairs, case.groups)
    packed = pack_conv_weight(weight, list(x.shape), settings)
    other_size = torch.randn(x.shape[0] + 1, x.shape[1], x.shape[2] + 3, x.shape[3] + 2).to(dtype)
    for images in (x, x.contiguous(), other_size):
        plain = F.conv2d(images, weight, bias, **case.settings)
        exact = F.conv2d(images.double(), weight.double(), bias.double(), **case.settings)
        added = residual if plain.shape == residual.shape else torch.randn(plain.shape).to(dtype)
        before = added.clone()
        for relu in (True, False):
            act = F.relu if relu else lambda z: z
            actual = packed_conv_act(images, packed, bias, None, settings, relu)
            assert_at_most_twice(actual, act(plain), act(exact))
            actual = packed_conv_act(images, packed, bias, added, settings, relu)
            assert_at_most_twice(actual, act(plain + added), act(exact + added.double()))
            assert torch.equal(added, before)


def test_why_not_packed():
    image = torch.randn(1, 3, 8, 8)
    assert why_not_packed(image.to("meta")) == ["x is on meta; it takes CPU tensors"]
    assert "float64" in why_not_packed(image.double())[0]
    # Not torch.backends.mkldnn.flags: on its way out it leaves TF32 allowed, for every test that follows.
    torch._C._set_mkldnn_enabled(False)
    try:
        assert "switched off" in why_not_packed(image)[0]
    finally:
        torch._C._set_mkldnn_enabled(True)


def test_on_the_meta_device():
    """Which has no autocast to ask about."""
    case = next(iter(CASES.values()))
    inputs = conv_inputs(case, torch.float32, torch.channels_last, True)
    out = conv_bn_act(**{name: tensor.to("meta") for name, tensor in inputs.items()}, **case.settings)
    assert out.is_meta and out.shape == inputs["residual"].shape
