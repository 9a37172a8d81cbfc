"""Batch norm, residual add and ReLU of the ``cuda`` backend: passes over one activation (csrc/cuda/bn_*.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.arguments import Norm, RunningStatistics, Sums
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


def bn_stats(x: Tensor, running: RunningStatistics) -> tuple[Tensor, Tensor]:
    x, module = channels_last(x), kernels()
    place = place_of(x)
    mean, invstd = empty_vectors(x, x.shape[1])
    running_mean, running_var, momentum, eps = running
    moved = Moved(running_mean, running_var)
    workspace = empty_workspace(x, module.bn_workspace_bytes(place))
    vectors = (mean.data_ptr(), invstd.data_ptr(), *moved.addresses())
    launch(x.device.index, module.bn_stats, place, x.data_ptr(), *vectors, momentum, eps, workspace.data_ptr())
    moved.write_back()
    return mean, invstd


def bn_apply(x: Tensor, norm: Norm, residual: Tensor | None, relu: bool) -> Tensor:
    return _apply(x, norm, residual, relu, None)


def bn_apply_mask(x: Tensor, norm: Norm, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    mask = empty_mask(x)
    return _apply(x, norm, residual, True, mask), mask


def bn_apply_dual(x: Tensor, norm: Norm, x2: Tensor, norm2: Norm, relu: bool) -> Tensor:
    return _apply_dual(x, norm, x2, norm2, relu, None)


def bn_apply_dual_mask(x: Tensor, norm: Norm, x2: Tensor, norm2: Norm) -> tuple[Tensor, Tensor]:
    mask = empty_mask(x)
    return _apply_dual(x, norm, x2, norm2, True, mask), mask


def bn_stats_apply(
    x: Tensor,
    running: RunningStatistics,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, module = aligned(channels_last(x)), kernels()  # as fits_on_chip takes for granted
    residual = None if residual is None else aligned(like(residual, x))
    place = place_of(x)
    running_mean, running_var, momentum, eps = running
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
    grad_out: Tensor, x: Tensor, out: Tensor | None, norm: Norm, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _grad_stats(grad_out, x, out, None, norm, relu, out is not None)


def bn_grad_stats_mask(
    grad_out: Tensor, x: Tensor, mask: Tensor, norm: Norm, with_dz: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _grad_stats(grad_out, x, None, mask.contiguous(), Norm(*norm[:2]), True, with_dz)


def bn_grad_apply(grad_out: Tensor, x: Tensor, norm: Norm, sums: Sums | None, relu: bool) -> Tensor:
    return _grad_apply(grad_out, channels_last(x), None, norm, sums, relu, None)


def bn_grad_apply_mask(
    grad_out: Tensor, x: Tensor, mask: Tensor, norm: Norm, sums: Sums | None, with_dz: bool
) -> tuple[Tensor, Tensor]:
    x = channels_last(x)
    dz = torch.empty_like(x) if with_dz else None
    grad_x = _grad_apply(grad_out, x, mask.contiguous(), Norm(*norm[:3]), sums, True, dz)
    return grad_x, x.new_empty(0) if dz is None else dz


class _Vectors:
    """Vectors as the kernels take them, kept alive, and their addresses."""

    __slots__ = ("addresses", "vectors")

    def __init__(self, vectors: tuple[Tensor | None, ...]) -> None:
        self.vectors = vectors = tuple([vector_of(vector) for vector in vectors])
        self.addresses = [0 if vector is None else vector.data_ptr() for vector in vectors]


def _apply(x: Tensor, norm: Norm, residual: Tensor | None, relu: bool, mask: Tensor | None) -> Tensor:
    x = channels_last(x)
    residual = None if residual is None else like(residual, x)
    out = torch.empty_like(x)
    vectors = _Vectors(norm)
    read = (x.data_ptr(), *vectors.addresses, address(residual))
    launch(x.device.index, kernels().bn_apply, place_of(x), *read, relu, out.data_ptr(), address(mask))
    return out


def _apply_dual(x: Tensor, norm: Norm, x2: Tensor, norm2: Norm, relu: bool, mask: Tensor | None) -> Tensor:
    x = channels_last(x)
    x2, out = like(x2, x), torch.empty_like(x)
    vectors, vectors2 = _Vectors(norm), _Vectors(norm2)
    first, second = (x.data_ptr(), *vectors.addresses), (x2.data_ptr(), *vectors2.addresses)
    launch(x.device.index, kernels().bn_apply_dual, place_of(x), *first, *second, relu, out.data_ptr(), address(mask))
    return out


def _grad_stats(
    grad_out: Tensor, x: Tensor, out: Tensor | None, mask: Tensor | None, norm: Norm, relu: bool, with_dz: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, module = channels_last(x), kernels()
    place, grad_out = place_of(x), like(grad_out, x)
    out = None if out is None else like(out, x)
    dz = torch.empty_like(x) if with_dz else x.new_empty(0)
    sum_dz, sum_dz_xhat = empty_vectors(x, x.shape[1])
    workspace = empty_workspace(x, module.bn_workspace_bytes(place))
    read = (grad_out.data_ptr(), x.data_ptr(), address(out), address(mask))
    written = (dz.data_ptr() if with_dz else 0, sum_dz.data_ptr(), sum_dz_xhat.data_ptr(), workspace.data_ptr())
    vectors = _Vectors(norm)
    launch(x.device.index, module.bn_grad_stats, place, *read, *vectors.addresses, relu, *written)
    return sum_dz, sum_dz_xhat, dz


def _grad_apply(
    grad_out: Tensor, x: Tensor, mask: Tensor | None, norm: Norm, sums: Sums | None, relu: bool, dz: Tensor | None
) -> Tensor:
    grad_out = like(grad_out, x)
    vectors, more = _Vectors(norm), _Vectors(sums or (None, None))
    grad_x = torch.empty_like(x)
    read = (grad_out.data_ptr(), x.data_ptr(), address(mask), *vectors.addresses, *more.addresses)
    launch(x.device.index, kernels().bn_grad_apply, place_of(x), *read, relu, address(dz), grad_x.data_ptr())
    return grad_x
