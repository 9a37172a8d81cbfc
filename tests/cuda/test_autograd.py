"""``bn_act`` and ``bn_act_dual`` on the cuda backend: gradients through bit masks, and training in one launch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops import bn_act, bn_act_dual, use_backend
from fused_resnet.ops.backends import cuda
from tests.cuda.on_host import Host
from tests.ops.step import (
    DTYPES,
    FORMATS,
    FORMS,
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

NHWC = FORMATS["nhwc"]
SHAPES = [(2, 24, 5, 7), (3, 13, 4, 3), (2, 8, 1, 1)]


@pytest.fixture(params=["one launch", "two passes"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How training's forward runs: an x that fits in the device's shared memory would always take one launch."""
    if request.param == "two passes":
        monkeypatch.setattr(cuda, "fits_on_chip", lambda x: False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_accurate(host: Host, passes: str, form: tuple, shape: tuple[int, ...], dtype: torch.dtype):
    training, residual, activation = form
    function, meaning = both(training=training, activation=activation)
    assert_accurate(function, meaning, make_inputs(shape, dtype, NHWC, residual=residual), backend="cuda")


def test_training_is_one_launch_where_it_fits(host: Host, passes: str):
    inputs = make_inputs((2, 16, 6, 6), torch.float16, NHWC, residual=True)
    function, meaning = both(training=True)
    step(function, inputs, make_cotangent(meaning, inputs), backend="cuda")
    forward = 1 if passes == "one launch" else 3  # statistics, their merge, and the pass that uses them
    launches = host.launches()
    assert len(launches) == forward + 3
    assert [launch.cooperative for launch in launches] == [passes == "one launch", *[False] * (forward + 2)]


def test_one_launch_and_two_passes_agree(host: Host, monkeypatch: pytest.MonkeyPatch):
    """Not to the bit: the statistics are merged of other parts."""
    inputs = make_inputs((4, 40, 7, 7), torch.float32, NHWC, residual=True)
    function, meaning = both(training=True)
    cotangent = make_cotangent(meaning, inputs)
    one = step(function, inputs, cotangent, backend="cuda")
    monkeypatch.setattr(cuda, "fits_on_chip", lambda x: False)
    two = step(function, inputs, cotangent, backend="cuda")
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ["relu", None])
def test_dual_is_accurate(host: Host, training: bool, activation: str | None, dtype: torch.dtype):
    functions = (dual(function, training, activation) for function in (bn_act_dual, pytorch_bn_act_dual))
    assert_accurate(*functions, dual_inputs((2, 24, 5, 3), dtype, NHWC), backend="cuda")


@pytest.mark.parametrize(
    "wanted",
    [("x",), ("weight",), ("bias",), ("residual",), ("x", "residual"), ("weight", "residual"), ("x", "weight", "bias")],
    ids="+".join,
)
def test_only_the_gradients_that_are_wanted(host: Host, passes: str, wanted: tuple[str, ...]):
    inputs = make_inputs((2, 16, 5, 5), torch.float32, NHWC, residual=True)
    function, meaning = both(training=True)
    cotangent = make_cotangent(meaning, inputs)
    everything = step(function, inputs, cotangent, backend="cuda")
    some = step(function, inputs, cotangent, backend="cuda", wanted=wanted)
    assert {name for name in some if name.startswith("gradient")} == {f"gradient of {name}" for name in wanted}
    assert_same(some, {name: everything[name] for name in some})


def test_the_output_is_not_kept_for_backward(host: Host, passes: str):
    """x, the vectors and one bit of each element."""
    inputs = make_inputs((2, 64, 8, 8), torch.float32, NHWC, residual=True)
    x, residual = (inputs[name].requires_grad_() for name in ("x", "residual"))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with use_backend("cuda"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = bn_act(**{**inputs, "x": x, "residual": residual}, training=True)
    large = [tensor for tensor in kept if tensor.dim() > 1]
    assert [tuple(tensor.shape) for tensor in large] == [tuple(x.shape), (2 * 8 * 8, 8)]
    assert large[0].data_ptr() == x.data_ptr() and out.data_ptr() not in [tensor.data_ptr() for tensor in kept]


def test_a_second_derivative(host: Host, passes: str):
    """By PyTorch's own ops, of the mask that was kept."""
    inputs = make_inputs((2, 8, 3, 3), torch.float32, NHWC, residual=True)
    buffers = {name: inputs.pop(name) for name in ("running_mean", "running_var")}
    cotangent = torch.randn(2, 8, 3, 3)

    def second(function):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        out = function(**leaves, **{name: tensor.clone() for name, tensor in buffers.items()})
        first = torch.autograd.grad(out, leaves["x"], cotangent, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), [leaves["x"], leaves["weight"]])

    function, meaning = both(training=True)
    with use_backend("cuda"):
        actual = second(function)
    for mine, theirs in zip(actual, second(meaning), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_without_gradients_no_mask_is_made(host: Host, passes: str):
    inputs = make_inputs((2, 16, 6, 6), torch.float16, NHWC, residual=True)
    with use_backend("cuda"), torch.no_grad():
        out = bn_act(**inputs, training=True)
    plain = {**inputs, "running_mean": None, "running_var": None}
    z = (
        F.batch_norm(plain["x"].double(), None, None, plain["weight"].double(), plain["bias"].double(), training=True)
        + plain["residual"].double()
    )
    torch.testing.assert_close(out.double(), F.relu(z), rtol=2e-3, atol=2e-3)
    assert len(host.launches()) == (1 if passes == "one launch" else 3)


def test_a_mask_outlives_its_backend(host: Host, passes: str):
    """Backward on a backend that has no masks reads it as signs."""
    inputs = make_inputs((2, 16, 5, 5), torch.float32, NHWC, residual=True)
    x = inputs["x"].requires_grad_()
    found = []
    for backend in ("cuda", "reference"):
        with use_backend("cuda"):
            out = bn_act(**{**inputs, "x": x}, training=True)
        with use_backend(backend):
            found += torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_batched_gradients(host: Host, passes: str):
    """``is_grads_batched`` gives backward tensors that have no address."""
    inputs = make_inputs((2, 8, 3, 3), torch.float32, NHWC, residual=True)
    x = inputs["x"].requires_grad_()
    cotangents = torch.randn(3, 2, 8, 3, 3)
    with use_backend("cuda"):
        out = bn_act(**{**inputs, "x": x}, training=True)
        one_by_one = [torch.autograd.grad(out, x, c, retain_graph=True)[0] for c in cotangents]
        (batched,) = torch.autograd.grad(out, x, cotangents, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(one_by_one), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_trace_holds_the_op(host: Host):
    inputs = make_inputs((2, 8, 3, 3), torch.float32, NHWC)
    vectors = [inputs[name] for name in ("weight", "bias", "running_mean", "running_var")]
    with use_backend("cuda"):
        traced = torch.jit.trace(lambda t: bn_act(t, *vectors), inputs["x"], check_trace=False)
        torch.testing.assert_close(traced(inputs["x"] + 1), bn_act(inputs["x"] + 1, *vectors), rtol=0, atol=0)
