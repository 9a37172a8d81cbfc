"""The meaning of the passes over one activation: batch norm, residual add and ReLU, and their backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import Norm, RunningStatistics, Sums
from fused_resnet.ops.layout import dense


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64 data, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def bn_stats(x: Tensor, running: RunningStatistics) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(biased variance + eps) of each channel; moves the running statistics. Reads 1T, writes 0."""
    running_mean, running_var, momentum, eps = running
    wide = x.to(statistics_dtype(x))
    variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    if x.numel() == 0:  # as F.batch_norm, which leaves the running statistics alone
        running_mean = running_var = None
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
    if running_var is not None:
        count = x.numel() // x.shape[1]
        unbiased = variance * (count / max(count - 1, 1))
        running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
    return mean, torch.rsqrt(variance + eps)


def bn_apply(x: Tensor, norm: Norm, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(xhat * weight + bias + residual), in x's dtype and strides. Reads 1T (2T with a residual), writes 1T."""
    x = dense(x)
    z = normalize(x, norm)
    if residual is not None:
        z = z + residual
    return torch.empty_like(x).copy_(F.relu(z) if relu else z)


def bn_apply_dual(x: Tensor, norm: Norm, x2: Tensor, norm2: Norm, relu: bool) -> Tensor:
    """relu(xhat * weight + bias + xhat2 * weight2 + bias2): the end of a projection block. Reads 2T, writes 1T."""
    x = dense(x)
    z = normalize(x, norm) + normalize(x2, norm2)
    return torch.empty_like(x).copy_(F.relu(z) if relu else z)


def bn_grad_stats(
    grad_out: Tensor, x: Tensor, out: Tensor | None, norm: Norm, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of dz, sum of dz * xhat, dz): the first two, of each channel, are the gradients of bias and weight.

    With ``relu``, dz is grad_out where the ReLU let it pass: where ``out`` is not <= 0 or, when ``out`` is None (there
    was no residual), where the recomputed ``xhat * weight + bias`` is not. dz is the gradient of the residual, so with
    ``out`` it is written here and returned; else it is empty. Reads 2T; with ``out`` reads 3T and writes 1T.
    """
    dz = grad_before_relu(grad_out, x, out, norm, relu)
    xhat = _xhat(x, norm)
    written = x.new_empty(0) if out is None else torch.empty_like(dense(x)).copy_(dz)
    return dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3)), written


def bn_grad_apply(grad_out: Tensor, x: Tensor, norm: Norm, sums: Sums | None, relu: bool) -> Tensor:
    """The gradient of x: weight * invstd * (dz - sum_dz / count - xhat * sum_dz_xhat / count).

    With ``relu``, dz is grad_out masked by the recomputed ``xhat * weight + bias``; else it is grad_out. Without
    sums the statistics are constants (eval mode) and dx = weight * invstd * dz. Reads 2T, writes 1T.
    """
    x = dense(x)
    dx = dz = grad_before_relu(grad_out, x, None, norm, relu)
    if sums is not None:
        mean_dz, mean_dz_xhat = (per_channel(each / (x.numel() // x.shape[1])) for each in sums)
        dx = dz - mean_dz - _xhat(x, norm) * mean_dz_xhat
    return torch.empty_like(x).copy_(dx * per_channel(_scale(norm)))


def bn_grad_coefficients(sums: Sums | None, norm: Norm, count: float) -> Tensor:
    """(4, C): A, B, C and mean, with which ``bn_grad_apply``'s gradient is ``A * dz + B * (y - mean) + C``.

    y - mean stays a difference: B * y + (C - B * mean) would lose its digits when |mean| >> std. Without sums the
    statistics are constants, and B = C = 0. ``count`` is the number of values behind each sum. Vectors only: 0T.
    """
    scale, invstd = _scale(norm), norm.invstd
    slope = offset = torch.zeros_like(invstd)
    if sums is not None:
        sum_dz, sum_dz_xhat = sums
        slope, offset = -scale * invstd * (sum_dz_xhat / count), -scale * (sum_dz / count)
    return torch.stack([scale, slope, offset, norm.mean]).to(invstd.dtype)


def per_channel(vector: Tensor) -> Tensor:
    """A vector of C as (1, C, 1, 1)."""
    return vector[None, :, None, None]


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """xhat * weight + bias. The mean is subtracted first: x * scale + shift loses its digits when |mean| >> std."""
    z = (x.to(norm.mean.dtype) - per_channel(norm.mean)) * per_channel(_scale(norm))
    return z if norm.bias is None else z + per_channel(norm.bias)


def _xhat(x: Tensor, norm: Norm) -> Tensor:
    return normalize(x, Norm(norm.mean, norm.invstd))


def _scale(norm: Norm) -> Tensor:
    return norm.invstd if norm.weight is None else norm.invstd * norm.weight


def grad_before_relu(grad_out: Tensor, x: Tensor, out: Tensor | None, norm: Norm, relu: bool) -> Tensor:
    grad_out = grad_out.to(norm.mean.dtype)
    if not relu:
        return grad_out
    z = out if out is not None else normalize(x, norm)
    return torch.where(z <= 0, torch.zeros_like(grad_out), grad_out)  # a NaN lets the gradient pass, as in torch
