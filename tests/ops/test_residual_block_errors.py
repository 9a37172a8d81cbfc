"""What ``residual_block`` refuses, and the ops of a training convolution as dispatcher and compiler see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.ops import BatchNorm, ConvNorm, residual_block
from fused_resnet.ops.reference import statistics_dtype
from tests.ops.blocks import (
    BASIC_PROJECTION,
    assert_close,
    buffers,
    conv_norms,
    running,
    tensors_of,
)
from tests.ops.step import FORMATS

# Refusals.


def wrong_link(index: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        link = arguments["chain"][index]
        norm = link.norm._replace(**{k: v for k, v in fields.items() if k in BatchNorm._fields})
        link = link._replace(norm=norm)
        arguments["chain"][index] = link._replace(**{k: v for k, v in fields.items() if k in ConvNorm._fields})

    return change


def wrong(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update(changed)


def wrong_shortcut(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update(shortcut=arguments["shortcut"]._replace(**fields))


def an_element(name: str, index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments[name].__setitem__(index, value)


# (what is wrong, error, what the message says)
REFUSALS = {
    "x of no tensor": (wrong(x=[1.0]), TypeError, "^x must be a Tensor; got list"),
    "x of three dimensions": (wrong(x=torch.randn(3, 7, 5)), ValueError, r"^x must have 4 dimensions .* got 3"),
    "x of integers": (wrong(x=torch.ones(2, 3, 7, 5, dtype=torch.int64)), TypeError, "^x must have dtype .*int64"),
    "x without channels": (wrong(x=torch.ones(2, 0, 7, 5)), ValueError, "^x must have at least one channel"),
    "x of other channels": (
        wrong(x=torch.randn(2, 4, 7, 5)),
        ValueError,
        r"^chain\[0\]: x must have 3 channels .* got 4",
    ),
    "x of another dtype": (wrong(x=torch.randn(2, 3, 7, 5).double()), TypeError, r"^chain\[0\]: conv_weight .*float64"),
    "x elsewhere": (wrong(x=torch.randn(2, 3, 7, 5, device="meta")), ValueError, r"conv_weight must be on x's device"),
    "memory": (wrong(memory="little"), ValueError, "^memory must be 'default' or 'efficient'; got 'little'"),
    "no memory": (wrong(memory=None), ValueError, "^memory must be .* got None"),
    "an empty chain": (wrong(chain=[]), ValueError, "^chain must hold at least one ConvNorm; got none"),
    "no chain": (wrong(chain=None), ValueError, "^chain must hold at least one"),
    "a chain of modules": (wrong(chain=[nn.Conv2d(3, 4, 1)]), TypeError, r"^chain\[0\] must be a ConvNorm; got Conv2d"),
    "a norm in the chain": (
        an_element("chain", 1, BatchNorm(*[None] * 4)),
        TypeError,
        r"^chain\[1\] must be a ConvNorm",
    ),
    "a norm as shortcut": (
        wrong(shortcut=BatchNorm(*[None] * 4)),
        TypeError,
        "^shortcut must be a ConvNorm; got BatchN",
    ),
    "channels in the middle": (
        wrong_link(1, conv_weight=torch.ones(4, 5, 3, 3)),
        ValueError,
        r"^chain\[1\]: x must have 5",
    ),
    "a kernel of 3 dimensions": (
        wrong_link(0, conv_weight=torch.ones(4, 3, 3)),
        ValueError,
        r"^chain\[0\]: conv_weight .* 4 d",
    ),
    "a kernel of bfloat16": (
        wrong_link(1, conv_weight=torch.ones(4, 4, 3, 3, dtype=torch.bfloat16)),
        TypeError,
        r"^chain\[1\]: conv_weight must have x's dtype, torch.float32; got torch.bfloat16",
    ),
    "groups": (wrong_link(0, groups=3), ValueError, r"^chain\[0\]: groups must .* divide the 4 output channels; got 3"),
    "a stride of 0": (wrong_link(0, stride=(0, 1)), ValueError, r"^chain\[0\]: stride must be >= 1"),
    "a stride of one number": (wrong_link(0, stride=2), TypeError, r"^chain\[0\]: stride must be two ints; got 2"),
    "a negative padding": (wrong_link(1, padding=(-1, 1)), ValueError, r"^chain\[1\]: padding must be >= 0"),
    "padding by name": (wrong_link(1, padding="same"), TypeError, r"^chain\[1\]: padding must be .* got 'same'"),
    "a dilation of 3": (wrong_link(1, dilation=(1, 1, 1)), TypeError, r"^chain\[1\]: dilation must be .*two ints"),
    "no norm": (wrong_link(1, norm=None), TypeError, r"^chain\[1\]: norm must be a BatchNorm; got NoneType"),
    "weight": (wrong_link(1, weight=torch.ones(3)), ValueError, r"^chain\[1\]: weight must have shape \(4,\)"),
    "running_var": (
        wrong_link(0, running_var=None),
        ValueError,
        r"^chain\[0\]: running_mean and running_var must both",
    ),
    "momentum": (wrong_link(1, momentum=None), TypeError, r"^chain\[1\]: momentum must be a float; got NoneType"),
    "eps": (wrong_link(1, eps=-1.0), ValueError, r"^chain\[1\]: eps must be >= 0"),
    "process_group": (wrong_link(1, process_group="world"), TypeError, r"^chain\[1\]: process_group must .* got str"),
    "eval without statistics": (
        wrong_link(1, training=False, running_mean=None, running_var=None),
        ValueError,
        r"^chain\[1\]: running_mean and running_var must be given",
    ),
    "nothing left": (
        wrong_link(1, padding=(0, 0), dilation=(4, 4)),
        ValueError,
        r"^chain\[1\]: .*pixel .* -4 x -5 from 4 x 3",
    ),
    "no shortcut": (wrong(shortcut=None), ValueError, r"chain's result, \(2, 4, 4, 3\), .* got \(2, 3, 7, 5\)"),
    "a shortcut of another stride": (
        wrong_shortcut(stride=(1, 1)),
        ValueError,
        r"shortcut's must .* got \(2, 4, 7, 5\)",
    ),
    "a shortcut to other channels": (
        wrong_shortcut(conv_weight=torch.ones(5, 3, 1, 1)),
        ValueError,
        r"^shortcut: weight must have shape \(5,\)",
    ),
    "one value per channel": (
        wrong(x=torch.randn(1, 3, 2, 2)),
        ValueError,
        r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 4, 1, 1\]\)",
    ),
}


@pytest.mark.parametrize("level", [None, 3])
@pytest.mark.parametrize(("change", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_the_argument_and_leave_the_statistics_alone(change, error, message, level):
    tensors = tensors_of(BASIC_PROJECTION, torch.float32)
    before = {name: tensor.clone() for name, tensor in buffers(tensors).items()}
    chain, shortcut = conv_norms(BASIC_PROJECTION, tensors)
    arguments = {"x": tensors["x"], "chain": chain, "shortcut": shortcut, "memory": "default"}
    change(arguments)
    with running(level, "auto"), pytest.raises(error, match=message) as caught:
        residual_block(**arguments)
    assert isinstance(caught.value, RuntimeError)  # as of PyTorch's own ops
    assert_close(buffers(tensors), before, 0)


# The four ops of a training convolution as the dispatcher and the compiler see them.


def op_arguments(x: Tensor) -> dict[str, tuple[Tensor | None, ...]]:
    """Every form of each op: with and without what is in front, statistics, the norm behind, and residual."""
    channels, filters, wide = x.shape[1], 8, statistics_dtype(x)
    conv_weight = torch.randn(filters, channels, 3, 3).to(x.dtype)
    conv = ([1, 2], [1, 1], [1, 1], 1)
    y = F.conv2d(x, conv_weight, None, *conv)
    dz = torch.randn_like(y)
    front = tuple(torch.rand(channels, dtype=wide) + 0.5 for _ in range(4))
    bare, no_affine = (None,) * 4, (*front[:2], None, None)
    behind = tuple(torch.rand(filters, dtype=wide) + 0.5 for _ in range(2))
    vectors = tuple(torch.rand(filters, dtype=wide) for _ in range(5))
    coefficients, residual = torch.rand(4, filters, dtype=wide), torch.randn_like(x)
    return {
        "conv_stats": (
            (x, conv_weight, *front, *behind, 0.1, 1e-5, *conv, True),
            (x, conv_weight, *no_affine, None, None, 0.1, 1e-5, *conv, True),
            (x, conv_weight, *bare, *behind, 0.1, 1e-5, *conv, True),
            (x, conv_weight, *front, None, None, 0.0, 0.0, *conv, False),
        ),
        "bn_grad_coefficients": ((*vectors, 12.0), (*vectors[:4], None, 12.0), (None, None, *vectors[2:], 12.0)),
        "conv_grad_input": (
            (dz, y, coefficients, conv_weight, x, *front, None, *conv),
            (dz, None, coefficients, conv_weight, x, *no_affine, None, *conv),
            (dz, y, coefficients, conv_weight, x, *bare, residual, *conv),
            (dz, None, None, conv_weight, x, *bare, None, *conv),
            (dz, None, None, conv_weight, x, *front, residual, *conv),
        ),
        "conv_grad_weight": (
            (dz, y, coefficients, x, *front, conv_weight, *conv),
            (dz, None, coefficients, x, *no_affine, conv_weight, *conv),
            (dz, None, None, x, *bare, conv_weight, *conv),
        ),
    }


OPS = ("conv_stats", "bn_grad_coefficients", "conv_grad_input", "conv_grad_weight")


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [(torch.float32, FORMATS["nhwc"]), (torch.bfloat16, FORMATS["nchw"]), (torch.float64, FORMATS["nchw"])],
    ids=["float32 nhwc", "bfloat16 nchw", "float64 nchw"],
)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, dtype, memory_format):
    """The schema tells the truth about mutation and aliasing, and fake tensors about shapes, dtypes and strides."""
    x = torch.randn(2, 5, 6, 7).to(dtype).contiguous(memory_format=memory_format)
    for arguments in op_arguments(x)[op]:
        torch.library.opcheck(getattr(torch.ops.fused_resnet, op).default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_cropped_images(op):
    x = torch.randn(2, 6, 7, 9).contiguous(memory_format=torch.channels_last)[:, 1:, :6, 1:]
    for arguments in op_arguments(x)[op]:
        torch.library.opcheck(getattr(torch.ops.fused_resnet, op).default, arguments, test_utils="test_faketensor")
