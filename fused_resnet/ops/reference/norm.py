"""The meaning of the passes over one activation: batch norm, residual add and ReLU, and their backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops.layout import dense


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64 data, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def bn_stats(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(biased variance + eps) of each channel; moves the running statistics. Reads 1T, writes 0."""
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


def bn_apply(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """relu(xhat * weight + bias + residual), in x's dtype and strides. Reads 1T (2T with a residual), writes 1T."""
    x = dense(x)
    z = normalize(x, mean, invstd, weight, bias)
    if residual is not None:
        z = z + residual
    return torch.empty_like(x).copy_(F.relu(z) if relu else z)


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
    """relu(xhat * weight + bias + xhat2 * weight2 + bias2): the end of a projection block. Reads 2T, writes 1T."""
    x = dense(x)
    z = normalize(x, mean, invstd, weight, bias) + normalize(x2, mean2, invstd2, weight2, bias2)
    return torch.empty_like(x).copy_(F.relu(z) if relu else z)


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
    """(sum of dz, sum of dz * xhat, dz): the first two, of each channel, are the gradients of bias and weight.

    With ``relu``, dz is grad_out where the ReLU let it pass: where ``out`` is not <= 0 or, when ``out`` is None (there
    was no residual), where the recomputed ``xhat * weight + bias`` is not. dz is the gradient of the residual, so with
    ``out`` it is written here and returned; else it is empty. Reads 2T; with ``out`` reads 3T and writes 1T.
    """
    dz = grad_before_relu(grad_out, x, out, mean, invstd, weight, bias, relu)
    xhat = normalize(x, mean, invstd, None, None)
    written = x.new_empty(0) if out is None else torch.empty_like(dense(x)).copy_(dz)
    return dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3)), written


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
    """The gradient of x: weight * invstd * (dz - sum_dz / count - xhat * sum_dz_xhat / count).

    With ``relu``, dz is grad_out masked by the recomputed ``xhat * weight + bias``; else it is grad_out. With both sums
    None the statistics are constants (eval mode) and dx = weight * invstd * dz. Reads 2T, writes 1T.
    """
    x = dense(x)
    dx = dz = grad_before_relu(grad_out, x, None, mean, invstd, weight, bias, relu)
    if sum_dz is not None and sum_dz_xhat is not None:
        count = x.numel() // x.shape[1]
        xhat = normalize(x, mean, invstd, None, None)
        dx = dz - per_channel(sum_dz / count) - xhat * per_channel(sum_dz_xhat / count)
    scale = invstd if weight is None else invstd * weight
    return torch.empty_like(x).copy_(dx * per_channel(scale))


def bn_grad_coefficients(
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    count: float,
) -> Tensor:
    """(4, C): A, B, C and mean, with which ``bn_grad_apply``'s gradient is ``A * dz + B * (y - mean) + C``.

    y - mean stays a difference: B * y + (C - B * mean) would lose its digits when |mean| >> std. With a sum None the
    statistics are constants, and B = C = 0. ``count`` is the number of values behind each sum. Vectors only: 0T.
    """
    scale = invstd if weight is None else invstd * weight
    if sum_dz is None or sum_dz_xhat is None:
        zero = torch.zeros_like(invstd)
        return torch.stack([scale, zero, zero, mean]).to(invstd.dtype)
    return torch.stack([scale, -scale * invstd * (sum_dz_xhat / count), -scale * (sum_dz / count), mean]).to(
        invstd.dtype
    )


def per_channel(vector: Tensor) -> Tensor:
    """A vector of C as (1, C, 1, 1)."""
    return vector[None, :, None, None]


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """xhat * weight + bias. The mean is subtracted first: x * scale + shift loses its digits when |mean| >> std."""
    scale = invstd if weight is None else invstd * weight
    z = (x.to(mean.dtype) - per_channel(mean)) * per_channel(scale)
    return z if bias is None else z + per_channel(bias)


def grad_before_relu(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    grad_out = grad_out.to(mean.dtype)
    if not relu:
        return grad_out
    z = out if out is not None else normalize(x, mean, invstd, weight, bias)
    return torch.where(z <= 0, torch.zeros_like(grad_out), grad_out)  # a NaN lets the gradient pass, as in torch
