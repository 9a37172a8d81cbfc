"""bn_act and bn_act_dual on the CPU: accuracy of the output, every gradient and every buffer."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.ops import bn_act_dual
from tests.ops.step import (
    CPU_BACKENDS,
    DTYPES,
    FORMATS,
    FORMS,
    NEEDS_NATIVE,
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

SHAPES = {
    "a stage of ResNet-18": (4, 64, 14, 14),
    "primes": (3, 13, 7, 5),
    "one channel": (3, 1, 5, 7),
    "one pixel": (17, 6, 1, 1),
    "batch one": (1, 5, 9, 7),
    "more channels than a tile's rows": (2, 2049, 3, 3),
    "planes longer than a tile": (2, 3, 80, 80),
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_accuracy_by_shape(shape, dtype, backend):
    for memory_format in FORMATS.values():
        inputs = make_inputs(shape, dtype, memory_format, residual=True)
        actual = assert_accurate(*both(training=True), inputs, backend=backend)
        assert actual["output"].stride() == inputs["x"].stride()
        assert actual["output"].dtype == dtype


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_accuracy_by_form(form, dtype, backend):
    training, residual, activation = form
    for memory_format in FORMATS.values():
        inputs = make_inputs((5, 19, 9, 11), dtype, memory_format, residual=residual)
        assert_accurate(*both(training=training, activation=activation), inputs, backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("training", "activation"), [(True, "relu"), (True, None), (False, "relu")])
def test_accuracy_of_dual(training, activation, dtype, backend):
    functions = [dual(function, training, activation) for function in (bn_act_dual, pytorch_bn_act_dual)]
    for shape, memory_format in (((5, 19, 9, 11), FORMATS["nhwc"]), ((3, 64, 7, 7), FORMATS["nchw"])):
        assert_accurate(*functions, dual_inputs(shape, dtype, memory_format), backend=backend)


@NEEDS_NATIVE
def test_the_automatic_choice_is_native_where_it_can_be():
    for dtype in DTYPES:
        inputs = make_inputs((3, 13, 7, 5), dtype, residual=True)
        function, pytorch = both(training=True)
        cotangent = make_cotangent(pytorch, inputs)
        automatic, native = (step(function, inputs, cotangent, backend=name) for name in ("auto", "native"))
        assert_same(automatic, native)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_float64_is_exact_to_its_last_digits(form, backend):
    training, residual, activation = form
    inputs = make_inputs((3, 13, 7, 5), torch.float64, residual=residual)
    function, pytorch = both(training=training, activation=activation)
    cotangent = make_cotangent(pytorch, inputs)
    actual, expected = step(function, inputs, cotangent, backend=backend), step(pytorch, inputs, cotangent)
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_mean_far_larger_than_deviation(memory_format, backend):
    """Sums of squares would lose every digit: 1e8 + 1 in float32 is 1e8."""
    for shape in ((4, 7, 40, 40), (3, 130, 5, 5)):
        inputs = make_inputs(shape, memory_format=memory_format)
        inputs["x"] = inputs["x"] + 1e4 * torch.linspace(-1, 1, shape[1])[:, None, None]
        assert_accurate(*both(training=True), inputs, backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_go_where_they_go_in_pytorch(bad, training, memory_format, backend):
    for residual in (True, False):
        inputs = make_inputs((3, 13, 7, 5), memory_format=memory_format, residual=residual)
        inputs["x"][1, 4, 2, 3] = bad
        if residual:
            inputs["residual"][2, 5, 0, 0] = bad
        if training:  # the mean of an infinity is one, or NaN by Welford's and Chan's formulas, in PyTorch as here
            inputs |= {"running_mean": None, "running_var": None}
        assert_accurate(*both(training=training), inputs, backend=backend)
    inputs = make_inputs((3, 13, 7, 5), memory_format=memory_format)
    inputs["weight"][3], inputs["bias"][6] = float("nan"), bad
    assert_accurate(*both(training=training), inputs, backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("momentum", [0, 0.0, 0.1, 1, 1.0, 1 / 3])
def test_momentum(momentum, backend):
    inputs = make_inputs((3, 5, 4, 6))
    actual = assert_accurate(*both(training=True, momentum=momentum), inputs, backend=backend)
    if momentum == 0:
        assert torch.equal(actual["running_mean"], inputs["running_mean"])
        assert torch.equal(actual["running_var"], inputs["running_var"])


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto"])
@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias"), ("running_mean", "running_var")])
def test_vectors_that_are_none(missing, backend):
    for training in (True, False):
        if not training and "running_mean" in missing:
            continue
        inputs = make_inputs((3, 5, 4, 6), residual=True) | dict.fromkeys(missing)
        actual = assert_accurate(*both(training=training, eps=1e-3), inputs, backend=backend)
        assert not {f"gradient of {name}" for name in missing} & set(actual)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3)])
def test_empty_batch(shape, dtype):
    for training in (True, False):
        inputs = make_inputs(shape, dtype, residual=True)
        function, pytorch = both(training=training)
        cotangent = torch.randn(shape)
        assert_same(step(function, inputs, cotangent), step(pytorch, inputs, cotangent))
