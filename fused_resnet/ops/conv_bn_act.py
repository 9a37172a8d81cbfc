"""Convolution + BatchNorm + residual add + ReLU for inference: one kernel that writes nothing but the result.

With constant statistics a BatchNorm is a scale and a shift of each channel, which a convolution can apply while its
result is still in registers. ``ops/route/choose.py`` says which backend does that where.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops import checks
from fused_resnet.ops.autocast import autocast_dtype
from fused_resnet.ops.bn_act import bn_act, wants_gradient
from fused_resnet.ops.layout import are_plain, resolved, resolved_or_none
from fused_resnet.ops.reference import statistics_dtype
from fused_resnet.ops.route.choose import function_for
from fused_resnet.ops.route.context import is_transformed


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    activation: str | None = "relu",
) -> Tensor:
    """``act(F.batch_norm(F.conv2d(x, conv_weight), running_mean, running_var, weight, bias, eps=eps) + residual)``.

    For inference. Where a gradient is wanted it is computed as that expression, with ``bn_act`` behind the convolution.
    Under autocast the convolution runs in autocast's dtype, as ``F.conv2d`` does.

    Args:
        x: (N, C, H, W), floating point, any memory format (channels_last is the fast one).
        conv_weight: (K, C / groups, kernel height, kernel width), x's dtype.
        weight, bias: (K,), or None for 1 and 0.
        running_mean, running_var: (K,).
        residual: the result's shape, any memory format; or None.
        stride, padding, dilation: an int, or (vertical, horizontal).
        activation: "relu" or None.

    Returns:
        (N, K, H', W'), in the dtype and memory format of ``F.conv2d``'s result.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong rank, shape, device or value, or an image smaller than the kernel.
        BackendError: the backend asked for by ``use_backend`` cannot run this.
    """
    relu = checks.check_activation(activation)
    checks.check_image("x", x)
    checks.check_conv_weight(x, conv_weight, groups)
    settings = ConvSettings.of(
        checks.check_pair("stride", stride, minimum=1),
        checks.check_pair("padding", padding, minimum=0),
        checks.check_pair("dilation", dilation, minimum=1),
        groups,
    )
    channels = conv_weight.shape[0]
    checks.check_batch_norm(x, weight, bias, running_mean, running_var, False, 0.0, eps, channels)
    size = settings.output_size(x.shape, conv_weight.shape)
    if any(length < 1 for length in (*size, *x.shape[2:])):  # min would compare them, which an exported program keeps
        raise checks.WrongValue(
            f"x must have at least one pixel and, padded, be at least as large as the dilated kernel; "
            f"got {tuple(x.shape)} for the kernel {tuple(conv_weight.shape[2:])} with padding {[*settings.padding]} "
            f"and dilation {[*settings.dilation]}"
        )
    checks.check_residual("residual", residual, x, (x.shape[0], channels, *size))
    if (dtype := autocast_dtype(x)) is not None:
        x, conv_weight = x.to(dtype), conv_weight.to(dtype)
    checks.check_same_dtype("conv_weight", conv_weight, x.dtype)
    x, conv_weight, residual = resolved(x), resolved(conv_weight), resolved_or_none(residual)

    if (
        torch.compiler.is_exporting()
        or x.shape[0] == 0
        or is_transformed()
        or not are_plain(x, conv_weight, weight, bias, running_mean, running_var, residual)
        or wants_gradient(x, conv_weight, weight, bias, residual)
    ):
        out = F.conv2d(x, conv_weight, None, *settings)
        return bn_act(out, weight, bias, running_mean, running_var, residual, eps=eps, activation=activation)
    scale, shift = fold(weight, bias, running_mean, running_var, eps, statistics_dtype(x))
    if residual is not None and residual.dtype != x.dtype:
        widest = torch.promote_types(residual.dtype, x.dtype)
        alone = (x, conv_weight, scale, shift, None, settings, False)
        out = function_for("conv_bn_act", alone)(*alone).to(widest) + residual
        return F.relu(out) if relu else out
    arguments = (x, conv_weight, scale, shift, residual, settings, relu)
    return function_for("conv_bn_act", arguments)(*arguments)


def fold(
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(scale, shift) of each channel, such that batch_norm(y) = y * scale + shift with constant statistics.

    Computed in float64 and rounded once, to ``dtype``.
    """
    scale = torch.rsqrt(running_var.double() + eps)  # sums, products and casts resolve lazily negated views
    scale = scale if weight is None else scale * weight.double()
    shift = -running_mean.double() * scale
    shift = shift if bias is None else shift + bias.double()
    return scale.to(dtype), shift.to(dtype)
