"""The C++ kernels: conversions, the order of sums, large outputs and the memory that is kept for them."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import Tensor

from fused_resnet import ops
from fused_resnet.arguments import Norm
from fused_resnet.ops import BackendError, bn_act, reference, use_backend
from fused_resnet.ops.backends.native import memory
from fused_resnet.ops.route import reasons
from tests.ops.step import FORMATS, HALF, NEEDS_NATIVE, assert_same, both, make_inputs, step

pytestmark = NEEDS_NATIVE
if not reasons.unavailable("native"):
    from fused_resnet.ops.backends import native

SCALES = [1.0, -1.0, 1 / 3, 1 + 2**-10, 3.0, 2.0**-9, 2.0**-15 * 1.1, 1000.0]


def every_value(dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """All 65536 bit patterns as one image of (2, 32, 32, 32): two images of 32 channels."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return bits.view(2, 32, 32, 32).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_precision_value_converts_as_in_torch(dtype, memory_format):
    """Reading is exhaustive at scale 1; the other scales put the results between representable values, onto ties, into
    the subnormals and past the largest."""
    x = every_value(dtype, memory_format)
    zero = torch.zeros(32)
    with use_backend("native"):
        for scale in SCALES:
            actual = torch.ops.fused_resnet.bn_apply(x, zero, torch.full((32,), scale), None, None, None, False)
            expected = (x.float() * scale).to(dtype)
            finite = ~expected.isnan()
            assert torch.equal(actual.isnan(), expected.isnan())
            assert torch.equal(actual[finite], expected[finite]), f"scale {scale}"
        added = torch.ops.fused_resnet.bn_apply(x, zero, zero, None, None, x, True)
        expected = torch.relu((x * 0).float() + x.float()).to(dtype)
        torch.testing.assert_close(added, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_the_same_for_any_number_of_threads_and_every_run(dtype, memory_format):
    for shape in ((4, 37, 33, 31), (2, 3, 97, 90)):
        inputs = make_inputs(shape, dtype, memory_format, residual=True)
        cotangent = torch.randn(shape).to(dtype)
        function, _ = both(training=True)
        expected = step(function, inputs, cotangent, backend="native")
        for threads in (1, 2, 2, 2, 5):
            torch.set_num_threads(threads)
            assert_same(step(function, inputs, cotangent, backend="native"), expected)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 67), (torch.bfloat16, 136)], ids=str)
def test_large_outputs(dtype, channels, memory_format):
    """They lie in memory that was used before: each image of a large batch is what it is alone."""
    torch.set_num_threads(2)
    inputs = make_inputs((2, channels, 257, 256), dtype, memory_format)
    assert inputs["x"].nbytes > 32 << 20
    cotangent = torch.randn(inputs["x"].shape).to(dtype).contiguous(memory_format=memory_format)
    function, _ = both(training=False)
    whole = step(function, inputs, cotangent, backend="native", wanted=("x",))
    for image in (0, 1):
        one = inputs | {"x": inputs["x"][image : image + 1]}
        alone = step(function, one, cotangent[image : image + 1], backend="native", wanted=("x",))
        for name in ("output", "gradient of x"):
            assert torch.equal(whole[name][image : image + 1], alone[name]), name


def test_views_of_values_that_are_not_in_memory():
    """A lazily negated view holds the negatives of its values; C++ must not read those."""
    inputs = make_inputs((3, 5, 4, 6))
    x = inputs.pop("x")
    lazily_negated = torch.complex(x, -x).conj().imag
    assert lazily_negated.is_neg()
    assert torch.equal(bn_act(lazily_negated, **inputs), bn_act(x.clone(), **inputs))


def test_running_statistics_that_are_views():
    inputs = make_inputs((3, 5, 4, 6))
    running = torch.stack([inputs["running_mean"], inputs["running_var"]], dim=1)
    views = inputs | {"running_mean": running[:, 0], "running_var": running[:, 1]}
    with use_backend("native"):
        bn_act(**views, training=True)
        bn_act(**inputs, training=True)
    assert torch.equal(running, torch.stack([inputs["running_mean"], inputs["running_var"]], dim=1))


def test_large_outputs_are_not_overwritten_while_anything_sees_them():
    """Their memory is used again once nobody does."""
    inputs = make_inputs((2, 64, 128, 96), memory_format=FORMATS["nhwc"])
    assert inputs["x"].nbytes > memory.LARGE
    with use_backend("native"):
        first = bn_act(**inputs)
        expected = first.clone()
        view = first[1, 3:5]
        for scale in (2.0, 3.0):
            bn_act(**inputs | {"weight": inputs["weight"] * scale})
        assert torch.equal(first, expected)
        del first
        other = bn_act(**inputs | {"weight": inputs["weight"] * 2})
        assert torch.equal(view, expected[1, 3:5])
        assert not torch.equal(other, expected)
        del other, view
        assert memory.kept_bytes() >= inputs["x"].nbytes
        reused = bn_act(**inputs)
        assert torch.equal(reused, expected)
        ops.empty_cache()
        assert memory.kept_bytes() == 0
        assert torch.equal(reused, expected)


def test_large_outputs_behave_as_tensors_do():
    inputs = make_inputs((2, 64, 128, 96), residual=True)
    large = bn_act(**inputs)
    reference = large.clone()
    assert large.is_contiguous() and large.storage_offset() == 0
    assert torch.equal(copy.deepcopy(large), reference)
    buffer = io.BytesIO()
    torch.save(large, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), reference)
    assert torch.equal(large.add_(1), reference + 1)
    with torch.inference_mode():
        assert torch.equal(bn_act(**inputs), reference)
    results = []
    leaves = {name: tensor.requires_grad_(name[:7] != "running") for name, tensor in inputs.items()}
    threads = [threading.Thread(target=lambda: results.append(bn_act(**leaves).sum().backward())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("height", [1e1, 1e3, 1e5])
def test_statistics_beside_a_bright_border(height, memory_format):
    """The first pixels of every plane are far from the rest: what sums are taken around must not be they alone."""
    x = torch.randn(2, 8, 64, 64)
    x[:, :, 0, :4] = height
    variance, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    got_mean, got_invstd = native.bn_stats(x.contiguous(memory_format=memory_format), (None, None, 0.1, 0.0))
    torch.testing.assert_close(got_mean.double(), mean, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(got_invstd.double(), variance.rsqrt(), rtol=3e-6, atol=0.0)


def test_ops_called_by_themselves_refuse_what_would_be_read_past_the_end():
    x, short = torch.randn(2, 64, 3, 3), torch.zeros(3)
    with use_backend("native"), pytest.raises(BackendError, match=r"\(3,\)"):
        torch.ops.fused_resnet.bn_apply(x, short, torch.ones(64), None, None, None, True)
    with use_backend("native"), pytest.raises(BackendError, match=r"\(3,\)"):
        torch.ops.fused_resnet.bn_stats(x, short, torch.ones(64), 0.1, 1e-5)


def test_dz_is_written_without_a_relu_too():
    x, out, grad_out = (torch.randn(2, 8, 3, 3) for _ in range(3))
    for relu in (False, True):
        arguments = (grad_out, x, out, Norm(torch.zeros(8), torch.ones(8)), relu)
        for got, expected in zip(native.bn_grad_stats(*arguments), reference.bn_grad_stats(*arguments), strict=True):
            torch.testing.assert_close(got, expected)


def test_another_default_device_changes_nothing():
    x, weight, bias = torch.randn(2, 64, 4, 4, requires_grad=True), torch.rand(64), torch.rand(64)
    expected = bn_act(x, weight, bias, None, None, training=True)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    with torch.device("meta"):
        out = bn_act(x, weight, bias, None, None, training=True)
        (again,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, expected) and torch.equal(again, grad)


def test_a_tensor_that_only_wraps_others_is_no_none():
    class Wrapper(Tensor):
        @staticmethod
        def __new__(cls, inner: Tensor) -> Tensor:
            return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError(func)

    with pytest.raises(RuntimeError, match="memory of their own; got a Wrapper"):
        native.bn_apply(Wrapper(torch.rand(1, 4, 2, 2)), Norm(torch.zeros(4), torch.ones(4)), None, True)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("scale", [1e15, 1e18, 1e20, 1e30, 3e37])
def test_statistics_of_numbers_near_the_largest(scale: float, memory_format: torch.memory_format):
    """Their squares are no float32; nor, of the largest, the sums of eight."""
    x = (torch.randn(3, 5, 12, 11) * scale).contiguous(memory_format=memory_format)
    running_mean, running_var = torch.zeros(5), torch.ones(5)
    with use_backend("native"):
        actual = bn_act(x, None, None, running_mean, running_var, training=True, activation=None)
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running_mean.double(), 0.1 * x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6 * scale)
    x[0, 0, 0, 0] = float("inf")
    with use_backend("native"):
        actual = bn_act(x, None, None, None, None, training=True, activation=None)
    assert actual[:, 0].isnan().all() and not actual[:, 1:].isnan().any()  # as in torch
