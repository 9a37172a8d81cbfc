"""The meaning of every op, in plain PyTorch.

Every backend (the Triton kernels in ``fused_resnet.kernels``, the C++ code behind ``ops/native.py``) exports these
function names with these arguments and this meaning. This file is the oracle of the tests, the baseline of the
benchmarks, and the way that always works: any device, dtype and memory format, float64 included.

Notation: ``x`` is (N, C, H, W); statistics are vectors of C in ``statistics_dtype(x)``; ``xhat = (x - mean) * invstd``;
``z`` is the value in front of the ReLU and ``dz`` its gradient. T is the bytes of one activation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops.layout import conv_memory_format, dense


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
    z = _normalize(x, mean, invstd, weight, bias)
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
    z = _normalize(x, mean, invstd, weight, bias) + _normalize(x2, mean2, invstd2, weight2, bias2)
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
    dz = _grad_before_relu(grad_out, x, out, mean, invstd, weight, bias, relu)
    xhat = _normalize(x, mean, invstd, None, None)
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
    dx = dz = _grad_before_relu(grad_out, x, None, mean, invstd, weight, bias, relu)
    if sum_dz is not None and sum_dz_xhat is not None:
        count = x.numel() // x.shape[1]
        xhat = _normalize(x, mean, invstd, None, None)
        dx = dz - per_channel(sum_dz / count) - xhat * per_channel(sum_dz_xhat / count)
    scale = invstd if weight is None else invstd * weight
    return torch.empty_like(x).copy_(dx * per_channel(scale))


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """relu(conv2d(x, conv_weight) * scale + shift + residual), the normalisation given as per-channel scale and shift.

    Inference. One kernel would read x, the weight and the residual and write the output once; this way also writes
    and reads the convolution's raw output.
    """
    out = F.conv2d(x, conv_weight, None, stride, padding, dilation, groups)
    z = out.to(statistics_dtype(x))
    if scale is not None:
        z = z * per_channel(scale)
    if shift is not None:
        z = z + per_channel(shift)
    if residual is not None:
        z = z + residual
    z = F.relu(z) if relu else z
    return torch.empty_like(z, dtype=x.dtype, memory_format=conv_memory_format(x, conv_weight)).copy_(z)


def conv_stats(
    x: Tensor,
    conv_weight: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean of y, invstd of y): a convolution in training, with the norm and ReLU in front of it and the statistics
    of the norm behind it.

    y = conv2d(a, conv_weight), where ``a = relu(xhat * weight + bias)`` if ``mean`` is given (x is then the raw output
    of the convolution before) and x itself if not. The padding is of a: it is 0, whatever norm and ReLU would make of a
    0 in x. The statistics are those of y as it is written, in its own dtype; ``bn_stats`` says what they are and how
    the running ones move. Without ``statistics`` both are empty and nothing moves.

    One kernel reads x and conv_weight and writes y. This way also writes and reads a, and reads y again.
    """
    x = dense(x)
    a = x if mean is None or invstd is None else bn_apply(x, mean, invstd, weight, bias, None, True)
    y = F.conv2d(a, conv_weight, None, stride, padding, dilation, groups)
    y = y.contiguous(memory_format=conv_memory_format(x, conv_weight))
    if not statistics:
        return y, _no_vector(x), _no_vector(x)
    return (y, *bn_stats(y, running_mean, running_var, momentum, eps))


def bn_apply_pool(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    """(max_pool2d(a), the place of each maximum in its window), a being ``relu(xhat * weight + bias)`` in x's dtype.

    The place is row * kernel width + column, in uint8; where several are equal, the first. One kernel reads x and
    writes the result and the places. This way also writes and reads a.
    """
    a = bn_apply(x, mean, invstd, weight, bias, None, True)
    out, index = F.max_pool2d(a, kernel_size, stride, padding, return_indices=True)
    top, left = _window_corners(out, stride, padding)
    row, column = index // x.shape[3] - top, index % x.shape[3] - left
    memory_format = conv_memory_format(a, a)
    place = (row * kernel_size[1] + column).to(torch.uint8).contiguous(memory_format=memory_format)
    return out.contiguous(memory_format=memory_format), place


def bn_pool_grad_stats(
    grad_out: Tensor,
    place: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    """(sum of dz, sum of dz * xhat) of each channel, for dz in front of ``bn_apply_pool``'s ReLU.

    dz is the gradient of the windows whose maximum a pixel is, where the recomputed ``xhat * weight + bias`` is not
    <= 0. Reads grad_out, place and 1T, and writes 0. This way also writes and reads dz.
    """
    grad = _pool_grad(grad_out, place, x, kernel_size, stride, padding)
    return bn_grad_stats(grad, x, None, mean, invstd, weight, bias, True)[:2]


def bn_pool_grad_apply(
    grad_out: Tensor,
    place: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """The gradient of ``bn_apply_pool``'s x: ``bn_grad_apply`` for the dz of ``bn_pool_grad_stats``.

    Reads grad_out, place and 1T, and writes 1T. This way also writes and reads dz.
    """
    grad = _pool_grad(grad_out, place, x, kernel_size, stride, padding)
    return bn_grad_apply(grad, x, mean, invstd, weight, bias, sum_dz, sum_dz_xhat, True)


def _pool_grad(
    grad_out: Tensor, place: Tensor, x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """The gradient of max_pool2d's input, in ``statistics_dtype``."""
    top, left = _window_corners(place, stride, padding)
    place = place.long()
    index = (place // kernel_size[1] + top) * x.shape[3] + place % kernel_size[1] + left
    grad = torch.zeros(x.shape, dtype=statistics_dtype(x), device=x.device)
    grad.flatten(2).scatter_add_(2, index.flatten(2), grad_out.to(grad.dtype).flatten(2))
    return grad


def _window_corners(out: Tensor, stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    """The row and the column of the input in which each window begins."""
    rows, columns = (torch.arange(out.shape[i + 2], device=out.device) * stride[i] - padding[i] for i in (0, 1))
    return rows[:, None], columns[None, :]


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


def conv_grad_input(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    conv_weight: Tensor,
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, sum of it, sum of it * xhat): backward of ``conv_stats`` towards its input, and with it the first half
    of the backward of the norm and ReLU in front.

    ``dy = A * dz + B * (y - mean_y) + C`` with ``bn_grad_coefficients``; without y, ``dy = A * dz``; without
    coefficients, dy = dz. ``da`` is the gradient of conv2d's input for dy, plus ``residual``. If ``mean`` is given, x
    is the raw output of the convolution before: the gradient is then da where ``xhat * weight + bias`` is not <= 0, and
    the sums are of it as written. Else the gradient is da, x says its shape, dtype and strides only, and the sums are
    empty.

    One kernel reads dz, y, conv_weight, [x], [residual] and writes the gradient. This way also writes and reads dy, da.
    """
    dy = _conv_output_grad(dz, y, coefficients)
    da = _conv_backward(dy, x, conv_weight, stride, padding, dilation, groups, wanted=0)
    da = da.to(statistics_dtype(x)) if residual is None else da.to(statistics_dtype(x)) + residual
    if mean is None or invstd is None:
        return torch.empty_like(dense(x)).copy_(da), _no_vector(x), _no_vector(x)
    masked = _grad_before_relu(da, x, None, mean, invstd, weight, bias, True)
    grad = torch.empty_like(dense(x)).copy_(masked)
    return (grad, *bn_grad_stats(grad, x, None, mean, invstd, weight, bias, False)[:2])


def conv_grad_weight(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The gradient of ``conv_stats``' conv_weight (of which only the shape is read), in float32 (float64 for float64).

    dy as in ``conv_grad_input`` and the activation as in ``conv_stats`` are both made again on the way. One kernel
    reads dz, y and x. This way also writes and reads dy and the activation.
    """
    dy = _conv_output_grad(dz, y, coefficients)
    a = x if mean is None or invstd is None else bn_apply(x, mean, invstd, weight, bias, None, True)
    wide = statistics_dtype(x)
    like = torch.empty_like(conv_weight, dtype=wide, memory_format=torch.channels_last)
    return _conv_backward(dy.to(wide), a.to(wide), like, stride, padding, dilation, groups, wanted=1)


def _conv_output_grad(dz: Tensor, y: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """dy, in dz's dtype."""
    if coefficients is None:
        return dz
    slope_dz, slope_y, offset, mean = map(per_channel, coefficients)
    dy = dz.to(coefficients.dtype) * slope_dz
    if y is not None:
        dy = dy + (y.to(coefficients.dtype) - mean) * slope_y + offset
    return torch.empty_like(dense(dz)).copy_(dy)


def _conv_backward(
    dy: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wanted: int,
) -> Tensor:
    """conv2d's gradient of its input (wanted = 0) or of its weight (wanted = 1)."""
    mask = [wanted == 0, wanted == 1, False]
    settings = (None, stride, padding, dilation, False, [0, 0], groups, mask)
    return torch.ops.aten.convolution_backward(dy, x, conv_weight, *settings)[wanted]


def _no_vector(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=statistics_dtype(x))


def per_channel(vector: Tensor) -> Tensor:
    """A vector of C as (1, C, 1, 1)."""
    return vector[None, :, None, None]


def _normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """xhat * weight + bias. The mean is subtracted first: x * scale + shift loses its digits when |mean| >> std."""
    scale = invstd if weight is None else invstd * weight
    z = (x.to(mean.dtype) - per_channel(mean)) * per_channel(scale)
    return z if bias is None else z + per_channel(bias)


def _grad_before_relu(
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
    z = out if out is not None else _normalize(x, mean, invstd, weight, bias)
    return torch.where(z <= 0, torch.zeros_like(grad_out), grad_out)  # a NaN lets the gradient pass, as in torch
