"""bn_act and bn_act_dual of tensors of any strides and any mixture of dtypes."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.ops import bn_act_dual
from fused_resnet.ops.batch_norm import BatchNorm, batch_norm
from tests.ops.step import (
    CPU_BACKENDS,
    FORMATS,
    assert_accurate,
    assert_same,
    both,
    dual,
    dual_inputs,
    make_cotangent,
    make_inputs,
    pytorch_bn_act_dual,
    step,
)

# From a (4, 26, 16, 20) tensor to a view of (4, 13, 8, 10) that lies neither as NHWC nor as NCHW, or does so with an
# offset.
ODD_LAYOUTS = {
    "every second channel": lambda t: t[:, ::2, 4:12, 5:15],
    "every second pixel": lambda t: t[:, 13:, ::2, ::2],
    "channels_last, cropped": lambda t: t.contiguous(memory_format=torch.channels_last)[:, 3:16, :8, 10:],
    "channels_last, first channels": lambda t: t.contiguous(memory_format=torch.channels_last)[:, :13, 8:, 1:11],
    "transposed image": lambda t: t[:, :13, :10, :8].contiguous().transpose(2, 3),
    "CNHW": lambda t: t[:, :13, :8, :10].transpose(0, 1).contiguous().transpose(0, 1),
    "expanded over the batch": lambda t: t[:1, :13, :8, :10].expand(4, -1, -1, -1),
    "expanded over channels": lambda t: t[:, :1, :8, :10].expand(-1, 13, -1, -1),
    "flipped by an offset": lambda t: t.flatten()[7 : 7 + 4 * 13 * 80].view(4, 13, 8, 10),
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("layout", ODD_LAYOUTS.values(), ids=ODD_LAYOUTS)
def test_odd_layouts_of_every_argument(layout, backend):
    """x, residual and gradient in turn: the result is that of the same values lying densely."""
    function, pytorch = both(training=True)
    for dtype in (torch.float32, torch.bfloat16):
        base = make_inputs((4, 13, 8, 10), dtype, residual=True)
        odd = layout(torch.randn(4, 26, 16, 20).to(dtype))
        assert odd.shape == base["x"].shape
        for name in ("x", "residual"):
            inputs = {**base, name: odd}
            assert_accurate(function, pytorch, inputs, backend=backend)
        dense, lying_oddly = (step(function, base, grad, backend=backend) for grad in (odd.contiguous(), odd))
        assert_same(lying_oddly, dense)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_mixed_memory_formats(backend):
    nhwc, nchw = FORMATS["nhwc"], FORMATS["nchw"]
    plain = make_inputs((3, 13, 7, 5), residual=True)
    function, pytorch = both(training=True)
    cotangent = make_cotangent(pytorch, plain)
    for of_x in (nhwc, nchw):
        expected = None
        for of_residual in (nhwc, nchw):
            for of_grad in (nhwc, nchw):
                inputs = plain | {
                    "x": plain["x"].contiguous(memory_format=of_x),
                    "residual": plain["residual"].contiguous(memory_format=of_residual),
                }
                actual = step(function, inputs, cotangent.contiguous(memory_format=of_grad), backend=backend)
                assert actual["output"].is_contiguous(memory_format=of_x)
                expected = expected or actual
                assert_same(actual, expected)
    inputs = dual_inputs((3, 13, 7, 5))
    inputs["x2"] = inputs["x2"].contiguous(memory_format=nhwc)
    functions = [dual(function, True, "relu") for function in (bn_act_dual, pytorch_bn_act_dual)]
    assert_accurate(*functions, inputs, backend=backend)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto"])
@pytest.mark.parametrize(
    ("of_x", "of_residual", "of_result"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtypes_promote_as_plus_does(of_x, of_residual, of_result, backend):
    inputs = make_inputs((3, 13, 7, 5), of_x, residual=True)
    inputs["residual"] = inputs["residual"].to(of_residual)
    actual = assert_accurate(*both(training=True), inputs, backend=backend)
    assert actual["output"].dtype == of_result
    assert actual["gradient of residual"].dtype == of_residual
    if backend == "native" and torch.float64 in (of_x, of_residual):
        return  # float64 is not native's; as x2 it is refused
    inputs = dual_inputs((3, 13, 7, 5), of_x)
    inputs["x2"] = inputs["x2"].to(of_residual)
    functions = [dual(function, True, "relu") for function in (bn_act_dual, pytorch_bn_act_dual)]
    cotangent = make_cotangent(functions[1], {n: t.double() for n, t in inputs.items()}).to(of_result)
    actual = step(functions[0], inputs, cotangent, backend=backend)
    assert actual["output"].dtype == of_result
    assert actual["gradient of x2"].dtype == of_residual
    exact = step(functions[1], {n: t.double() for n, t in inputs.items()}, cotangent)
    unit = max(torch.finfo(dtype).eps for dtype in (of_x, of_residual))
    torch.testing.assert_close(actual["output"].double(), exact["output"], rtol=4 * unit, atol=4 * unit)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("of_x", "of_affine", "of_running"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float16, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto"])
def test_any_mixture_of_dtypes(of_x, of_affine, of_running, training, backend):
    """PyTorch refuses most of these, so the judge is float64 alone: one rounding of each result to its own dtype."""
    if backend == "native" and of_x == torch.float64:
        backend = "auto"
    inputs = make_inputs((4, 5, 6, 7), of_x, residual=True)
    inputs |= {name: inputs[name].to(of_affine) for name in ("weight", "bias")}
    inputs |= {name: inputs[name].to(of_running) for name in ("running_mean", "running_var")}
    function, pytorch = both(training=training)
    exact_inputs = {name: tensor.double() for name, tensor in inputs.items()}
    cotangent = make_cotangent(pytorch, exact_inputs).to(of_x)
    actual = step(function, inputs, cotangent, backend=backend)
    exact = step(pytorch, exact_inputs, cotangent)
    assert list(actual) == list(exact)
    dtypes = {"weight": of_affine, "bias": of_affine, "running_mean": of_running, "running_var": of_running}
    for name, tensor in actual.items():
        dtype = dtypes.get(name.removeprefix("gradient of "), of_x)
        assert tensor.dtype == dtype, name
        unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * 20 if of_x != torch.float64 else 1e-7)
        if backend == "reference" and name in ("running_mean", "running_var"):
            unit *= 3  # three roundings where native has one
        scale = exact[name].abs().max().item()
        torch.testing.assert_close(
            tensor.double(), exact[name], rtol=0, atol=unit * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_of_every_second_number(training):
    """Also where x is so small that PyTorch's batch_norm runs, whose backward takes it as contiguous."""
    x, grad = (torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight, bias, mean, var = torch.randn(6)[::2], torch.randn(3), torch.randn(3), torch.rand(3) + 0.5
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        vectors = [vector.to(dtype, copy=True) for vector in (bias, mean, var)]
        affine = weight if dtype is torch.float32 else weight.double()
        out = batch_norm(leaf, BatchNorm(affine, *vectors, training))
        gradients.append(torch.autograd.grad(out, leaf, grad.to(dtype))[0])
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-5)
