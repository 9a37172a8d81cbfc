"""What an op is given by whoever calls it by itself, ``torch.ops.fused_resnet.*``: refused here where a kernel would
read past the end of a tensor. The ops of ``fused_resnet.ops`` have checked what they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops.reference import mask_shape
from fused_resnet.ops.route.packing import argument_names
from fused_resnet.ops.route.request import BackendError
from fused_resnet.ops.schemas import check_one_device

PAIRS = ("kernel_size", "stride", "padding", "dilation")
TOGETHER = (("mean", "invstd"), ("mean2", "invstd2"))
"""Of the two sums, one alone means constant statistics, as neither does."""
ALIKE = ("x2", "grad_out", "out")
"""Of x's shape in every op but the pooling's."""
OF_X = ("mean", "invstd", "weight", "bias", "mean2", "invstd2", "weight2", "bias2", "sum_dz", "sum_dz_xhat")
"""Vectors over the channels of x; the running statistics too where there is no convolution."""
OF_FILTERS = ("scale", "shift")
RUNNING = ("running_mean", "running_var")


def check_raw(op: str, arguments: Sequence[Any]) -> None:
    """Refuses arguments of the op's schema that do not fit together.

    Raises:
        RuntimeError: as of PyTorch's own ops.
    """
    given = dict(zip(argument_names(op), arguments, strict=True))
    check_one_device(op, arguments)
    for name, value in given.items():
        vector = name in (*OF_X, *OF_FILTERS, *RUNNING, "coefficients")
        if isinstance(value, Tensor) and (value.is_complex() or (vector and not value.is_floating_point())):
            raise BackendError(f"{op}: {name} must be floating point; got {value.dtype}")
    for pair in TOGETHER:
        if pair[0] in given and len({given[name] is None for name in pair}) > 1:
            raise BackendError(f"{op}: {pair[0]} and {pair[1]} must be given both, or neither")
    for name in PAIRS:
        if name in given and (len(given[name]) != 2 or min(given[name]) < (name != "padding") * 1):
            raise BackendError(f"{op}: {name} must be two ints, vertical and horizontal; got {given[name]}")
    if "x" not in given:
        _expect(op, given, OF_X, tuple(given["mean"].shape[:1]) or (0,))
        return
    x = given["x"]
    for name in ("x", "conv_weight"):
        if name in given and given[name].dim() != 4:
            raise BackendError(f"{op}: {name} must have 4 dimensions; got shape {tuple(given[name].shape)}")
    _expect(op, given, OF_X, (x.shape[1],))
    result = tuple(x.shape)
    if "conv_weight" in given:
        result = _result_shape(op, given)
        _expect(op, given, (*OF_FILTERS, *RUNNING), (result[1],))
        _expect(op, given, ("dz", "y"), result)
        _expect(op, given, ("coefficients",), (4, result[1]))
    elif "kernel_size" in given:
        _expect(op, given, ("grad_out",), tuple(given["place"].shape) if "place" in given else None)
    else:
        _expect(op, given, ALIKE, result)
        _expect(op, given, RUNNING, (x.shape[1],))
        _expect(op, given, ("mask",), mask_shape(result))
    _expect(op, given, ("residual",), tuple(x.shape) if op == "conv_grad_input" else result)


def check_given(op: str, arguments: Sequence[Any]) -> None:
    """Refuses None for a tensor of the op's schema that is not optional, which the dispatcher lets through.

    Raises:
        BackendError: as `check_raw`.
    """
    for argument, value in zip(getattr(torch.ops.fused_resnet, op).default._schema.arguments, arguments, strict=True):
        if value is None and argument.type.kind() == "TensorType":
            raise BackendError(f"{op}: {argument.name} must be given")


def _expect(op: str, given: dict[str, Any], names: Sequence[str], shape: tuple[int, ...] | None) -> None:
    for name in names:
        tensor: Tensor | None = given.get(name)
        if tensor is not None and shape is not None and tuple(tensor.shape) != shape:
            raise BackendError(f"{op}: {name} must have shape {shape}; got {tuple(tensor.shape)}")


def _result_shape(op: str, given: dict[str, Any]) -> tuple[int, ...]:
    """Of the convolution."""
    x, weight = given["x"].shape, given["conv_weight"].shape
    if "stride" not in given:  # the stem
        return (x[0], weight[0])
    settings = ConvSettings.of(*(given[name] for name in ConvSettings._fields))
    if settings.groups < 1 or weight[1] * settings.groups != x[1] or weight[0] % settings.groups:
        raise BackendError(
            f"{op}: conv_weight {tuple(weight)} and {settings.groups} groups do not fit the channels of x {tuple(x)}"
        )
    size = settings.output_size(x, weight)
    if min(size) < 1:
        raise BackendError(f"{op}: x {tuple(x)}, padded, must be at least as large as the kernel {tuple(weight[2:])}")
    return (x[0], weight[0], *size)
