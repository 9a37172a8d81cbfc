"""bn_act and bn_act_dual as autograd, torch.func, autocast and threads see them."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet.ops import BatchNorm, bn_act, bn_act_dual, reference, use_backend
from tests.ops.step import (
    CPU_BACKENDS,
    FORMS,
    Inputs,
    assert_same,
    both,
    dual,
    dual_inputs,
    make_cotangent,
    make_inputs,
    pytorch_bn_act,
    pytorch_bn_act_dual,
    step,
)

WANTED = [(), ("x",), ("weight",), ("bias",), ("residual",), ("x", "residual"), ("weight", "bias"), ("x", "weight")]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_first_and_second_derivatives_against_finite_differences(form, backend):
    training, residual, activation = form
    inputs = make_inputs((2, 2, 2, 3), torch.float64, residual=residual)
    buffers = [inputs.pop("running_mean"), inputs.pop("running_var")]
    names = [name for name, tensor in inputs.items() if tensor is not None]

    def function(*leaves: Tensor) -> Tensor:
        named = dict(zip(names, leaves, strict=True))
        running_mean, running_var = (buffer.clone() for buffer in buffers)
        return bn_act(
            **named, running_mean=running_mean, running_var=running_var, training=training, activation=activation
        )

    leaves = [inputs[name].requires_grad_() for name in names]
    with use_backend(backend):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_dual_against_finite_differences(training, backend):
    inputs = dual_inputs((2, 2, 2, 3), torch.float64)
    buffers = {name: inputs.pop(name) for name in list(inputs) if name.startswith("running")}
    call = dual(bn_act_dual, training, "relu")

    def function(*leaves: Tensor) -> Tensor:
        return call(**dict(zip(inputs, leaves, strict=True)), **{name: b.clone() for name, b in buffers.items()})

    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    with use_backend(backend):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "vectors"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_create_graph_in_every_dtype(dtype, vectors, training):
    """A gradient penalty: the second derivative goes through PyTorch's own ops, whatever ran forward."""

    def penalty_gradients(function, inputs: Inputs) -> list[Tensor]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in ("x", "residual", "weight", "bias")}
        buffers = {name: inputs[name].clone() for name in ("running_mean", "running_var")}
        out = function(**leaves, **buffers, training=training)
        (grad,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), list(leaves.values()), allow_unused=True))

    inputs = make_inputs((4, 5, 6, 7), dtype, vectors=vectors, residual=True)
    actual = penalty_gradients(bn_act, inputs)
    exact = penalty_gradients(pytorch_bn_act, {name: t.double() for name, t in inputs.items()})
    # The second derivative is of the size of its largest element; it is built of a handful of roundings, of which
    # those of the ReLU's input may flip a mask: an element or two of 840 in half precision.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    for mine, want in zip(actual, exact, strict=True):
        assert (mine is None) == (want is None)
        if want is not None:
            distance = (mine.double() - want).norm() / want.norm()
            assert distance < tolerance, f"{distance}"


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto"])
@pytest.mark.parametrize("wanted", WANTED, ids=lambda names: " and ".join(names) or "nothing")
def test_gradients_that_nobody_wants_are_not_made_and_change_nothing(wanted, backend):
    for training, residual, activation in FORMS.values():
        inputs = make_inputs((3, 5, 4, 6), residual=residual)
        function, pytorch = both(training=training, activation=activation)
        cotangent = make_cotangent(pytorch, inputs)
        everything = step(function, inputs, cotangent, backend=backend)
        actual = step(function, inputs, cotangent, backend=backend, wanted=wanted)
        gradients = {f"gradient of {name}" for name in wanted if inputs[name] is not None}
        expected = {n: t for n, t in everything.items() if not n.startswith("gradient") or n in gradients}
        assert_same(actual, expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_of_dual_that_nobody_wants(backend):
    for training in (True, False):
        call = dual(bn_act_dual, training, "relu")
        inputs = dual_inputs((3, 5, 4, 6))
        cotangent = make_cotangent(call, inputs)
        everything = step(call, inputs, cotangent, backend=backend)
        for wanted in ((), ("x",), ("x2",), ("weight2",), ("weight", "bias"), ("bias", "x2"), ("weight", "bias2")):
            actual = step(call, inputs, cotangent, backend=backend, wanted=wanted)
            gradients = {f"gradient of {name}" for name in wanted}
            assert_same(actual, {n: t for n, t in everything.items() if n[:8] != "gradient" or n in gradients})


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_without_grad_mode_the_output_and_the_buffers_are_the_same(backend):
    for training, residual, activation in FORMS.values():
        function, _ = both(training=training, activation=activation)
        for call, inputs in (
            (function, make_inputs((3, 5, 4, 6), residual=residual)),
            (dual(bn_act_dual, training, activation), dual_inputs((3, 5, 4, 6))),
        ):
            expected = step(call, inputs, torch.zeros(3, 5, 4, 6), backend=backend)
            for mode in (torch.no_grad(), torch.inference_mode()):
                with mode:
                    actual = step(call, inputs, torch.zeros(3, 5, 4, 6), backend=backend)
                assert_same(actual, {name: t for name, t in expected.items() if not name.startswith("gradient")})


@pytest.mark.parametrize("name", ["x", "weight"])
def test_changing_in_place_what_backward_needs_raises(name):
    leaves = {n: t.requires_grad_(n[:7] != "running") for n, t in make_inputs((3, 5, 4, 6), residual=True).items()}
    out = bn_act(**leaves, training=True)
    with torch.no_grad():
        leaves[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_changing_the_output_in_place():
    """With a residual the output is the ReLU's mask; without one it is kept for nothing, and may change."""
    inputs = make_inputs((3, 5, 4, 6), residual=True)
    x = inputs.pop("x").requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        bn_act(x, **inputs, training=True).add_(1).sum().backward()
    inputs["residual"] = None
    outputs = bn_act(x, **inputs).mul_(2), pytorch_bn_act(x, **inputs) * 2
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in outputs))


def test_nothing_but_x_the_output_and_vectors_is_saved():
    inputs = make_inputs((3, 5, 8, 8), residual=True)
    x = inputs.pop("x").requires_grad_()
    for residual in (inputs.pop("residual"), None):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            bn_act(x, **inputs, residual=residual, training=True)
        images = [tensor for tensor in saved if tensor.dim() == 4]
        assert len(images) == (1 if residual is None else 2)
        assert x.data_ptr() in [tensor.data_ptr() for tensor in images]


@pytest.mark.parametrize("heard", [False, True])
def test_backward_runs_on_the_backend_that_forward_was_asked_for_in_any_thread(monkeypatch, heard):
    calls = []

    def counted(function):
        def call(*args):
            calls.append(function.__name__)
            return function(*args)

        return call

    for name in ("bn_stats", "bn_apply", "bn_grad_stats", "bn_grad_apply"):
        monkeypatch.setattr(reference, name, counted(getattr(reference, name)))
    inputs = make_inputs((3, 5, 4, 6))
    inputs["x"].requires_grad_()

    with use_backend("reference"):
        out = bn_act(**inputs, training=True)

    def work():
        with FlopCounterMode(display=False) if heard else contextlib.nullcontext():  # who listens at the dispatcher
            out.sum().backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert calls == ["bn_stats", "bn_apply", "bn_grad_stats", "bn_grad_apply"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    """As with ``F.batch_norm``, whose input's dtype is its output's."""
    for form in FORMS.values():
        training, residual, activation = form
        inputs = make_inputs((3, 5, 4, 6), dtype, residual=residual)
        function, pytorch = both(training=training, activation=activation)
        cotangent = make_cotangent(pytorch, inputs)
        expected = step(function, inputs, cotangent)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = step(function, inputs, cotangent)
        assert_same(actual, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    inputs = make_inputs((3, 5, 4, 6), residual=True)
    function, pytorch = both(training=True)
    cotangent = make_cotangent(pytorch, inputs)

    def checkpointed(x, **others):
        return torch.utils.checkpoint.checkpoint(lambda x: function(x, **others) * 1, x, use_reentrant=False)

    actual, expected = step(checkpointed, inputs, cotangent), step(function, inputs, cotangent)
    for name in ("output", "gradient of x", "gradient of weight", "gradient of residual"):
        assert torch.equal(actual[name], expected[name]), name


def test_torch_func_transforms():
    inputs = make_inputs((3, 5, 4, 6), residual=True)
    x = inputs.pop("x")

    def gradients(function):
        def loss(x):
            return function(x, **inputs).square().sum()

        _, forward_mode = torch.func.jvp(loss, (x,), (x,))
        per_sample = torch.func.vmap(torch.func.grad(lambda x: function(x[None], **inputs_of_one).square().sum()))(x)
        return torch.func.grad(loss)(x), forward_mode, per_sample

    inputs_of_one = inputs | {"residual": None}
    for actual, expected in zip(gradients(bn_act), gradients(pytorch_bn_act), strict=True):
        torch.testing.assert_close(actual, expected)
    norm = BatchNorm(*(inputs[name] for name in ("weight", "bias", "running_mean", "running_var")))
    grads = [torch.func.grad(lambda x, f=f: f(x, norm, x, norm).sum())(x) for f in (bn_act_dual, pytorch_bn_act_dual)]
    torch.testing.assert_close(*grads)


def test_forward_mode():
    inputs = make_inputs((3, 5, 4, 6))
    x = inputs.pop("x")
    with torch.autograd.forward_ad.dual_level():
        dual_x = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(function(dual_x, **inputs)).tangent
            for function in (bn_act, pytorch_bn_act)
        ]
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("training", [True, False])
def test_create_graph_where_a_weight_is_used_twice(training):
    """The first derivative is that of each use, counted once, whether or not a second one is wanted."""
    x, weight, bias = torch.randn(3, 4, 5, 5).double(), torch.rand(4).double(), torch.randn(4).double()
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    weight.requires_grad_(), bias.requires_grad_()

    def found(function, **settings):
        y = function(x, mean, var, **settings)
        return torch.autograd.grad((function(y, mean, var, **settings) ** 2).sum(), (weight, bias), create_graph=True)

    def plain(x, mean, var):
        return torch.nn.functional.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

    def fused(x, mean, var):
        return bn_act(x, weight, bias, mean.clone(), var.clone(), training=training, activation=None)

    with use_backend("reference"):
        actual = found(fused)
    for got, want in zip(actual, found(plain), strict=True):
        torch.testing.assert_close(got, want)
