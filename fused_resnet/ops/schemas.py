"""The ops as PyTorch knows them: one schema and one shape function each. ``ops/route/choose.py`` gives them their
bodies.

No gradients here: ``ops/bn_act.py`` puts an ``autograd.Function`` above them. An output that is not wanted is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings, PoolSettings
from fused_resnet.ops.layout import conv_memory_format, dense
from fused_resnet.ops.reference import mask_shape, statistics_dtype
from fused_resnet.ops.reference.stem import stem_output_shape

NAMESPACE = "fused_resnet"

SCHEMAS = {
    "bn_stats": "(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps)"
    " -> (Tensor, Tensor)",
    "bn_apply": "(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, bool relu)"
    " -> Tensor",
    "bn_apply_dual": "(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor x2, Tensor mean2, Tensor invstd2, Tensor? weight2, Tensor? bias2, bool relu) -> Tensor",
    "bn_grad_stats": "(Tensor grad_out, Tensor x, Tensor? out, Tensor mean, Tensor invstd, Tensor? weight,"
    " Tensor? bias, bool relu) -> (Tensor, Tensor, Tensor)",
    "bn_grad_apply": "(Tensor grad_out, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor? sum_dz, Tensor? sum_dz_xhat, bool relu) -> Tensor",
    "bn_apply_mask": "(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual)"
    " -> (Tensor, Tensor)",
    "bn_apply_dual_mask": "(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor x2, Tensor mean2, Tensor invstd2, Tensor? weight2, Tensor? bias2) -> (Tensor, Tensor)",
    "bn_stats_apply": "(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps,"
    " Tensor? weight, Tensor? bias, Tensor? residual, bool relu, bool with_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    "bn_grad_stats_mask": "(Tensor grad_out, Tensor x, Tensor mask, Tensor mean, Tensor invstd, bool with_dz)"
    " -> (Tensor, Tensor, Tensor)",
    "bn_grad_apply_mask": "(Tensor grad_out, Tensor x, Tensor mask, Tensor mean, Tensor invstd, Tensor? weight,"
    " Tensor? sum_dz, Tensor? sum_dz_xhat, bool with_dz) -> (Tensor, Tensor)",
    "stem": "(Tensor x, Tensor conv_weight, Tensor? scale, Tensor? shift, float[]? pixel_scale, float[]? pixel_shift)"
    " -> Tensor",
    "avgpool": "(Tensor x) -> Tensor",
    "conv_bn_act": "(Tensor x, Tensor conv_weight, Tensor? scale, Tensor? shift, Tensor? residual, int[] stride,"
    " int[] padding, int[] dilation, int groups, bool relu) -> Tensor",
    "conv_stats": "(Tensor x, Tensor conv_weight, Tensor? mean, Tensor? invstd, Tensor? weight, Tensor? bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, int[] stride, int[] padding,"
    " int[] dilation, int groups, bool statistics) -> (Tensor, Tensor, Tensor)",
    "bn_apply_pool": "(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, int[] kernel_size,"
    " int[] stride, int[] padding) -> (Tensor, Tensor)",
    "bn_pool_grad_stats": "(Tensor grad_out, Tensor place, Tensor x, Tensor mean, Tensor invstd, Tensor? weight,"
    " Tensor? bias, int[] kernel_size, int[] stride, int[] padding) -> (Tensor, Tensor)",
    "bn_pool_grad_apply": "(Tensor grad_out, Tensor place, Tensor x, Tensor mean, Tensor invstd, Tensor? weight,"
    " Tensor? bias, Tensor? sum_dz, Tensor? sum_dz_xhat, int[] kernel_size, int[] stride, int[] padding) -> Tensor",
    "bn_grad_coefficients": "(Tensor? sum_dz, Tensor? sum_dz_xhat, Tensor mean, Tensor invstd, Tensor? weight,"
    " float count) -> Tensor",
    "conv_grad_input": "(Tensor dz, Tensor? y, Tensor? coefficients, Tensor conv_weight, Tensor x, Tensor? mean,"
    " Tensor? invstd, Tensor? weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation,"
    " int groups) -> (Tensor, Tensor, Tensor)",
    "conv_grad_weight": "(Tensor dz, Tensor? y, Tensor? coefficients, Tensor x, Tensor? mean, Tensor? invstd,"
    " Tensor? weight, Tensor? bias, Tensor conv_weight, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor",
}

library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def check_one_device(op: str, arguments: Sequence[Any]) -> None:
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"{op}: all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")


def _shape_of(name: str) -> Callable[[Callable[..., Any]], None]:
    def register(shape_function: Callable[..., Any]) -> None:
        def checked(*arguments: Any) -> Any:
            # One on the meta device makes the dispatcher ask for a shape, and the memory of the others' device would be
            # given out as it is.
            check_one_device(name, arguments)
            return shape_function(*arguments)

        torch.library.register_fake(f"{NAMESPACE}::{name}", checked, lib=library)

    return register


@_shape_of("bn_stats")
def _(x, running_mean, running_var, momentum, eps):
    return _channel_vector(x), _channel_vector(x)


@_shape_of("bn_apply")
def _(x, mean, invstd, weight, bias, residual, relu):
    return torch.empty_like(dense(x))


@_shape_of("bn_apply_dual")
def _(x, mean, invstd, weight, bias, x2, mean2, invstd2, weight2, bias2, relu):
    return torch.empty_like(dense(x))


@_shape_of("bn_grad_stats")
def _(grad_out, x, out, mean, invstd, weight, bias, relu):
    dz = x.new_empty(0) if out is None else torch.empty_like(dense(x))
    return _channel_vector(x), _channel_vector(x), dz


@_shape_of("bn_grad_apply")
def _(grad_out, x, mean, invstd, weight, bias, sum_dz, sum_dz_xhat, relu):
    return torch.empty_like(dense(x))


@_shape_of("bn_apply_mask")
def _(x, mean, invstd, weight, bias, residual):
    return torch.empty_like(dense(x)), _mask(x)


@_shape_of("bn_apply_dual_mask")
def _(x, mean, invstd, weight, bias, x2, mean2, invstd2, weight2, bias2):
    return torch.empty_like(dense(x)), _mask(x)


@_shape_of("bn_stats_apply")
def _(x, running_mean, running_var, momentum, eps, weight, bias, residual, relu, with_mask):
    mask = _mask(x) if with_mask else x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(dense(x)), mask, _channel_vector(x), _channel_vector(x)


@_shape_of("bn_grad_stats_mask")
def _(grad_out, x, mask, mean, invstd, with_dz):
    return _channel_vector(x), _channel_vector(x), torch.empty_like(dense(x)) if with_dz else x.new_empty(0)


@_shape_of("bn_grad_apply_mask")
def _(grad_out, x, mask, mean, invstd, weight, sum_dz, sum_dz_xhat, with_dz):
    return torch.empty_like(dense(x)), torch.empty_like(dense(x)) if with_dz else x.new_empty(0)


@_shape_of("stem")
def _(x, conv_weight, scale, shift, pixel_scale, pixel_shift):
    return conv_weight.new_empty(stem_output_shape(x.shape, conv_weight.shape)).to(memory_format=torch.channels_last)


@_shape_of("avgpool")
def _(x):
    return x.new_empty((*x.shape[:2], 1, 1))


@_shape_of("conv_bn_act")
def _(x, conv_weight, scale, shift, residual, stride, padding, dilation, groups, relu):
    return _conv_output(x, conv_weight, ConvSettings.of(stride, padding, dilation, groups))


@_shape_of("conv_stats")
def _(x, conv_weight, mean, invstd, weight, bias, running_mean, running_var, momentum, eps, stride, padding, dilation,
      groups, statistics):  # fmt: skip
    filters = conv_weight.shape[0] if statistics else 0
    vectors = (x.new_empty(filters, dtype=statistics_dtype(x)) for _ in range(2))
    return (_conv_output(dense(x), conv_weight, ConvSettings.of(stride, padding, dilation, groups)), *vectors)


@_shape_of("bn_apply_pool")
def _(x, mean, invstd, weight, bias, kernel_size, stride, padding):
    x = dense(x)
    size = PoolSettings.of(kernel_size, stride, padding).output_size(x.shape)
    out = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=conv_memory_format(x, x))
    return out, torch.empty_like(out, dtype=torch.uint8)


@_shape_of("bn_pool_grad_stats")
def _(grad_out, place, x, mean, invstd, weight, bias, kernel_size, stride, padding):
    return _channel_vector(x), _channel_vector(x)


@_shape_of("bn_pool_grad_apply")
def _(grad_out, place, x, mean, invstd, weight, bias, sum_dz, sum_dz_xhat, kernel_size, stride, padding):
    return torch.empty_like(dense(x))


@_shape_of("bn_grad_coefficients")
def _(sum_dz, sum_dz_xhat, mean, invstd, weight, count):
    return invstd.new_empty((4, invstd.shape[0]))


@_shape_of("conv_grad_input")
def _(dz, y, coefficients, conv_weight, x, mean, invstd, weight, bias, residual, stride, padding, dilation, groups):
    sums = (x.new_empty(0 if mean is None else x.shape[1], dtype=statistics_dtype(x)) for _ in range(2))
    return (torch.empty_like(dense(x)), *sums)


@_shape_of("conv_grad_weight")
def _(dz, y, coefficients, x, mean, invstd, weight, bias, conv_weight, stride, padding, dilation, groups):
    return torch.empty_like(conv_weight, dtype=statistics_dtype(x), memory_format=torch.channels_last)


def _conv_output(x, conv_weight, settings):
    shape = (x.shape[0], conv_weight.shape[0], *settings.output_size(x.shape, conv_weight.shape))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=conv_memory_format(x, conv_weight))


def _channel_vector(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=statistics_dtype(x))


def _mask(x: Tensor) -> Tensor:
    return x.new_empty(mask_shape(tuple(x.shape)), dtype=torch.uint8)
