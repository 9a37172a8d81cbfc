"""One training step of a module as named tensors, to hold a fused module against the plain PyTorch it stands for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

from fused_resnet.ops import use_backend

# Rounding, relative to the largest value of a tensor. float64 rounds at 1e-16 and float32 at 6e-8; a few layers of sums
# over a few hundred values amplify that by less than 1000. A wrong formula or a missed update shows at 1e-3 and above.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5}
# The same for a sum that may cancel, relative to the sum of its terms' absolute values (``terms_of_gradients``).
TOLERANCE_OF_TERMS = {dtype: tolerance / 10 for dtype, tolerance in TOLERANCE.items()}

# The reference runs our own autograd in float64; "auto" is what users get, float64 falling back to PyTorch's own ops.
LANES = pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float64, "reference"), (torch.float64, "auto"), (torch.float32, "auto")],
    ids=["float64-reference", "float64-auto", "float32-auto"],
)


def step(modules: nn.Module, call: Callable[..., Tensor], *inputs: Tensor, backend: str = "auto") -> dict[str, Tensor]:
    """Output, every gradient and every buffer after ``call(*inputs)`` and backward of a fixed random cotangent."""
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    modules.zero_grad()
    with use_backend(backend) if backend != "auto" else contextlib.nullcontext():
        out = call(*inputs)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        out.backward(cotangent.to(out.dtype))
    result = {"output": out.detach()}
    result |= {f"gradient of input {i}": tensor.grad for i, tensor in enumerate(inputs) if tensor.grad is not None}
    result |= {f"gradient of {name}": p.grad for name, p in modules.named_parameters() if p.grad is not None}
    result |= {f"buffer {name}": buffer.clone() for name, buffer in modules.named_buffers()}
    return result


@contextlib.contextmanager
def terms_of_gradients(model: nn.Module) -> Iterator[dict[str, float]]:
    """For every parameter of the plain norms and convolutions inside, once a backward is done: the largest sum that its
    gradient would be if all terms were positive. Rounding grows with the terms, however much of them cancels."""
    terms: dict[str, float] = {}

    def watch(name: str, module: nn.Module, x: Tensor, out: Tensor) -> None:
        def of_norm(grad: Tensor) -> None:
            normalized = (out - module.bias[:, None, None]) / module.weight[:, None, None]
            for parameter, factor in (("weight", normalized), ("bias", torch.ones(()))):
                terms[f"gradient of {name}.{parameter}"] = (grad * factor).abs().sum((0, 2, 3)).max().item()

        def of_conv(grad: Tensor) -> None:
            sums = torch.nn.grad.conv2d_weight(
                x.abs(), module.weight.shape, grad.abs(), module.stride, module.padding, module.dilation, module.groups
            )
            terms[f"gradient of {name}.weight"] = sums.max().item()

        out.register_hook(of_norm if isinstance(module, nn.BatchNorm2d) else of_conv)

    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: watch(name, module, args[0].detach(), out))
        for name, module in model.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.Conv2d))
    ]
    try:
        yield terms
    finally:
        for handle in handles:
            handle.remove()


def assert_close(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    tolerance: float | None = None,
    terms: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Same names, shapes and dtypes; values within ``tolerance`` (by default TOLERANCE) of each tensor's largest, or
    within TOLERANCE_OF_TERMS of its terms."""
    assert list(actual) == list(expected)
    for name, want in expected.items():
        got = actual[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        limit = 0.0
        if want.is_floating_point():
            scale = max(terms.get(name, want.abs().max().item()), 1e-3)
            default = TOLERANCE_OF_TERMS if name in terms else TOLERANCE
            limit = (default[want.dtype] if tolerance is None else tolerance) * scale
        assert torch.allclose(got, want, rtol=0, atol=limit), f"{name}: {(got - want).abs().max()} > {limit}"


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same, bit for bit."""
    assert list(actual) == list(expected)
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name


def randomize(module: nn.Module) -> nn.Module:
    """Gives every norm weights and statistics that matter: away from the 1 and 0 it starts with."""
    for norm in module.modules():
        for tensor, low, high in (
            (getattr(norm, "running_mean", None), -0.5, 0.5),
            (getattr(norm, "running_var", None), 0.5, 2.0),
            (getattr(norm, "weight", None) if isinstance(norm, nn.BatchNorm2d) else None, 0.5, 1.5),
            (getattr(norm, "bias", None) if isinstance(norm, nn.BatchNorm2d) else None, -0.5, 0.5),
        ):
            if tensor is not None:
                nn.init.uniform_(tensor, low, high)
    return module


@contextlib.contextmanager
def counted(function: Callable[..., object]) -> Iterator[list[str]]:
    """A name for each call of a function on this thread; a patch in its place would be noticed, and called."""
    calls: list[str] = []
    code = getattr(function, "__code__", None)  # of what is not built in

    def see(frame, event, argument):
        if (event == "call" and frame.f_code is code) or (event == "c_call" and argument is function):
            calls.append(function.__qualname__)

    sys.setprofile(see)
    try:
        yield calls
    finally:
        sys.setprofile(None)
