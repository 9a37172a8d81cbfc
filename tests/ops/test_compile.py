"""The ops as PyTorch's dispatcher and compiler see them: opcheck, fake tensors, torch.compile without graph breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet
from fused_resnet.arguments import Norm, PoolSettings
from fused_resnet.ops import bn_act, bn_act_dual, conv_bn_act, reference, use_backend
from fused_resnet.ops.reference import statistics_dtype
from fused_resnet.ops.schemas import SCHEMAS
from tests.ops.step import FORMATS, FORMS, dual, dual_inputs, make_cotangent, make_inputs, step

EAGER_AUTOGRAD = "aot_eager"
"""The compiler's front and middle: it traces, functionalises and partitions, and runs the graphs op by op."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def suggested_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def op_arguments(x: Tensor, residual: Tensor) -> dict[str, tuple]:
    channels = x.shape[1]
    mean, invstd, weight, bias, running_mean, running_var = (
        torch.rand(channels, dtype=statistics_dtype(x)) + 0.5 for _ in range(6)
    )
    grad, out = torch.randn_like(x), torch.relu(residual)
    conv_weight = torch.randn(8, channels, 3, 3, dtype=x.dtype)
    scale, shift = (torch.rand(8, dtype=statistics_dtype(x)) for _ in range(2))
    sizes = ([1, 2], [1, 1], [1, 1], 1)
    conv = (*sizes, True)
    y = torch.ops.fused_resnet.conv_bn_act(x, conv_weight, None, None, None, *sizes, False)
    dz, coefficients = torch.randn_like(y), torch.rand(4, 8, dtype=statistics_dtype(x))
    norm, window = (mean, invstd, weight, bias), ([3, 3], [2, 2], [1, 1])
    pooled, place = reference.bn_apply_pool(x, Norm(*norm), PoolSettings.of(*window))
    mask = reference.bn_apply_mask(x, Norm(*norm), residual)[1]
    image = torch.randn(2, 3, 12, 9, dtype=x.dtype).contiguous(memory_format=suggested_format(x))
    stem_weight = torch.randn(64, 3, 7, 7, dtype=x.dtype)
    return {
        "bn_stats": (x, running_mean, running_var, 0.1, 1e-5),
        "bn_apply": (x, mean, invstd, weight, bias, residual, True),
        "bn_apply_dual": (x, mean, invstd, weight, bias, residual, mean, invstd, None, bias, True),
        "bn_grad_stats": (grad, x, out, mean, invstd, weight, bias, True),
        "bn_grad_apply": (grad, x, mean, invstd, weight, bias, mean, bias, False),
        "bn_apply_mask": (x, *norm, residual),
        "bn_apply_dual_mask": (x, mean, invstd, weight, None, residual, mean, invstd, None, bias),
        "bn_stats_apply": (x, running_mean, running_var, 0.1, 1e-5, weight, bias, residual, True, True),
        "bn_grad_stats_mask": (grad, x, mask, mean, invstd, True),
        "bn_grad_apply_mask": (grad, x, mask, mean, invstd, weight, mean, bias, True),
        "stem": (image, stem_weight, mean.new_ones(64), mean.new_zeros(64), None, None),
        "avgpool": (x,),
        "conv_bn_act": (x, conv_weight, scale, shift, None, *conv),
        "conv_stats": (x, conv_weight, *norm, scale, shift, 0.1, 1e-5, *sizes, True),
        "bn_grad_coefficients": (mean, bias, mean, invstd, weight, 3.0),
        "conv_grad_input": (dz, y, coefficients, conv_weight, x, *norm, None, *sizes),
        "conv_grad_weight": (dz, y, coefficients, x, *norm, conv_weight, *sizes),
        "bn_apply_pool": (x, *norm, *window),
        "bn_pool_grad_stats": (torch.randn_like(pooled), place, x, *norm, *window),
        "bn_pool_grad_apply": (torch.randn_like(pooled), place, x, *norm, mean, bias, *window),
    }


# What else each op can be given: other outputs come back empty, other arguments are None.
OTHER_FORMS: dict[str, Callable[[tuple], tuple]] = {
    "bn_stats": lambda a: (a[0], None, None, *a[3:]),
    "bn_apply": lambda a: (*a[:3], None, None, None, False),
    "bn_apply_dual": lambda a: (*a[:3], None, *a[4:10], False),
    "bn_grad_stats": lambda a: (*a[:2], None, *a[3:]),
    "bn_grad_apply": lambda a: (*a[:6], None, None, True),
    "bn_apply_mask": lambda a: (*a[:3], None, None, None),
    "bn_apply_dual_mask": lambda a: (*a[:3], None, None, *a[5:]),
    "bn_stats_apply": lambda a: (a[0], None, None, *a[3:5], None, None, None, False, False),
    "bn_grad_stats_mask": lambda a: (*a[:5], False),
    "bn_grad_apply_mask": lambda a: (*a[:5], None, None, None, False),
    "stem": lambda a: (a[0].clamp(0, 1).mul(255).byte(), a[1], None, None, [0.01, 0.02, 0.03], [-1.0, -2.0, -3.0]),
    "avgpool": lambda a: a,
    "conv_bn_act": lambda a: (*a[:2], None, None, *a[4:]),
    "conv_stats": lambda a: (*a[:2], None, None, None, None, None, None, *a[8:-1], False),
    "bn_grad_coefficients": lambda a: (None, None, *a[2:4], None, a[5]),
    "conv_grad_input": lambda a: (a[0], None, None, *a[3:5], None, None, None, None, torch.randn_like(a[4]), *a[10:]),
    "conv_grad_weight": lambda a: (a[0], None, a[2], a[3], None, None, None, None, *a[8:]),
    "bn_apply_pool": lambda a: (*a[:3], None, None, *a[5:]),
    "bn_pool_grad_stats": lambda a: (*a[:5], None, None, *a[7:]),
    "bn_pool_grad_apply": lambda a: (*a[:7], None, None, *a[9:]),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op, backend):
    """The schema tells the truth about mutation and aliasing, and fake tensors about shapes, dtypes and strides."""
    function = getattr(torch.ops.fused_resnet, op).default
    for dtype, memory_format in ((torch.float32, FORMATS["nhwc"]), (torch.bfloat16, FORMATS["nchw"])):
        x, residual = (torch.randn(2, 5, 6, 7).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
        args = op_arguments(x, residual)[op]
        with use_backend(backend):
            for form in (args, OTHER_FORMS[op](args)):
                torch.library.opcheck(function, form)


ODD_LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "cropped": lambda t: t[:, :, 1:, ::2],
    "channels_last, cropped": lambda t: t.contiguous(memory_format=torch.channels_last)[:, :, 1:, ::2],
    "channels_last, some channels": lambda t: t.contiguous(memory_format=torch.channels_last)[:, 2:],
    "an image read as HWC": lambda t: t[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None],
    "CNHW": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda t: t.transpose(2, 3),
    "one channel": lambda t: t[:, :1],
    "one channel of channels_last": lambda t: t.contiguous(memory_format=torch.channels_last)[:, :1],
    "one pixel": lambda t: t[:, :, :1, :1],
    "one pixel of channels_last": lambda t: t.contiguous(memory_format=torch.channels_last)[:, :, :1, :1],
    "one column": lambda t: t.contiguous(memory_format=torch.channels_last)[:, :, :, :1],
    "expanded": lambda t: t[:, :1].expand(-1, 6, -1, -1),
}


def significant_strides(tensor: Tensor) -> list[int]:
    """Those of dimensions longer than 1: the others address nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def assert_fake_is_real(function: Callable, args: tuple) -> None:
    real = function(*args)
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        fake = function(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
    real, fake = (result if isinstance(result, tuple) else (result,) for result in (real, fake))
    for mine, theirs in zip(real, fake, strict=True):
        assert (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
        assert significant_strides(mine) == significant_strides(theirs)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("layout", ODD_LAYOUTS.values(), ids=ODD_LAYOUTS)
def test_fake_strides_are_the_real_ones(layout, backend):
    """torch.compile computes addresses from them."""
    with use_backend(backend):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = layout(torch.randn(3, 6, 7, 8).to(dtype))
            for op, args in op_arguments(x, torch.randn(x.shape).to(dtype)).items():
                if op == "conv_bn_act":
                    continue
                assert_fake_is_real(getattr(torch.ops.fused_resnet, op), args)
                assert_fake_is_real(getattr(torch.ops.fused_resnet, op), OTHER_FORMS[op](args))


@pytest.mark.parametrize("backend", ["auto", "separate", "reference"])
@pytest.mark.parametrize("layout", ODD_LAYOUTS.values(), ids=ODD_LAYOUTS)
def test_fake_strides_of_convolutions_are_the_real_ones(layout, backend):
    kernels = {
        "3x3": lambda c: torch.randn(8, c, 3, 3),
        "3x3 channels_last": lambda c: torch.randn(8, c, 3, 3).contiguous(memory_format=torch.channels_last),
        "1x1": lambda c: torch.randn(8, c, 1, 1),
        "1x1 of a channels_last model": lambda c: torch.randn(8, 1, 1, c).permute(0, 3, 1, 2),
        "one filter": lambda c: torch.randn(1, c, 3, 3),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = layout(torch.randn(3, 6, 7, 8).to(dtype))
        for make in kernels.values():
            weight = make(x.shape[1]).to(dtype)
            filters, padding = weight.shape[0], weight.shape[2] // 2
            scale = torch.ones(filters, dtype=statistics_dtype(x))
            args = (x, weight, scale, scale, None, [1, 1], [padding, padding], [1, 1], 1, True)
            with use_backend(backend):
                assert_fake_is_real(torch.ops.fused_resnet.conv_bn_act, args)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_compiled_bn_act(form, backend):
    training, residual, activation = form

    def function(**inputs):
        return bn_act(**inputs, training=training, activation=activation)

    compiled = torch.compile(function, fullgraph=True, backend=EAGER_AUTOGRAD)
    for dtype, memory_format in ((torch.float32, FORMATS["nhwc"]), (torch.bfloat16, FORMATS["nchw"])):
        inputs = make_inputs((3, 5, 6, 7), dtype, memory_format, residual=residual)
        cotangent = torch.randn(3, 5, 6, 7).to(dtype)
        expected = step(function, inputs, cotangent, backend=backend)
        assert_close(step(compiled, inputs, cotangent, backend=backend), expected)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_bn_act_dual(training):
    function = dual(bn_act_dual, training, "relu")
    compiled = torch.compile(function, fullgraph=True, backend=EAGER_AUTOGRAD)
    inputs = dual_inputs((3, 5, 6, 7))
    cotangent = make_cotangent(function, inputs)
    assert_close(step(compiled, inputs, cotangent), step(function, inputs, cotangent))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_with_other_sizes_and_dtypes(dtype, training):
    """Symbolic sizes from the second call on; float64 goes PyTorch's own way."""

    def function(**inputs):
        return bn_act(**inputs, training=training)

    compiled = torch.compile(function, fullgraph=True, backend=EAGER_AUTOGRAD)
    for shape in ((3, 5, 6, 7), (2, 5, 8, 9), (4, 5, 10, 3)):
        inputs = make_inputs(shape, dtype, FORMATS["nhwc"], residual=True)
        cotangent = torch.randn(shape, dtype=dtype)
        assert_close(step(compiled, inputs, cotangent), step(function, inputs, cotangent))


@pytest.mark.parametrize("gradients", [True, False])
def test_compiled_conv_bn_act(gradients):
    def function(x, conv_weight, residual, running_mean, running_var):
        return conv_bn_act(x, conv_weight, None, None, running_mean, running_var, residual, stride=2, padding=1)

    compiled = torch.compile(function, fullgraph=True, backend=EAGER_AUTOGRAD)
    inputs = {
        "x": torch.randn(2, 5, 7, 9),
        "conv_weight": torch.randn(6, 5, 3, 3),
        "residual": torch.randn(2, 6, 4, 5),
        "running_mean": torch.randn(6),
        "running_var": torch.rand(6) + 0.5,
    }
    wanted = None if gradients else ()
    cotangent = torch.randn(2, 6, 4, 5)
    assert_close(step(compiled, inputs, cotangent, wanted=wanted), step(function, inputs, cotangent, wanted=wanted))


def test_a_request_made_after_compilation_is_honoured():
    """The choice of an op's backend is made when it runs."""
    compiled = torch.compile(bn_act, fullgraph=True, backend=EAGER_AUTOGRAD)
    inputs = make_inputs((3, 5, 6, 7))
    expected = compiled(**inputs)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(**inputs), expected)
    with use_backend("separate"), pytest.raises(fused_resnet.ops.BackendError):
        compiled(**inputs)


def test_a_request_made_before_compilation_is_honoured():
    """float64 is PyTorch's own where nothing is asked for."""
    inputs = make_inputs((3, 5, 6, 7), torch.float64)
    with use_backend("separate"), pytest.raises(fused_resnet.ops.BackendError):
        torch.compile(bn_act, fullgraph=True, backend=EAGER_AUTOGRAD)(**inputs)


def train(model: torch.nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(run(images), labels)
    loss.backward()
    result = {"loss": loss.detach()} | {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return result | {f"buffer {n}": b.clone() for n, b in model.named_buffers()}


@pytest.mark.parametrize("compiler", [EAGER_AUTOGRAD, pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_resnet18_trains_without_a_graph_break(compiler):
    if compiler == "inductor":
        model = fused_resnet.models.cifar.CIFARResNet(8, num_classes=10)
    else:
        model = fused_resnet.resnet18(num_classes=10)
    model.to(memory_format=torch.channels_last)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 3, 3, 7])
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    actual = train(model, compiled, images, labels)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    model.load_state_dict(state)
    model.zero_grad()
    expected = train(model, model, images, labels)
    assert expected["buffer bn1.num_batches_tracked"] == 1
    # Other orders of summation in the convolutions, through 18 layers.
    assert_close(actual, expected, tolerance=1e-3)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of each tensor's largest value, or two units in the last place of half precision."""
    assert list(actual) == list(expected)
    for name, want in expected.items():
        unit = 0 if want.dtype == torch.int64 else max(tolerance, 2 * torch.finfo(want.dtype).eps)
        limit = unit * max(want.abs().max().item(), 1e-3)
        torch.testing.assert_close(actual[name], want, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
