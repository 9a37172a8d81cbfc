"""The meaning of batch norm, ReLU and max pooling as one pass, and of its backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import Norm, PoolSettings, Sums
from fused_resnet.ops.layout import conv_memory_format
from fused_resnet.ops.reference.norm import bn_apply, bn_grad_apply, bn_grad_stats, statistics_dtype


def bn_apply_pool(x: Tensor, norm: Norm, settings: PoolSettings) -> tuple[Tensor, Tensor]:
    """(max_pool2d(a), the place of each maximum in its window), a being ``relu(xhat * weight + bias)`` in x's dtype.

    The place is row * kernel width + column, in uint8; where several are equal, the first. One kernel reads x and
    writes the result and the places. This way also writes and reads a.
    """
    a = bn_apply(x, norm, None, True)
    out, index = F.max_pool2d(a, *settings, return_indices=True)
    top, left = window_corners(out, settings)
    row, column = index // x.shape[3] - top, index % x.shape[3] - left
    memory_format = conv_memory_format(a, a)
    place = (row * settings.kernel_size[1] + column).to(torch.uint8).contiguous(memory_format=memory_format)
    return out.contiguous(memory_format=memory_format), place


def bn_pool_grad_stats(
    grad_out: Tensor, place: Tensor, x: Tensor, norm: Norm, settings: PoolSettings
) -> tuple[Tensor, Tensor]:
    """(sum of dz, sum of dz * xhat) of each channel, for dz in front of ``bn_apply_pool``'s ReLU.

    dz is the gradient of the windows whose maximum a pixel is, where the recomputed ``xhat * weight + bias`` is not
    <= 0. Reads grad_out, place and 1T, and writes 0. This way also writes and reads dz.
    """
    return bn_grad_stats(_pool_grad(grad_out, place, x, settings), x, None, norm, True)[:2]


def bn_pool_grad_apply(
    grad_out: Tensor, place: Tensor, x: Tensor, norm: Norm, sums: Sums | None, settings: PoolSettings
) -> Tensor:
    """The gradient of ``bn_apply_pool``'s x: ``bn_grad_apply`` for the dz of ``bn_pool_grad_stats``.

    Reads grad_out, place and 1T, and writes 1T. This way also writes and reads dz.
    """
    return bn_grad_apply(_pool_grad(grad_out, place, x, settings), x, norm, sums, True)


def _pool_grad(grad_out: Tensor, place: Tensor, x: Tensor, settings: PoolSettings) -> Tensor:
    """The gradient of max_pool2d's input, in ``statistics_dtype``."""
    top, left = window_corners(place, settings)
    place = place.long()
    index = (place // settings.kernel_size[1] + top) * x.shape[3] + place % settings.kernel_size[1] + left
    grad = torch.zeros(x.shape, dtype=statistics_dtype(x), device=x.device)
    grad.flatten(2).scatter_add_(2, index.flatten(2), grad_out.to(grad.dtype).flatten(2))
    return grad


def window_corners(out: Tensor, settings: PoolSettings) -> tuple[Tensor, Tensor]:
    """The row and the column of the input in which each window begins."""
    _, stride, padding = settings
    rows, columns = (torch.arange(out.shape[i + 2], device=out.device) * stride[i] - padding[i] for i in (0, 1))
    return rows[:, None], columns[None, :]
