"""Batch norm, residual add and ReLU of the ``cuda`` backend: passes over one activation (csrc/cuda/bn_*.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.ops.backends.cuda.launch import (
    Moved,
    address,
    aligned,
    channels_last,
    empty_mask,
    empty_vectors,
    empty_workspace,
    kernels,
    launch,
    like,
    place_of,
    vector_of,
)


def bn_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    x, module = channels_last(x), kernels()
    place = place_of(x)
    mean, invstd = empty_vectors(x, x.shape[1])
    moved = Moved(running_mean, running_var)
    workspace = empty_workspace(x, module.bn_workspace_bytes(place))
    vectors = (mean.data_ptr(), invstd.data_ptr(), *moved.addresses())
    launch(x.device.index, module.bn_stats, place, x.data_ptr(), *vectors, momentum, eps, workspace.data_ptr())
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
    return _apply(x, _Norm(mean, invstd, weight, bias), residual, relu, None)


def bn_apply_mask(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    mask = empty_mask(x)
    return _apply(x, _Norm(mean, invstd, weight, bias), residual, True, mask), mask


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
    return _apply_dual(x, _Norm(mean, invstd, weight, bias), x2, _Norm(mean2, invstd2, weight2, bias2), relu, None)


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
    norm, norm2 = _Norm(mean, invstd, weight, bias), _Norm(mean2, invstd2, weight2, bias2)
    return _apply_dual(x, norm, x2, norm2, True, mask), mask


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
    x, module = aligned(channels_last(x)), kernels()  # as fits_on_chip takes for granted
    residual = None if residual is None else aligned(like(residual, x))
    place = place_of(x)
    mean, invstd = empty_vectors(x, x.shape[1])
    out = torch.empty_like(x)
    mask = empty_mask(x) if with_mask else x.new_empty(0, dtype=torch.uint8)
    weight, bias = aligned(vector_of(weight)), aligned(vector_of(bias))
    moved = Moved(running_mean, running_var)
    workspace = empty_workspace(x, module.bn_workspace_bytes(place))
    vectors = (address(weight), address(bias), mean.data_ptr(), invstd.data_ptr(), *moved.addresses())
    written = (out.data_ptr(), mask.data_ptr() if with_mask else 0, workspace.data_ptr())
    launch(
        x.device.index,
        module.bn_stats_apply,
        place,
        x.data_ptr(),
        address(residual),
        *vectors,
        momentum,
        eps,
        relu,
        *written,
    )
    moved.write_back()
    return out, mask, mean, invstd


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
    return _grad_stats(grad_out, x, out, None, _Norm(mean, invstd, weight, bias), relu, out is not None)


def bn_grad_stats_mask(
    grad_out: Tensor, x: Tensor, mask: Tensor, mean: Tensor, invstd: Tensor, with_dz: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _grad_stats(grad_out, x, None, mask.contiguous(), _Norm(mean, invstd, None, None), True, with_dz)


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
    x = channels_last(x)
    return _grad_apply(grad_out, x, None, _Norm(mean, invstd, weight, bias), sum_dz, sum_dz_xhat, relu, None)


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
    mask = mask.contiguous()
    grad_x = _grad_apply(grad_out, x, mask, _Norm(mean, invstd, weight, None), sum_dz, sum_dz_xhat, True, dz)
    return grad_x, x.new_empty(0) if dz is None else dz


class _Norm:
    """Vectors as the kernels take them, kept alive, and their addresses."""

    __slots__ = ("addresses", "vectors")

    def __init__(self, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.vectors = vectors = (vector_of(mean), vector_of(invstd), vector_of(weight), vector_of(bias))
        self.addresses = [0 if vector is None else vector.data_ptr() for vector in vectors]


def _apply(x: Tensor, norm: _Norm, residual: Tensor | None, relu: bool, mask: Tensor | None) -> Tensor:
    x = channels_last(x)
    residual = None if residual is None else like(residual, x)
    out = torch.empty_like(x)
    written = (out.data_ptr(), address(mask))
    launch(
        x.device.index,
        kernels().bn_apply,
        place_of(x),
        x.data_ptr(),
        *norm.addresses,
        address(residual),
        relu,
        *written,
    )
    return out


def _apply_dual(x: Tensor, norm: _Norm, x2: Tensor, norm2: _Norm, relu: bool, mask: Tensor | None) -> Tensor:
    x = channels_last(x)
    x2, out = like(x2, x), torch.empty_like(x)
    first, second = (x.data_ptr(), *norm.addresses), (x2.data_ptr(), *norm2.addresses)
    launch(x.device.index, kernels().bn_apply_dual, place_of(x), *first, *second, relu, out.data_ptr(), address(mask))
    return out


def _grad_stats(
    grad_out: Tensor, x: Tensor, out: Tensor | None, mask: Tensor | None, norm: _Norm, relu: bool, with_dz: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, module = channels_last(x), kernels()
    place, grad_out = place_of(x), like(grad_out, x)
    out = None if out is None else like(out, x)
    dz = torch.empty_like(x) if with_dz else x.new_empty(0)
    sum_dz, sum_dz_xhat = empty_vectors(x, x.shape[1])
    workspace = empty_workspace(x, module.bn_workspace_bytes(place))
    read = (grad_out.data_ptr(), x.data_ptr(), address(out), address(mask))
    written = (dz.data_ptr() if with_dz else 0, sum_dz.data_ptr(), sum_dz_xhat.data_ptr(), workspace.data_ptr())
    launch(x.device.index, module.bn_grad_stats, place, *read, *norm.addresses, relu, *written)
    return sum_dz, sum_dz_xhat, dz


def _grad_apply(
    grad_out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    norm: _Norm,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    relu: bool,
    dz: Tensor | None,
) -> Tensor:
    grad_out = like(grad_out, x)
    if sum_dz is None or sum_dz_xhat is None:
        sum_dz = sum_dz_xhat = None
    sum_dz, sum_dz_xhat = vector_of(sum_dz), vector_of(sum_dz_xhat)
    grad_x = torch.empty_like(x)
    read = (grad_out.data_ptr(), x.data_ptr(), address(mask), *norm.addresses, address(sum_dz), address(sum_dz_xhat))
    launch(x.device.index, kernels().bn_grad_apply, place_of(x), *read, relu, address(dz), grad_x.data_ptr())
    return grad_x
