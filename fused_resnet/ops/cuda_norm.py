"""Batch norm, residual add and ReLU of the ``cuda`` backend: passes over one activation (csrc/cuda/bn_*.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.ops.cuda_launch import (
    Moved,
    addresses,
    channels_last,
    empty_mask,
    empty_vector,
    empty_workspace,
    kernels,
    like,
    norm_of,
    place_of,
    vector_of,
)


def bn_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    x = channels_last(x)
    place = place_of(x)
    mean, invstd = empty_vector(x), empty_vector(x)
    moved = Moved(running_mean, running_var)
    workspace = empty_workspace(x, kernels().bn_workspace_bytes(place))
    kernels().bn_stats(place, *addresses(x, mean, invstd, *moved.vectors), momentum, eps, workspace.data_ptr())
    moved.write_back()
    return mean, invstd


def bn_apply(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    return _apply(x, (mean, invstd, weight, bias), residual, relu, None)


def bn_apply_mask(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    mask = empty_mask(x)
    return _apply(x, (mean, invstd, weight, bias), residual, True, mask), mask


def bn_apply_dual(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x2: Tensor,
    mean2: Tensor,
    invstd2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    relu: bool,
) -> Tensor:
    return _apply_dual(x, (mean, invstd, weight, bias), x2, (mean2, invstd2, weight2, bias2), relu, None)


def bn_apply_dual_mask(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x2: Tensor,
    mean2: Tensor,
    invstd2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    mask = empty_mask(x)
    return _apply_dual(x, (mean, invstd, weight, bias), x2, (mean2, invstd2, weight2, bias2), True, mask), mask


def bn_stats_apply(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual = channels_last(x), like(residual, x)
    place = place_of(x)
    mean, invstd, out = empty_vector(x), empty_vector(x), torch.empty_like(x)
    mask = empty_mask(x) if with_mask else None
    weight, bias = vector_of(weight), vector_of(bias)
    moved = Moved(running_mean, running_var)
    workspace = empty_workspace(x, kernels().bn_workspace_bytes(place))
    vectors = addresses(x, residual, weight, bias, mean, invstd, *moved.vectors)
    kernels().bn_stats_apply(place, *vectors, momentum, eps, relu, *addresses(out, mask, workspace))
    moved.write_back()
    return out, x.new_empty(0, dtype=torch.uint8) if mask is None else mask, mean, invstd


def bn_grad_stats(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = channels_last(x)
    dz = None if out is None else torch.empty_like(x)
    sum_dz, sum_dz_xhat = _grad_stats(grad_out, x, out, None, (mean, invstd, weight, bias), relu, dz)
    return sum_dz, sum_dz_xhat, x.new_empty(0) if dz is None else dz


def bn_grad_stats_mask(
    grad_out: Tensor, x: Tensor, mask: Tensor, mean: Tensor, invstd: Tensor, with_dz: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = channels_last(x)
    dz = torch.empty_like(x) if with_dz else None
    sums = _grad_stats(grad_out, x, None, mask, (mean, invstd, None, None), True, dz)
    return (*sums, x.new_empty(0) if dz is None else dz)


def bn_grad_apply(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    relu: bool,
) -> Tensor:
    return _grad_apply(grad_out, channels_last(x), None, (mean, invstd, weight, bias), sum_dz, sum_dz_xhat, relu, None)


def bn_grad_apply_mask(
    grad_out: Tensor,
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    with_dz: bool,
) -> tuple[Tensor, Tensor]:
    x = channels_last(x)
    dz = torch.empty_like(x) if with_dz else None
    norm = (mean, invstd, weight, None)
    grad_x = _grad_apply(grad_out, x, mask, norm, sum_dz, sum_dz_xhat, True, dz)
    return grad_x, x.new_empty(0) if dz is None else dz


Vectors = tuple[Tensor | None, ...]
"""mean, invstd, weight, bias."""


def _apply(x: Tensor, norm: Vectors, residual: Tensor | None, relu: bool, mask: Tensor | None) -> Tensor:
    x, residual = channels_last(x), like(residual, x)
    out = torch.empty_like(x)
    vectors = [*map(vector_of, norm)]
    kernels().bn_apply(place_of(x), x.data_ptr(), norm_of(vectors), *addresses(residual), relu, *addresses(out, mask))
    return out


def _apply_dual(x: Tensor, norm: Vectors, x2: Tensor, norm2: Vectors, relu: bool, mask: Tensor | None) -> Tensor:
    x, x2 = channels_last(x), channels_last(x2.to(x.dtype))
    out = torch.empty_like(x)
    vectors, vectors2 = [*map(vector_of, norm)], [*map(vector_of, norm2)]
    first, second = (x.data_ptr(), norm_of(vectors)), (x2.data_ptr(), norm_of(vectors2))
    kernels().bn_apply_dual(place_of(x), *first, *second, relu, *addresses(out, mask))
    return out


def _grad_stats(
    grad_out: Tensor, x: Tensor, out: Tensor | None, mask: Tensor | None, norm: Vectors, relu: bool, dz: Tensor | None
) -> tuple[Tensor, Tensor]:
    place = place_of(x)
    grad_out, out = channels_last(grad_out.to(x.dtype)), like(out, x)
    vectors = [*map(vector_of, norm)]
    sum_dz, sum_dz_xhat = empty_vector(x), empty_vector(x)
    workspace = empty_workspace(x, kernels().bn_workspace_bytes(place))
    tensors, results = addresses(grad_out, x, out, mask), addresses(dz, sum_dz, sum_dz_xhat, workspace)
    kernels().bn_grad_stats(place, *tensors, norm_of(vectors), relu, *results)
    return sum_dz, sum_dz_xhat


def _grad_apply(
    grad_out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    norm: Vectors,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    relu: bool,
    dz: Tensor | None,
) -> Tensor:
    grad_out = channels_last(grad_out.to(x.dtype))
    vectors = [*map(vector_of, norm)]
    if sum_dz is None or sum_dz_xhat is None:
        sum_dz = sum_dz_xhat = None
    sum_dz, sum_dz_xhat = vector_of(sum_dz), vector_of(sum_dz_xhat)
    grad_x = torch.empty_like(x)
    sums = addresses(sum_dz, sum_dz_xhat)
    kernels().bn_grad_apply(
        place_of(x), *addresses(grad_out, x, mask), norm_of(vectors), *sums, relu, *addresses(dz, grad_x)
    )
    return grad_x
