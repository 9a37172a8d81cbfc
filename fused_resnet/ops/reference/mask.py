"""The meaning of the passes that keep one bit of a ReLU for backward, instead of reading its output again.

A mask is uint8, (N*H*W, 4 * ceil(C / 32)): a row for every pixel in the order of channels_last. Bit c % 8 of byte
c // 8 is set where the gradient of channel c passes: where the ReLU's input is not <= 0. Bits beside the last channel
mean nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import Norm, RunningStatistics, Sums
from fused_resnet.ops.layout import dense
from fused_resnet.ops.reference.norm import bn_apply, bn_grad_apply, bn_grad_stats, bn_stats, normalize


def bn_apply_mask(x: Tensor, norm: Norm, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, mask): ``bn_apply`` with ReLU. Reads 1T (2T with a residual), writes 1T and a bit an element."""
    z = normalize(x, norm)
    z = z if residual is None else z + residual
    return _relu(dense(x), z), pack_mask(z)


def bn_apply_dual_mask(x: Tensor, norm: Norm, x2: Tensor, norm2: Norm) -> tuple[Tensor, Tensor]:
    """(out, mask): ``bn_apply_dual`` with ReLU. Reads 2T, writes 1T and a bit an element."""
    z = normalize(x, norm) + normalize(x2, norm2)
    return _relu(dense(x), z), pack_mask(z)


def bn_stats_apply(
    x: Tensor,
    running: RunningStatistics,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, mask, mean, invstd): ``bn_stats`` and then ``bn_apply``, in one launch where x fits in the shared memory of
    the device. The mask is empty without ``with_mask``, which takes relu. Reads 1T (2T with a residual), writes 1T and,
    with a mask, a bit an element."""
    mean, invstd = bn_stats(x, running)
    norm = Norm(mean, invstd, weight, bias)
    if with_mask:
        return (*bn_apply_mask(x, norm, residual), mean, invstd)
    return bn_apply(x, norm, residual, relu), x.new_empty(0, dtype=torch.uint8), mean, invstd


def bn_grad_stats_mask(
    grad_out: Tensor, x: Tensor, mask: Tensor, norm: Norm, with_dz: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of dz, sum of dz * xhat, dz), dz being grad_out where the mask lets it pass; it is written ``with_dz``, else
    empty. Reads 2T and a bit an element, and writes 1T with dz."""
    dz = _passed(grad_out, mask, x)
    sums = bn_grad_stats(dz, x, None, norm, False)[:2]
    return (*sums, dz if with_dz else x.new_empty(0))


def bn_grad_apply_mask(
    grad_out: Tensor, x: Tensor, mask: Tensor, norm: Norm, sums: Sums | None, with_dz: bool
) -> tuple[Tensor, Tensor]:
    """(grad_x, dz): ``bn_grad_apply`` of dz, grad_out where the mask lets it pass; dz, the gradient of the residual, is
    written ``with_dz``, else empty. Reads 2T and a bit an element, writes 1T (2T with dz)."""
    dz = _passed(grad_out, mask, x)
    return bn_grad_apply(dz, x, norm, sums, False), dz if with_dz else x.new_empty(0)


def mask_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of the mask of an activation (N, C, H, W)."""
    images, channels, height, width = shape
    return images * height * width, (channels + 31) // 32 * 4


def pack_mask(z: Tensor) -> Tensor:
    """The mask of a ReLU whose input is z, (N, C, H, W); a NaN lets the gradient pass, as in torch."""
    rows, stride = mask_shape(tuple(z.shape))
    passes = (~(z <= 0)).permute(0, 2, 3, 1).reshape(rows, z.shape[1])
    bits = F.pad(passes, (0, 8 * stride - z.shape[1])).reshape(rows, stride, 8)
    return (bits << torch.arange(8, device=z.device)).sum(2).to(torch.uint8)


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """True where the gradient of x passes, in x's shape."""
    images, channels, height, width = x.shape
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :channels].bool().reshape(images, height, width, channels).permute(0, 3, 1, 2)


def _passed(grad_out: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """dz, in x's dtype and strides."""
    return torch.empty_like(dense(x)).copy_(torch.where(unpack_mask(mask, x), grad_out, 0))


def _relu(x: Tensor, z: Tensor) -> Tensor:
    """relu(z) in x's dtype and strides."""
    return torch.empty_like(x).copy_(F.relu(z))
