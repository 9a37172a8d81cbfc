"""A forward and backward pass of a function of tensors, as named tensors: output, gradients, buffers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops import BatchNorm, bn_act, use_backend
from fused_resnet.ops.route.reasons import unavailable
from tests.accuracy import assert_at_most_twice

BUFFERS = ("running_mean", "running_var")
HALF = (torch.bfloat16, torch.float16)
DTYPES = [torch.float32, *HALF]
FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}

NEEDS_NATIVE = pytest.mark.skipif(bool(unavailable("native")), reason="; ".join(unavailable("native")) or "it is there")
"""The backends that run on any CPU; "auto" is native where it is built."""
CPU_BACKENDS = [pytest.param("native", marks=NEEDS_NATIVE), "reference"]

# (training, residual, activation)
FORMS = {
    "training, residual, relu": (True, True, "relu"),
    "training, relu": (True, False, "relu"),
    "training, residual": (True, True, None),
    "training": (True, False, None),
    "eval, residual, relu": (False, True, "relu"),
    "eval, relu": (False, False, "relu"),
    "eval, residual": (False, True, None),
}

Inputs = dict[str, Tensor | None]


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    *,
    residual: bool = False,
    vectors: torch.dtype | None = None,
) -> Inputs:
    """Random arguments of ``bn_act``; the vectors are float32 beside half-precision images, as under autocast."""
    channels = shape[1]
    vectors = vectors or (torch.float32 if dtype in HALF else dtype)
    inputs: Inputs = {
        "x": (torch.randn(shape) * 1.5 + 0.5).to(dtype).contiguous(memory_format=memory_format),
        "residual": torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) if residual else None,
        "weight": (torch.rand(channels) + 0.5).to(vectors),
        "bias": torch.randn(channels).mul(0.5).to(vectors),
        "running_mean": torch.randn(channels).to(vectors),
        "running_var": (torch.rand(channels) + 0.5).to(vectors),
    }
    return inputs


def pytorch_bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    process_group: None = None,
) -> Tensor:
    """What ``bn_act``'s docstring says it equals."""
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    z = z if residual is None else z + residual
    return z if activation is None else F.relu(z)


def pytorch_bn_act_dual(
    x: Tensor, norm: BatchNorm, x2: Tensor, norm2: BatchNorm, *, activation: str | None = "relu"
) -> Tensor:
    """What ``bn_act_dual``'s docstring says it equals."""
    z = pytorch_bn_act(x, **norm._asdict(), activation=None) + pytorch_bn_act(x2, **norm2._asdict(), activation=None)
    return z if activation is None else F.relu(z)


def both(**settings: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """bn_act and its meaning, with these settings."""
    return partial(bn_act, **settings), partial(pytorch_bn_act, **settings)


def dual(function: Callable[..., Tensor], training: bool, activation: str | None) -> Callable[..., Tensor]:
    """bn_act_dual or its meaning as a function of flat names."""

    def call(activation: str | None = activation, **named: Tensor) -> Tensor:
        norms = [
            BatchNorm(*(named[name + s] for name in ("weight", "bias", "running_mean", "running_var")), training)
            for s in ("", "2")
        ]
        return function(named["x"], norms[0], named["x2"], norms[1], activation=activation)

    return call


def dual_inputs(shape: tuple[int, ...], *args: Any) -> Inputs:
    """Random arguments of what ``dual`` returns."""
    first, second = make_inputs(shape, *args), make_inputs(shape, *args)
    inputs = {**first, **{name + "2": tensor for name, tensor in second.items()}}
    del inputs["residual"], inputs["residual2"]
    return inputs


def step(
    function: Callable[..., Tensor],
    inputs: Inputs,
    cotangent: Tensor,
    *,
    backend: str = "auto",
    wanted: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """``function(**inputs)`` and its backward pass; ``wanted`` names what requires a gradient (all but the buffers)."""
    leaves: Inputs = {}
    for name, tensor in inputs.items():
        is_buffer = name.rstrip("2") in BUFFERS
        if tensor is None:
            leaves[name] = None
        elif is_buffer:
            leaves[name] = tensor.clone()
        else:
            leaves[name] = tensor.detach().requires_grad_(wanted is None or name in wanted)
    with use_backend(backend):
        out = function(**leaves)
        if out.requires_grad:
            out.backward(cotangent.to(out.dtype))
    result = {"output": out.detach()}
    for name, tensor in leaves.items():
        if tensor is not None and name.rstrip("2") in BUFFERS:
            result[name] = tensor
        elif tensor is not None and tensor.grad is not None:
            result[f"gradient of {name}"] = tensor.grad
    return result


def widen(inputs: Inputs) -> Inputs:
    """The same values in float64."""
    return {name: None if tensor is None else tensor.detach().double() for name, tensor in inputs.items()}


def make_cotangent(pytorch: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """A random gradient for the output, zero where rounding may decide on which side of the ReLU's corner z lies."""
    with torch.no_grad():
        exact = pytorch(
            **{name: None if t is None else t.clone() for name, t in widen(inputs).items()}, activation=None
        )
    dtypes = {tensor.dtype for name, tensor in inputs.items() if tensor is not None and name in ("x", "x2", "residual")}
    narrowest = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    return torch.where(exact.abs() > 0.05, torch.randn(exact.shape).to(narrowest), 0)


def assert_accurate(
    function: Callable[..., Tensor], pytorch: Callable[..., Tensor], inputs: Inputs, *, backend: str = "auto"
) -> dict[str, Tensor]:
    """The accuracy rule on the output, every gradient and every buffer of ``function``; returns them."""
    cotangent = make_cotangent(pytorch, inputs)
    actual = step(function, inputs, cotangent, backend=backend)
    baseline = step(pytorch, inputs, cotangent)
    exact = step(pytorch, widen(inputs), cotangent)
    assert list(actual) == list(baseline) == list(exact)
    x = inputs["x"]
    assert x is not None
    for name, tensor in actual.items():
        is_sum = name.startswith("gradient") and tensor.dim() == 1
        terms = x.numel() // x.shape[1] if is_sum else 1
        assert_at_most_twice(tensor, baseline[name], exact[name], what=name, terms=terms)
    return actual


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and bit for bit the same values (a NaN is a NaN)."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{name} differs")
