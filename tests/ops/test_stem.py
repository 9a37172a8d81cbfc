"""``conv_bn_act_pool`` against the plain PyTorch that its docstring says it equals, at every level."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.bench.ledger import saved_bytes
from fused_resnet.ops import BatchNorm, ConvNorm, conv_bn_act_pool, use_backend, use_fusion_level
from fused_resnet.ops.conv_norm import Done
from tests.accuracy import assert_at_most_twice

stem = importlib.import_module("fused_resnet.ops.stem")
LEVELS = (0, 1, 2, 3)
BUFFERS = ("running_mean", "running_var")
Tensors = dict[str, Tensor]


def tensors(dtype: torch.dtype = torch.float64, size: tuple[int, int] = (13, 11), mean: float = 0.0) -> Tensors:
    """An image of 3 channels, a 5x5 convolution to 6 and its norm."""
    return {
        "x": torch.randn(2, 3, *size, dtype=torch.float64).add(mean).to(dtype),
        "conv_weight": torch.randn(6, 3, 5, 5, dtype=torch.float64).mul(0.1).to(dtype),
        "weight": torch.rand(6, dtype=torch.float64).add(0.5).to(dtype),
        "bias": torch.randn(6, dtype=torch.float64).to(dtype),
        "running_mean": torch.randn(6, dtype=torch.float64).to(dtype),
        "running_var": torch.rand(6, dtype=torch.float64).add(0.5).to(dtype),
    }


def fused(t: Tensors, training: bool = True, **pool: Any) -> Tensor:
    norm = BatchNorm(t.get("weight"), t.get("bias"), t["running_mean"], t["running_var"], training)
    return conv_bn_act_pool(t["x"], ConvNorm(t["conv_weight"], norm, (2, 2), (2, 2)), **pool)


def plain(t: Tensors, training: bool = True, **pool: Any) -> Tensor:
    y = F.conv2d(t["x"], t["conv_weight"], None, 2, 2)
    z = F.batch_norm(y, t["running_mean"], t["running_var"], t.get("weight"), t.get("bias"), training)
    return F.max_pool2d(F.relu(z), **({"kernel_size": 3, "stride": 2, "padding": 1} | pool))


def step(function: Callable[..., Tensor], given: Tensors, wanted: tuple[str, ...] | None = None, **kw: Any) -> Tensors:
    leaves = {name: tensor.detach().clone() for name, tensor in given.items()}
    for name, tensor in leaves.items():
        tensor.requires_grad_(name not in BUFFERS and (wanted is None or name in wanted))
    out = function(leaves, **kw)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out.backward(cotangent.to(out.dtype))
    result = {"output": out.detach()} | {name: leaves[name] for name in BUFFERS}
    return result | {f"gradient of {name}": t.grad for name, t in leaves.items() if t.grad is not None}


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training": False},
        {"kernel_size": 2, "stride": 2, "padding": 0},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
    ],
    ids=str,
)
def test_equals_plain_pytorch(settings: dict[str, Any], level: int) -> None:
    given = tensors()
    with use_backend("reference"), use_fusion_level(level):
        actual = step(fused, given, **settings)
    assert_same(actual, step(plain, given, **settings))


@pytest.mark.parametrize("level", [2, 3])
def test_without_weight_and_bias(level: int) -> None:
    given = tensors()
    del given["weight"], given["bias"]
    with use_backend("reference"), use_fusion_level(level):
        assert_same(step(fused, given), step(plain, given))


@pytest.mark.parametrize("wanted", [("conv_weight",), ("bias",), ("x",), ("weight", "bias")], ids=str)
def test_only_what_is_wanted(wanted: tuple[str, ...]) -> None:
    given = tensors()
    with use_backend("reference"), use_fusion_level(3):
        assert_same(step(fused, given, wanted), step(plain, given, wanted))


@pytest.mark.parametrize("training", [True, False])
def test_derivatives_against_finite_differences(training: bool) -> None:
    given = tensors(size=(7, 6))
    names = [name for name in given if name not in BUFFERS]

    def function(*values: Tensor) -> Tensor:
        buffers = {name: given[name].clone() for name in BUFFERS}
        return fused(dict(zip(names, values, strict=True)) | buffers, training)

    values = [given[name].requires_grad_() for name in names]
    with use_backend("reference"), use_fusion_level(3):
        assert torch.autograd.gradcheck(function, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(dtype: torch.dtype) -> None:
    given = tensors(dtype, (33, 31), mean=2.0)
    with use_backend("reference"), use_fusion_level(3):
        actual = step(fused, given)
    baseline, exact = step(plain, given), step(plain, {name: tensor.double() for name, tensor in given.items()})
    assert list(actual) == list(baseline) == list(exact)
    for name, tensor in actual.items():
        terms = 2 * 17 * 16 if name.startswith("gradient of") and name != "gradient of x" else 1
        magnitude = exact[name].abs().max().item() * (4 if name.startswith("gradient") else 1)
        assert_at_most_twice(tensor, baseline[name], exact[name], what=name, terms=terms, magnitude=magnitude)


def test_autocast_keeps_the_gradients_of_float32_weights() -> None:
    given = tensors(torch.float32, (17, 17))
    with torch.autocast("cpu", torch.bfloat16), use_backend("reference"), use_fusion_level(3):
        actual = step(fused, given)
    assert actual["output"].dtype == torch.bfloat16 and actual["gradient of conv_weight"].dtype == torch.float32
    exact = step(plain, {name: tensor.double() for name, tensor in given.items()})
    for name in ("output", "gradient of conv_weight", "running_mean"):
        scale = exact[name].abs().max()
        assert (actual[name] - exact[name]).abs().max() < 0.05 * scale, name


def test_what_is_kept_for_backward() -> None:
    """x, the convolution's output, a byte for each maximum, and vectors: not the activation, and no 64-bit indices."""
    conv = nn.Conv2d(3, 6, 5, 2, 2, bias=False)
    x, norm = torch.randn(2, 3, 13, 11), nn.BatchNorm2d(6)
    model = nn.ModuleList([conv, norm])
    t = {"x": x, "conv_weight": conv.weight, "weight": norm.weight, "bias": norm.bias}
    t |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
    with use_backend("reference"), use_fusion_level(3):
        found = saved_bytes(model, lambda: fused(t))
    assert found == 4 * x.numel() + 4 * 2 * 6 * 7 * 6 + 2 * 6 * 4 * 3 + 2 * 4 * 6


def test_no_grad_in_training_moves_the_statistics() -> None:
    given, expected = tensors(), tensors()
    expected = {name: tensor.clone() for name, tensor in given.items()}
    with torch.no_grad(), use_backend("reference"), use_fusion_level(3):
        out = fused(given)
    torch.testing.assert_close(out, plain(expected))
    torch.testing.assert_close(given["running_var"], expected["running_var"])


def test_compiles_without_a_graph_break() -> None:
    given = tensors(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for name, tensor in step(compiled, given).items():
        torch.testing.assert_close(tensor, step(fused, given)[name], msg=name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size must be >= 1; got 0"),
        ({"kernel_size": 3, "padding": 2}, ValueError, r"padding must be at most half of kernel_size, \[3, 3\]"),
        ({"stride": "2"}, TypeError, "stride must be an int or two ints"),
        ({"kernel_size": 20}, ValueError, "the pooling must leave at least one pixel"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = tensors()
    before = given["running_mean"].clone()
    with use_fusion_level(3), pytest.raises(error, match=message) as caught:
        fused(given, **change)
    assert isinstance(caught.value, RuntimeError)
    assert torch.equal(given["running_mean"], before)
    with pytest.raises(TypeError, match="link must be a ConvNorm; got str"):
        conv_bn_act_pool(given["x"], "link")  # type: ignore[arg-type]


def test_a_second_derivative_of_an_image_that_is_not_dense() -> None:
    base = torch.randn(2, 6, 13, 11, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    given = {name: tensor for name, tensor in tensors().items() if name != "x"}

    def gradient(function: Callable[..., Tensor]) -> Tensor:
        buffers = {name: given[name].clone() for name in BUFFERS}
        out = function(given | buffers | {"x": base[:, :3]})
        (found,) = torch.autograd.grad(out.square().sum(), base, create_graph=True)
        return torch.autograd.grad(found.square().sum(), base)[0]

    with use_backend("reference"), use_fusion_level(3):
        actual = gradient(fused)
    torch.testing.assert_close(actual, gradient(plain))


def test_no_second_derivative_through_statistics_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As residual_block and bn_act say; a wrong number would be worse."""
    given = tensors()
    given["conv_weight"].requires_grad_()
    kept = Done.kept
    monkeypatch.setattr(Done, "kept", lambda done, parameters: [*kept(done, parameters)[:-1], torch.tensor(0.5)])
    with use_backend("reference"), use_fusion_level(3):
        out = fused(given)
        with pytest.raises(NotImplementedError, match="several ranks"):
            torch.autograd.grad(out.sum(), given["conv_weight"], create_graph=True)
