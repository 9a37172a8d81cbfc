"""Bad input to the public ops: a Python exception that names the argument, what it got and what it takes."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet.ops import BackendError, BatchNorm, bn_act, bn_act_dual, conv_bn_act
from tests.ops.step import pytorch_bn_act
from tests.ops.test_conv_bn_act import pytorch_conv_bn_act

ERRORS = (TypeError, ValueError, BackendError)
C, SHAPE = 3, (2, 3, 4, 5)


def good() -> dict:
    vectors = {name: torch.rand(C) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")}
    return {"x": torch.randn(SHAPE), **vectors, "residual": torch.randn(SHAPE)}


def good_conv() -> dict:
    vectors = {name: torch.rand(6) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")}
    return {"x": torch.randn(SHAPE), "conv_weight": torch.randn(6, C, 3, 3), **vectors}


INTEGERS = torch.ones(SHAPE, dtype=torch.int64)
# (argument, bad value, error, what the message says beside the argument's name)
BAD = [
    ("x", None, TypeError, "must be a Tensor; got NoneType"),
    ("x", [[1.0]], TypeError, "must be a Tensor; got list"),
    ("x", "image", TypeError, "must be a Tensor; got str"),
    ("x", torch.randn(2, 3, 4), ValueError, r"4 dimensions \(N, C, H, W\); got 3, shape \(2, 3, 4\)"),
    ("x", torch.tensor(1.0), ValueError, "4 dimensions .* got 0"),
    ("x", torch.randn(2, 0, 4, 5), ValueError, "at least one channel"),
    ("x", INTEGERS, TypeError, "dtype float64, float32, float16 or bfloat16; got torch.int64"),
    ("x", INTEGERS.to(torch.complex64), TypeError, "dtype .* got torch.complex64"),
    ("x", INTEGERS.to(torch.float8_e4m3fn), TypeError, "dtype .* got torch.float8_e4m3fn"),
    ("x", torch.randn(SHAPE).to_sparse(), TypeError, "strided .* got layout torch.sparse_coo"),
    ("weight", torch.ones(4), ValueError, r"shape \(3,\), one value per channel; got \(4,\)"),
    ("bias", torch.ones(0), ValueError, r"shape \(3,\), .* got \(0,\)"),
    ("weight", torch.ones(1, 3, 1, 1), ValueError, r"shape \(3,\)"),
    ("bias", torch.ones(3, dtype=torch.int32), TypeError, "dtype .* got torch.int32"),
    ("weight", 1.0, TypeError, "must be a Tensor or None; got float"),
    ("bias", torch.ones(3, device="meta"), ValueError, "x's device, cpu; got meta"),
    ("running_mean", torch.ones(5), ValueError, r"shape \(3,\)"),
    ("running_var", "ones", TypeError, "must be a Tensor or None; got str"),
    ("running_mean", None, ValueError, "running_var must both be given"),
    ("running_var", torch.ones(3, device="meta"), ValueError, "x's device, cpu; got meta"),
    ("residual", torch.randn(2, 3, 4, 6), ValueError, r"shape \(2, 3, 4, 5\); got \(2, 3, 4, 6\)"),
    ("residual", torch.randn(1, 3, 1, 1), ValueError, "shape"),
    ("residual", torch.randn(60), ValueError, "shape"),
    ("residual", INTEGERS, TypeError, "dtype .* got torch.int64"),
    ("residual", 0, TypeError, "must be a Tensor or None; got int"),
    ("residual", torch.randn(SHAPE, device="meta"), ValueError, "x's device, cpu; got meta"),
    ("residual", torch.randn(SHAPE).to_sparse(), TypeError, "strided"),
    ("training", "yes", TypeError, "must be a bool; got str"),
    ("training", None, TypeError, "must be a bool; got NoneType"),
    ("momentum", None, TypeError, "must be a float; got NoneType"),
    ("momentum", "0.1", TypeError, "must be a float; got str"),
    ("momentum", torch.tensor(0.1), TypeError, "must be a float; got Tensor"),
    ("momentum", True, TypeError, "must be a float; got bool"),
    ("eps", -1e-5, ValueError, "must be >= 0; got -1e-05"),
    ("eps", float("nan"), ValueError, "must be >= 0; got nan"),
    ("eps", "small", TypeError, "must be a float; got str"),
    ("activation", "gelu", ValueError, "must be 'relu' or None; got 'gelu'"),
    ("activation", torch.relu, TypeError, "must be 'relu' or None; got builtin_function_or_method"),
    ("activation", torch.ones(3), TypeError, "must be 'relu' or None; got Tensor"),
    ("activation", True, TypeError, "must be 'relu' or None; got bool"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_bn_act(name, value, error, message):
    with pytest.raises(error, match=f"(?s)^{name}.*{message}") as caught:
        bn_act(**good() | {name: value})
    assert isinstance(caught.value, RuntimeError)  # as of PyTorch's own ops


DUAL_NAMES = {"weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"}


@pytest.mark.parametrize(("name", "value", "error", "message"), [case for case in BAD if case[0] in DUAL_NAMES])
def test_bn_act_dual_names_the_second_norm(name, value, error, message):
    x = torch.randn(SHAPE)
    norm = BatchNorm(*(torch.rand(C) for _ in range(4)))
    bad = norm._replace(**{name: value})
    with pytest.raises(error, match=f"^{name}.*{message}"):
        bn_act_dual(x, bad, x, norm)
    with pytest.raises(error, match=f"^{name}2.*{message.replace('running_var', 'running_var2')}"):
        bn_act_dual(x, norm, x, bad)


def test_bn_act_dual():
    x = torch.randn(SHAPE)
    norm = BatchNorm(*(torch.rand(C) for _ in range(4)))
    with pytest.raises(ValueError, match=r"x2 must have the output's shape \(2, 3, 4, 5\); got \(2, 3, 4, 4\)"):
        bn_act_dual(x, norm, x[..., :4], norm)
    with pytest.raises(TypeError, match="x2 must be a Tensor; got NoneType"):
        bn_act_dual(x, norm, None, norm)
    with pytest.raises(TypeError, match="norm must be a BatchNorm; got NoneType"):
        bn_act_dual(x, None, x, norm)
    with pytest.raises(TypeError, match="norm2 must be a BatchNorm; got BatchNorm2d"):
        bn_act_dual(x, norm, x, torch.nn.BatchNorm2d(C))


def test_no_statistics_in_eval():
    inputs = good() | {"running_mean": None, "running_var": None}
    with pytest.raises(ValueError, match="running_mean and running_var must be given when training is False"):
        bn_act(**inputs)


def test_eps_of_zero_is_refused_in_training():
    """As F.batch_norm does."""
    for training in (True, False):
        outcomes = []
        for function in (bn_act, pytorch_bn_act):
            try:
                outcomes.append(function(**good() | {"training": training, "eps": 0.0}))
            except ValueError as error:
                outcomes.append(str(error))
        assert [type(outcome) for outcome in outcomes] == [str if training else Tensor] * 2
        assert not training or all("eps must be positive" in outcome for outcome in outcomes)


def test_one_value_per_channel_in_training():
    """nn.BatchNorm2d's own words."""
    one = torch.randn(1, C, 1, 1)
    message = re.escape("Expected more than 1 value per channel when training, got input size torch.Size([1, 3, 1, 1])")
    with pytest.raises(ValueError, match=message):
        torch.nn.BatchNorm2d(C)(one)
    with pytest.raises(ValueError, match=message):
        bn_act(**good() | {"x": one, "residual": None}, training=True)
    norm = BatchNorm(None, None, torch.ones(C), torch.ones(C))
    for norms in ((norm, norm._replace(training=True)), (norm._replace(training=True), norm)):
        with pytest.raises(ValueError, match=message):
            bn_act_dual(one, norms[0], one, norms[1])
    assert bn_act(**good() | {"x": one, "residual": None}).shape == one.shape


BAD_CONV = [
    ("conv_weight", None, TypeError, "must be a Tensor; got NoneType"),
    ("conv_weight", torch.randn(6, 3), ValueError, r"4 dimensions .* got shape \(6, 3\)"),
    ("conv_weight", torch.randn(6, 3, 0, 3), ValueError, "must not be empty"),
    ("conv_weight", torch.randn(0, 3, 3, 3), ValueError, "must not be empty"),
    ("conv_weight", torch.ones(6, 3, 3, 3, dtype=torch.int8), TypeError, "dtype .* got torch.int8"),
    ("conv_weight", torch.randn(6, 3, 3, 3).bfloat16(), TypeError, "x's dtype, torch.float32; got torch.bfloat16"),
    ("conv_weight", torch.randn(6, 3, 3, 3, device="meta"), ValueError, "x's device, cpu; got meta"),
    ("conv_weight", torch.randn(6, 3, 3, 3).to_sparse(), TypeError, "strided"),
    (
        "x",
        torch.randn(2, 4, 8, 8),
        ValueError,
        r"3 channels for conv_weight of shape \(6, 3, 3, 3\) and groups=1; got 4",
    ),
    ("x", torch.randn(2, 3, 2, 8), ValueError, "at least as large as the dilated kernel"),
    ("x", torch.randn(2, 3, 0, 8), ValueError, "at least as large as the dilated kernel"),
    ("x", None, TypeError, "must be a Tensor"),
    ("groups", 0, ValueError, "must be >= 1 and divide the 6 output channels; got 0"),
    ("groups", 4, ValueError, "divide the 6 output channels; got 4"),
    ("groups", True, TypeError, "must be an int; got bool"),
    ("groups", "1", TypeError, "must be an int; got str"),
    ("stride", 0, ValueError, "must be >= 1; got 0"),
    ("stride", (1, -1), ValueError, "must be >= 1"),
    ("stride", (1, 1, 1), TypeError, "must be an int or two ints"),
    ("stride", 1.5, TypeError, "must be an int or two ints; got 1.5"),
    ("stride", None, TypeError, "must be an int or two ints; got None"),
    ("padding", -1, ValueError, "must be >= 0; got -1"),
    ("padding", "same", TypeError, "must be an int or two ints; got 'same'"),
    ("dilation", 0, ValueError, "must be >= 1; got 0"),
    ("dilation", (1, "2"), TypeError, "must be an int or two ints"),
    ("weight", torch.ones(3), ValueError, r"shape \(6,\), one value per channel; got \(3,\)"),
    ("running_mean", None, ValueError, "running_var must both be given"),
    ("residual", torch.randn(SHAPE), ValueError, r"shape \(2, 6, 2, 3\); got \(2, 3, 4, 5\)"),
    ("eps", -1.0, ValueError, "must be >= 0"),
    ("activation", "silu", ValueError, "'relu' or None"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_CONV)
def test_conv_bn_act(name, value, error, message):
    with pytest.raises(error, match=f"(?s)^{name}.*{message}") as caught:
        conv_bn_act(**good_conv() | {name: value})
    assert isinstance(caught.value, RuntimeError)


# Generated cases: shapes, dtypes, strides and arguments, most of them valid alone, together often not.

DTYPES = st.sampled_from([torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64, torch.int32])
SIZES = st.sampled_from([0, 1, 1, 2, 3, 5, 17])
VIEWS = [
    lambda t: t,
    lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t,
    lambda t: torch.stack([t, t], dim=-1)[..., 0],
    lambda t: t[:1].expand(t.shape) if t.shape[0] else t,
    lambda t: t.flip(0),
    lambda t: t.to("meta"),
]
NONSENSE = st.sampled_from(
    [None, 0, -1, 2.5, "relu", float("nan"), float("inf"), (), [1, 1], (2, 0), torch.ones(2), True]
)


@st.composite
def tensors(draw, shape: tuple[int, ...]) -> Tensor | None:
    """A tensor of about this shape."""
    if draw(st.integers(0, 9)) == 0:
        shape = draw(
            st.sampled_from([(), shape[1:], (*shape, 1), shape[::-1], tuple(size + 1 for size in shape), (0,)])
        )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensor = torch.randn(shape, generator=generator).add(0.25).to(draw(DTYPES))
    return (
        draw(st.sampled_from(VIEWS if draw(st.integers(0, 7)) == 0 else VIEWS[:1] * 2 + VIEWS[1:6]))(tensor)
        if shape
        else tensor
    )


@st.composite
def bn_act_calls(draw) -> dict:
    shape = draw(st.tuples(SIZES, SIZES, SIZES, SIZES))
    call = {"x": draw(tensors(shape))}
    for name in ("weight", "bias", "running_mean"):
        call[name] = draw(st.none() | tensors(shape[1:2]))
    call["running_var"] = None if call["running_mean"] is None else draw(tensors(shape[1:2])).abs()
    call["residual"] = draw(st.none() | tensors(shape))
    call["training"] = draw(st.booleans())
    call["momentum"] = draw(st.sampled_from([0.1, 0, 1, 0.5]))
    call["eps"] = draw(st.sampled_from([1e-5, 1e-3]))
    call["activation"] = draw(st.sampled_from(["relu", None]))
    if draw(st.integers(0, 4)) == 0:
        call[draw(st.sampled_from(sorted(call)))] = draw(NONSENSE)
    return call


@st.composite
def conv_bn_act_calls(draw) -> dict:
    images, channels, height, width, filters = (draw(SIZES) for _ in range(5))
    groups = draw(st.sampled_from([1, 1, 1, 1, 2, 5]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 1), (2, 5), (0, 1)]))
    channels, filters = channels * groups, filters * groups
    call = {
        "x": draw(tensors((images, channels, height, width))),
        "conv_weight": draw(tensors((filters, channels // groups, *kernel))),
        "stride": draw(st.sampled_from([1, 2, (2, 1), (1, 3)])),
        "padding": draw(st.sampled_from([0, 1, (2, 0), 3])),
        "dilation": draw(st.sampled_from([1, 1, 2, (1, 2)])),
        "groups": groups,
    }
    for name in ("weight", "bias", "running_mean"):
        call[name] = draw(st.none() | tensors((filters,)) if name != "running_mean" else tensors((filters,)))
    call["running_var"] = draw(tensors((filters,))).abs()
    call["activation"] = draw(st.sampled_from(["relu", None]))
    if draw(st.integers(0, 4)) == 0:
        call[draw(st.sampled_from(sorted(call)))] = draw(NONSENSE)
    return call


def check(function, reference, call: dict) -> None:
    """Either the exception names an argument, or the result is the reference's."""
    copies = [{name: v.clone() if isinstance(v, Tensor) else v for name, v in call.items()} for _ in range(2)]
    for name in ("x", "residual"):
        if isinstance(call.get(name), Tensor):
            copies[0][name] = call[name]  # with its own strides
    try:
        actual = function(**copies[0])
    except ERRORS as error:
        words = set(re.findall(r"\w+", str(error)))
        assert words & set(call) or "more than 1 value per channel" in str(error), f"names no argument: {error}"
        return
    widened = {name: v.double() if isinstance(v, Tensor) else v for name, v in copies[1].items()}
    expected = reference(**widened)
    assert actual.shape == expected.shape
    assert actual.device == call["x"].device
    if actual.device.type == "meta":
        return
    narrowest = [v for name, v in call.items() if isinstance(v, Tensor)]
    unit = max(torch.finfo(tensor.dtype).eps for tensor in narrowest)
    # Chance makes small variances here, and with them large outputs; the accuracy rule has its own tests.
    scale = max(1.0, expected.nan_to_num(0, 0, 0).abs().max().item() if expected.numel() else 0)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=64 * unit * scale, equal_nan=True)


SETTINGS = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@SETTINGS
@given(call=bn_act_calls())
def test_generated_calls_of_bn_act(call):
    check(bn_act, pytorch_bn_act, call)


@SETTINGS
@given(call=conv_bn_act_calls())
def test_generated_calls_of_conv_bn_act(call):
    check(conv_bn_act, pytorch_conv_bn_act, call)


def test_every_pair_of_devices_that_do_not_match():
    """No kernel ever sees an address of another device."""
    for name, other in itertools.product(good(), ("meta",)):
        inputs = good()
        inputs[name] = inputs[name].to(other)
        with pytest.raises(ValueError, match="device"):
            bn_act(**inputs)
